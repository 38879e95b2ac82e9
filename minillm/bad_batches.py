"""The batch in which a number was not finite, written down before the run ends.

RUN/bad-batches/STAGE-000012/rank00000.json: where it was, why, and a line for each row (uid, tokens); beside it
rank00000.safetensors: what is known of each token. Each rank writes what it has: of a rollout its own rows, of
references all of the step.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save

from minillm.errors import NonFinite
from minillm.ranks import Ranks
from minillm.state import State
from minillm.store import BAD_BATCHES, RunFolder, write_bytes, write_text


@contextmanager
def written_down(
    folder: RunFolder, *, ranks: Ranks, place: Callable[[], Mapping[str, Any]], batch: Callable[[], State] | None = None
) -> Iterator[None]:
    """A ``NonFinite`` out of the block leaves its batch in the run's folder, and says where.

    ``place`` has ``stage``, ``step`` (steps done) and ``update``; ``batch`` is for errors that bring none.
    """
    try:
        yield
    except NonFinite as error:
        found = error.batch
        if found is None and error.batch_of is None:
            if batch is None:
                raise
            found = batch()
        at = place()
        into = folder.path / BAD_BATCHES / f"{at['stage']}-{at['step'] + 1:06d}"
        words = f"the batch stands in {into}"
        if found is None:
            words += f", written by rank {error.batch_of}"
        else:
            about = {**at, "ranks": ranks.size, "rank": ranks.rank, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
            try:
                _write(into, found, {**about, "reason": str(error)})
            except OSError as failed:
                words = f"the batch could not be written to {into}: {failed.strerror}"
        raise NonFinite(f"{error}\n  {words}", rows=error.rows, batch=found) from error


def _write(into: Path, batch: State, about: Mapping[str, Any]) -> None:
    for folder in (into.parent, into):
        if folder.is_symlink():  # whoever made the run's folder may want it written elsewhere
            raise OSError(errno.ELOOP, f"{folder} is a link")
    into.mkdir(parents=True, exist_ok=True)
    stem = f"rank{about['rank']:05d}"
    rows = ",\n".join(f"  {json.dumps(row)}" for row in batch.record["rows"])
    entries = [f'"{name}": {json.dumps(value)}' for name, value in about.items()]
    if batch.tensors:
        tensors = {name: value.detach().to("cpu").contiguous() for name, value in batch.tensors.items()}
        write_bytes(into / f"{stem}.safetensors", save(tensors))
    write_text(into / f"{stem}.json", "{\n" + ",\n".join([*entries, f'"rows": [\n{rows}\n]']) + "\n}\n")

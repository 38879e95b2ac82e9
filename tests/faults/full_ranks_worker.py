"""One rank of a run whose first rank finds no room, makes a mistake, and then finds room."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from minillm import stages
from minillm.api import distill
from minillm.config import load_config
from minillm.ranks import Ranks
from minillm.saving import Behind
from minillm.store import RunFolder
from tests import quick, tiny
from tests.faults.full_worker import LINE, Call, Limit, before_call, recipe
from tests.resume.test_going_on import KEEP


def attempt(
    what: str, call: Call, act: Callable[[], object], place: Path, *, rank: int, mend: Callable[[], object] = int
) -> None:
    """A run in which rank 0 alone does something before a call, until it is mended; how it ended on this rank."""
    config = load_config(place / "run.yaml", [])
    error: Exception | None = None
    owner, name, number = call
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(AssertionError))
        # What is printed goes to a file, which has no more room than others have.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(before_call(owner, name, {number: act if rank == 0 else int}))
        try:
            distill(config)
        except Exception as found:
            error = found
    mend()
    told: dict[str, object] = {
        "error": "" if error is None else type(error).__name__,
        "text": str(error),
        "at": time.time(),
    }
    log, status = place / "runs/run/metrics.jsonl", RunFolder(place / "runs/run", writes=False).status()
    told |= {"lines": len(log.read_text().splitlines()) if log.exists() else 0, "state": status.get("state")}
    print(json.dumps({"what": what, "rank": rank, **told}), flush=True)


def main(place: Path) -> None:
    """Four attempts at one run."""
    ranks = Ranks(threads=1)
    if ranks.first:
        tiny.save_model(place / "student", "llama", seed=2)
        tiny.save_prompts(place / "prompts.jsonl", rows=8)
        recipe(place, "run", checkpoints={**KEEP, "max_failed": 0})
    ranks.barrier()
    limit = Limit(place)

    def mistake() -> None:
        raise ZeroDivisionError

    attempt("no save", (*LINE, 1), limit.fill, place, rank=ranks.rank, mend=limit.empty)
    attempt("no room", (stages, "publish_student", 1), limit.fill, place, rank=ranks.rank, mend=limit.empty)
    attempt("mistake", (Behind, "require_student", 1), mistake, place, rank=ranks.rank)
    attempt("room", (Behind, "require_student", 1), int, place, rank=ranks.rank)


if __name__ == "__main__":
    quick.short_collections()
    with quick.undrawn():
        main(Path(sys.argv[1]))

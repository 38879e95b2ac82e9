"""Checkpoints of a few bytes, whose right content is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.checkpoint_manifest import MANIFEST
from minillm.checkpoints import Checkpoint, Checkpoints, Write
from minillm.disk import DISK, Disk, Sink
from tests.faults.sides import alone

if TYPE_CHECKING:
    from minillm.ranks import Ranks


def contents(step: int, *, ranks: int = 1) -> dict[str, list[bytes]]:
    """What a step's files hold, in the pieces in which they are written; of one length at each step."""
    files = {"model.safetensors": [b"weights " * 3, b"of step %04d" % step]}
    return files | {f"rank{rank:05d}.json": [b'{"step": %d, "rank": %d}' % (step, rank)] for rank in range(ranks)}


def writers(step: int, ranks: Ranks) -> dict[str, Write]:
    """What this rank hands to the store: the model is the first one's."""

    def writes(pieces: list[bytes]) -> Write:
        def write(sink: Sink) -> None:
            for piece in pieces:
                sink.write(piece)

        return write

    own = {f"rank{ranks.rank:05d}.json", *(["model.safetensors"] if ranks.first else [])}
    return {name: writes(pieces) for name, pieces in contents(step, ranks=ranks.size).items() if name in own}


def store(
    run: Path, *, ranks: Ranks | None = None, disk: Disk = DISK, said: Callable[[str], None] = lambda line: None
) -> Checkpoints:
    """The checkpoints of a run."""
    return Checkpoints(run / "checkpoints", ranks=ranks or alone(), say=said, disk=disk)


def save(checkpoints: Checkpoints, step: int, ranks: Ranks | None = None) -> Checkpoint:
    """Saves a step's checkpoint."""
    files = writers(step, ranks or alone())
    return checkpoints.save(step=step, stage="sft", fingerprints={"config": "c"}, files=files)


def is_right(found: Checkpoint) -> bool:
    """Whether a checkpoint holds exactly what was given for its step, when its files are read."""
    wanted = contents(found.manifest.step, ranks=found.manifest.ranks)
    there = {path.name for path in found.path.iterdir()} - {MANIFEST}
    return there == set(wanted) and all(
        found.file(name).read_bytes() == b"".join(pieces) for name, pieces in wanted.items()
    )

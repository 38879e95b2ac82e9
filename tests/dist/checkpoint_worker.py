"""A checkpoint store on each of several ranks: a save that fails on the last one, two that do not, and a choice."""

from __future__ import annotations

import sys
from pathlib import Path

from minillm.disk import DISK
from minillm.errors import CheckpointError, SaveFailed
from minillm.lost import leave
from minillm.ranks import Ranks
from tests.faults.disks import Full
from tests.faults.toy import is_right, save, store


def main(run: Path) -> None:
    """Prints a line a rank."""
    ranks = Ranks(threads=1)
    last = ranks.rank == ranks.size - 1
    checkpoints = store(run, ranks=ranks)
    save(checkpoints, 1, ranks)
    try:
        save(store(run, ranks=ranks, disk=Full(room=3) if last else DISK), 2, ranks)
        failed = "saved"
    except SaveFailed as error:
        failed = f"rank {ranks.size - 1} failed" if f"rank {ranks.size - 1} failed" in str(error) else str(error)
    for step in (2, 3):
        save(checkpoints, step, ranks)
    steps = checkpoints.steps()
    ranks.barrier()
    if ranks.first:  # a byte that the last rank reads
        (run / "checkpoints" / "step-00000003" / f"rank{ranks.size - 1:05d}.json").write_bytes(b'{"step": 3, "rank": 7}')
    ranks.barrier()
    try:
        checkpoints.choose(run / "checkpoints" / "step-00000003")
        refused = "taken"
    except CheckpointError as error:
        refused = "refused" if "SHA-256" in str(error) else str(error)
    found = checkpoints.choose("auto")
    assert found is not None and is_right(found)
    print(f"rank {ranks.rank}: {failed}; {steps}; {refused}; {found.manifest.step} of {found.manifest.ranks}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # left to the end of Python, gloo sometimes aborts

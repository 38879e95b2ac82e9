"""A rank of several nodes: ``python -m tests.dist.nodes_worker FOLDER [CELL]``.

It trains a cell of the parity test; without one it meets the others step after step until a signal stops them.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

from minillm import cli, phases
from minillm.errors import Stopped
from minillm.lost import leave
from minillm.stops import Stops

BEGINS = 3


def work(folder: Path) -> None:
    """Steps without end."""
    from minillm.ranks import Ranks

    ranks = Ranks(limit_s=60.0)
    (folder / f"pid-{ranks.rank}").write_text(str(os.getpid()))
    with Stops() as stops:
        for step in itertools.count():
            phases.enter("learning")
            time.sleep(0.02)
            if step == BEGINS:
                (folder / f"going-{ranks.rank}").write_text("")
            if name := stops.agreed(ranks):
                (folder / f"saved-{ranks.rank}").write_text(f"{step} {name}")
                raise Stopped(f"{name}: saved")


def train(folder: Path, cell: str) -> None:
    """One cell, without the drawings of its report."""
    from minillm import distill
    from tests import quick
    from tests.dist import parity_worker

    with quick.undrawn():
        distill(parity_worker.config(folder, cell))


if __name__ == "__main__":
    phases.show()
    if len(sys.argv) > 2:
        train(Path(sys.argv[1]), sys.argv[2])
        leave(0)
    leave(cli._guarded(lambda standalone_mode: work(Path(sys.argv[1]))))

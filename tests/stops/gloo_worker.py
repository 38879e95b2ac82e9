"""Two real ranks: ``python -m tests.stops.gloo_worker FOLDER kill|late``.

They agree on a signal that rank 1 alone has got, and rank 1 dies (kill); or it comes to no collective at all (late).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from minillm import cli, phases
from minillm.lost import leave
from minillm.stops import Stops

LATE_S = 3.0
"""The time-out of the collectives."""


def work(folder: Path, how: str) -> None:
    """What the two do."""
    from minillm.ranks import Ranks

    ranks = Ranks(limit_s=LATE_S if how == "late" else 60.0)
    if how == "kill":
        with Stops() as stops:
            before = stops.agreed(ranks)
            if ranks.rank == 1:
                signal.raise_signal(signal.SIGTERM)
            (folder / f"agreed-{ranks.rank}").write_text(f"{before}>{stops.agreed(ranks)}")
    phases.enter("learning")
    if ranks.rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ranks.rank == 1:
        phases.enter("rollout")
        time.sleep(60)
    ranks.most(0)


if __name__ == "__main__":
    phases.show()
    leave(cli._guarded(lambda standalone_mode: work(Path(sys.argv[1]), sys.argv[2])))

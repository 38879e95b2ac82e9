"""One rank of the test of stages that go on from a moment: each rank has logs and bytes of its own."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.lost import leave
from minillm.ranks import Ranks
from minillm.stage_base import BaseStage
from minillm.text_stages import SkewRklStage
from tests.resume.test_objectives import RISING, STAGES, differs
from tests.resume.toy import Toy

KINDS: dict[str, BaseStage] = {
    "sft": STAGES["sft"],
    "skew": SkewRklStage(**{**RISING, "steps": 3, "student_share": 0.7}),
    "anchored": STAGES["anchored"],
    "held": STAGES["held"],
}


def main(models: Path, rank: str) -> None:
    """Prints, of each kind of stage, from how many moments it went on, what differed, and what the ranks share."""
    folder = models / f"rank-{rank}"
    folder.mkdir()
    toy = Toy(folder, models=models)
    for kind, stage in KINDS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            whole = toy.run(stage)
            found = [differs(toy.run(stage, begin=begin, log=whole.log), whole, begin) for begin in whole.saved]
        shared, own = (alike(of, ranks=toy.ranks) for of in zip(*whole.states, strict=True))
        print(f"rank {rank} {kind}: {len(found)} moments, {sum(found, [])} apart, {shared} shared, {own} own alike")


def alike(mine: Sequence[Any], *, ranks: Ranks) -> int:
    """At how many moments the ranks have the same."""
    return sum(one == other for one, other in zip(*ranks.gather_objects([mine]), strict=True))


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ["RANK"])
    leave(0)  # left to the end of Python, gloo sometimes aborts

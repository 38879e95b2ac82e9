"""One rank of the test of ``minillm diagnose`` on two."""

from __future__ import annotations

import sys
from pathlib import Path

from minillm.config import RunConfig
from minillm.diagnose.command import run
from minillm.lost import leave
from tests import tiny


def config(folder: Path) -> RunConfig:
    """A pair with teacher mixing, and coins that prompts do not share."""
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl",
        teacher_mix=0.3, run_engine={"student": "zero2"},
    )  # fmt: skip


def measure(folder: Path, name: str) -> None:
    """Writes the figures of nine prompts, an odd number, as ``NAME.json``."""
    run(
        config(folder), names=["expected+ridge", "sampled+position_mean+whiten"], prompts=9, samples=4, directions=3,
        seed=0, json_file=folder / f"{name}.json", plot=None,
    )  # fmt: skip


if __name__ == "__main__":
    measure(Path(sys.argv[1]), "two")
    leave(0)  # left to the end of Python, gloo sometimes aborts

"""One rank of the test of a run with a stage that merges."""

from __future__ import annotations

import sys
from pathlib import Path

from minillm import distill
from minillm.lost import leave
from tests.resume.test_starts import config, stage


def run(place: Path, name: str) -> Path:
    """Two students from the run's own, merged, and a stage that goes on from there; all cut over the ranks."""
    merge = {"kind": "merge", "name": "both", "of": ["one", "two"], "start": "student", "eta": 0.5}
    stages = (stage("one"), stage("two", start="student"), merge, stage("last"))
    return distill(config(place, name, *stages, engine={"student": "zero3"}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), "ranks")
    leave(0)  # left to the end of Python, gloo sometimes aborts

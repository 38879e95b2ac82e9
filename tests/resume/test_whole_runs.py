"""Runs that are killed or stopped over and over end as the run that nothing happened to: every line of the log, every
student, every answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm import exits

SAME = ("log", "students", "samples", "left", "state")


def lives(folder: Path, *plans: str, limit_s: float) -> Iterator[dict[str, Any]]:
    """What each plan of ``broken_off`` left."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.resume.broken_off", str(folder), *plans],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=limit_s,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return map(json.loads, result.stdout.splitlines())


def test_killed_and_stopped_runs_end_as_the_unbroken_one(tmp_path: Path) -> None:
    whole, killed, stopped, control = lives(
        tmp_path, "whole", "SIGKILL:1:500", "SIGTERM:2:500", "SIGKILL:1:700:log", limit_s=400
    )
    assert whole["state"] == "done" and whole["codes"] == [0] and whole["left"] == [] and len(whole["students"]) == 3
    for broken in (killed, stopped):
        assert broken["codes"][-1] == 0 and len(broken["codes"]) > 2, broken["codes"]
        assert [name for name in SAME if broken[name] != whole[name]] == []
    assert set(killed["codes"][:-1]) == {-9}
    assert exits.STOPPED in stopped["codes"] and set(stopped["codes"]) <= {0, -15, exits.STOPPED}
    assert control["log"] != whole["log"], "with a log that is not cut back"


@pytest.mark.slow
def test_a_hundred_kills_at_random_points(tmp_path: Path) -> None:
    plans = [f"SIGKILL:{seed}:300" for seed in range(10)] + ["SIGTERM:10:300", "SIGTERM:11:300"]
    whole, *broken = lives(tmp_path, "whole", *plans, limit_s=3000)
    for life in broken:
        assert [name for name in SAME if life[name] != whole[name]] == [], life["codes"]
    assert sum(len(life["codes"]) - 1 for life in broken) >= 100

"""A two-rank run that is killed at a fault point, started again, ends as the unbroken one; ``scripts/faults.sh`` kills
it at all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from minillm import exits

ROOT = Path(__file__).resolve().parents[2]
KILLED_AT = ("0:checkpoint.published step:1", "1:checkpoint.file.synced engine-rank00001.safetensors:3")
CONTROL = "0:checkpoint.agreed:2:log"


def test_a_rank_that_is_killed_at_a_point_changes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign.points", str(tmp_path), "2", *KILLED_AT, CONTROL],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    head, *ended, control = map(json.loads, done.stdout.splitlines())
    print(f"points that ranks 0 and 1 pass: {head['points']}")
    assert head["points"][0] >= 380 and head["points"][1] >= 180
    assert len(ended) == len(KILLED_AT)
    for life in ended:
        assert life["codes"] == [exits.RANK_LOST, exits.DONE] and life["differs"] == [], life
    assert control["differs"] == ["log"], "with a log that is not cut back"

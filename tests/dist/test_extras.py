"""Two real processes measure the exposure bias and calibration that one measures, the teacher whole or sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.extras_worker import PLACEMENTS, ROWS, evaluated, write_inputs
from tests.dist.ranks import start_ranks

CLOSE = 2e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both placements on two ranks in one launch."""
    folder = tmp_path_factory.mktemp("extras")
    write_inputs(folder)
    start_ranks("tests.dist.extras_worker", str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return evaluated(folder, "replicated", out=folder / "one", batch=256)


def flat(value: Any) -> list[float]:
    """All numbers of a nested record, in order."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in flat(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in flat(inner)]
    return [np.nan if value is None else float(value)]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_ranks_measure_what_one_measures(placement: str, folder: Path, alone: dict[str, Any]) -> None:
    two = json.loads((folder / "two" / placement / "results.json").read_text(encoding="utf-8"))
    one, other = (found["exposure"] for found in (alone, two))
    assert one.keys() == other.keys() and one["alive"] == other["alive"]
    assert one["alive"]["student"][0] == 3 * ROWS and one["alive"]["student"][-1] < 3 * ROWS
    for name in ("student_kl", "teacher_kl"):
        np.testing.assert_allclose(one[name], other[name], atol=CLOSE)
    np.testing.assert_allclose(flat(one["ci95"]), flat(other["ci95"]), atol=0.01)
    np.testing.assert_allclose(flat(alone["calibration"]), flat(two["calibration"]), atol=CLOSE)
    assert two["calibration"]["choices"]["answers"] == 3

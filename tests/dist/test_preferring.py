"""Two ranks find the win rate and the pair accuracy of one process, the model on each of them or sharded over both.

Not in a run of every day: ``bash scripts/test.sh -m slow tests/dist/test_preferring.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.preferring_worker import PLACEMENTS, measure, write_inputs
from tests.dist.ranks import start_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferring")
    write_inputs(folder)
    start_ranks("tests.dist.preferring_worker", str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return measure(folder, "replicated", "one")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_rank_has_the_figures_of_one_process(
    folder: Path, alone: dict[str, Any], placement: str, rank: int
) -> None:
    found = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))[placement]
    assert found == pytest.approx(alone, abs=1e-4)
    assert len({round(value, 3) for value in (found["margin"], found["chosen"], found["rejected"])}) == 3


def test_one_rank_writes_the_record_and_a_line_for_each_pair(folder: Path, alone: dict[str, Any]) -> None:
    for placement in PLACEMENTS:
        out = folder / f"{placement}-two"
        assert json.loads((out / "judge.json").read_text(encoding="utf-8"))["win_rate"]["mean"] == alone["win_rate"]
        assert len((out / "judgements.jsonl").read_text(encoding="utf-8").splitlines()) == 5

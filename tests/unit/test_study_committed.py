"""A committed table comes out again: one cell of docs/results/world.md, teacher and student too, made from nothing.

Nine minutes on one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minillm.study import reproduce as module
from minillm.study.config import load_study
from minillm.study.reproduce import hold, reproduce
from minillm.study.table import read_cells

ROOT = Path(__file__).parents[2]
CHEAPEST = "sft", 1


@pytest.mark.slow
def test_a_cell_of_the_world_study_comes_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("docs", "recipes", "students", "teachers", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)  # runs/ is empty here
    made: list[dict[str, Any]] = []

    def kept(*args: Any, **options: Any) -> dict[str, Any]:
        made.append(plain(*args, **options))
        return made[-1]

    plain = module.make
    monkeypatch.setattr(module, "make", kept)
    study = load_study(Path("docs/results/world.yaml"))
    arm, seed = CHEAPEST
    assert reproduce(study, arm, seed)
    cells, _ = read_cells(study)
    assert all(each.holds for each in hold(study, cells[arm][seed], made[0], temperature="1.0"))
    other = hold(study, cells["minillm"][seed], made[0], temperature="1.0")
    assert not all(each.holds for each in other), "the control: the figures of another arm"

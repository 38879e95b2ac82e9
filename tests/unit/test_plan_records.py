"""What the pages on planning say is what was found: the measured cases, and the tables on scaling."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from minillm.bench.plan_cases import cases

ROOT = Path(__file__).resolve().parents[2]
RECORD: dict[str, Any] = json.loads((ROOT / "docs/results/plan_check.json").read_text(encoding="utf-8"))["plan"]
PAGE = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
WITHIN = 0.10


def row(name: str, one: dict[str, Any]) -> str:
    """A line of the page's table."""
    pairs = [f"{one['planned'][phase] >> 20} / {one['measured'][phase] >> 20}" for phase in one["planned"]]
    return f"| {name} | {' | '.join(pairs)} | {one['off']:+.1%} |"


def test_every_case_was_measured(tmp_path: Path) -> None:
    assert list(RECORD["cases"]) == [name for name, _ in cases(tmp_path)]
    assert len(RECORD["cases"]) >= 12


@pytest.mark.parametrize("name", RECORD["cases"])
def test_a_measured_step_took_what_was_planned(name: str) -> None:
    one = RECORD["cases"][name]
    off = max(one["planned"].values()) / max(one["measured"].values()) - 1
    assert abs(off) <= WITHIN and off == pytest.approx(one["off"])
    assert row(name, one) in PAGE


def test_the_tables_on_scaling_are_those_of_the_planner() -> None:
    page, told = (ROOT / "docs/scaling.md").read_text(encoding="utf-8"), io.StringIO()
    with contextlib.redirect_stdout(told):
        runpy.run_path(str(ROOT / "scripts/scaling.py"), run_name="__main__")
    assert told.getvalue().count("\n| ") >= 36 and told.getvalue().strip() in page

"""Pairs on two ranks: any ZeRO stage has the losses of one process, step for step, and so has what is validated."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from minillm import distill
from minillm.run_log import OF_THE_PROCESS
from tests import tiny
from tests.dist import preference_worker
from tests.dist.ranks import start_ranks

VALUES = ("dpo", "tdpo2")
ENGINES = ("zero0", "zero1", "zero2", "zero3")
CELLS = [f"{engine}.{value}" for engine in ENGINES for value in VALUES]
CLOSE = 1e-5
FIRST_LOSS = math.log(2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    preference_worker.write_inputs(folder)
    start_ranks("tests.dist.preference_worker", str(folder), *CELLS)
    for value in VALUES:
        distill(preference_worker.config(folder, f"zero0.{value}").model_copy(update={"name": f"alone.{value}"}))
    return folder


def figures(folder: Path) -> list[dict[str, Any]]:
    """Of every step and validation, without clocks."""
    lines = [*tiny.logged(folder), *tiny.logged(folder, "validation")]
    return [{name: v for name, v in line.items() if name not in OF_THE_PROCESS} for line in lines]


def differ(one: Path, other: Path) -> set[str]:
    """Names of the figures in which two runs are not equal to rounding."""
    found = set()
    for mine, theirs in zip(figures(one), figures(other), strict=True):
        assert set(mine) == set(theirs)
        for name, value in mine.items():
            if isinstance(value, str):
                assert value == theirs[name]
            elif name == "accuracy" and abs(mine["loss"] - FIRST_LOSS) < CLOSE:
                continue  # the student is the reference still, and the sign of what is compared is that of a rounding
            elif not abs(value - theirs[name]) <= CLOSE * max(1.0, abs(value)):
                found.add(name)
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_of_any_stage_have_the_losses_of_one_process(runs: Path, cell: str) -> None:
    value = cell.split(".")[1]
    assert differ(runs / f"alone.{value}", runs / cell) == set()
    lines = figures(runs / cell)
    assert len(lines) == 2 * preference_worker.STEPS + 2
    assert {"loss", "accuracy", "margin", "entropy"} <= set(lines[0]) and "preference_loss" in lines[-1]


def test_another_value_would_be_seen(runs: Path) -> None:
    """The control of the comparison: the same runs, but for what is compared of the pairs."""
    one, other = (figures(runs / f"alone.{value}") for value in VALUES)
    assert abs(one[2]["loss"] - other[2]["loss"]) > 10 * CLOSE

"""Pairs on two ranks: any ZeRO stage has the losses of one process, step for step, and so has what is validated; a run
that is broken off beside a sharded reference goes on to the same bits.

A run of every day has each objective and each ZeRO stage; the other cells of the table take a minute more:
``bash scripts/test.sh -m slow tests/dist/test_preference_stages.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm import distill
from minillm.run_log import OF_THE_PROCESS
from tests import quick, tiny
from tests.dist import preference_worker
from tests.dist.preference_worker import BROKEN_OFF, LONG, OBJECTIVES, STEPS
from tests.dist.ranks import start_ranks

ENGINES = ("zero0", "zero1", "zero2", "zero3")
CELLS = [
    "zero3.dpo", "zero1.tdpo2", "zero3.tdpo2", "zero3.tdpo1", "zero1.ipo", "zero2.hinge", "zero0.robust", "zero2.soft"
]  # fmt: skip
OTHERS = [cell for engine in ENGINES for name in OBJECTIVES if (cell := f"{engine}.{name}") not in CELLS]
AGAIN, AGAIN_TOO = (f"zero3.{objective}.{BROKEN_OFF}" for objective in ("tdpo2", "dpo"))
CLOSE = 1e-5
SAID = "said.txt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    preference_worker.write_inputs(folder)
    said = start_ranks("tests.dist.preference_worker", str(folder), *CELLS, AGAIN)
    (folder / SAID).write_text(said, encoding="utf-8")
    for name in OBJECTIVES:
        with quick.undrawn():
            distill(preference_worker.config(folder, f"zero0.{name}").model_copy(update={"name": f"alone.{name}"}))
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
            elif name == "accuracy" and abs(mine["margin"]) < CLOSE:
                continue  # the student is the reference still, and the sign of what is compared is that of a rounding
            elif not abs(value - theirs[name]) <= CLOSE * max(1.0, abs(value)):
                found.add(name)
    return found


def check_cell(runs: Path, cell: str) -> None:
    objective = cell.split(".")[1]
    assert differ(runs / f"alone.{objective}", runs / cell) == set()
    lines, stages = figures(runs / cell), 2 if objective in LONG else 1
    assert len(lines) == stages * (STEPS + 1)
    assert {"loss", "accuracy", "margin", "entropy"} <= set(lines[0]) and "preference_loss" in lines[-1]


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_of_any_stage_have_the_losses_of_one_process(runs: Path, cell: str) -> None:
    check_cell(runs, cell)


@pytest.mark.slow
def test_so_they_have_in_every_other_cell(runs: Path) -> None:
    said = start_ranks("tests.dist.preference_worker", str(runs), *OTHERS, AGAIN_TOO)
    for cell in OTHERS:
        check_cell(runs, cell)
    check_going_on(runs, AGAIN_TOO, said)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "dpo"])
def test_another_objective_would_be_seen(runs: Path, objective: str) -> None:
    """The control of the comparison: the same runs, but for what is made of the pairs."""
    one, other = (figures(runs / f"alone.{name}") for name in ("dpo", objective))
    assert abs(one[STEPS - 1]["loss"] - other[STEPS - 1]["loss"]) > 10 * CLOSE


def check_going_on(runs: Path, cell: str, said: str) -> None:
    assert f"{cell}: goes on from step 1 of stage two" in said
    whole = runs / cell.removesuffix(f".{BROKEN_OFF}")
    assert figures(runs / cell) == figures(whole)
    weights, wanted = (load_file(run / "student" / "model.safetensors") for run in (runs / cell, whole))
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_run_that_is_broken_off_goes_on_beside_its_sharded_reference(runs: Path) -> None:
    """To the bits of the one that nothing happened to: the reference is the first stage's student, and not the weights
    that the second stage has come to."""
    check_going_on(runs, AGAIN, (runs / SAID).read_text(encoding="utf-8"))

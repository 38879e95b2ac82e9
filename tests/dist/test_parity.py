"""ZeRO parity: where weights live and how many ranks share the work changes no loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm import distill
from tests import tiny
from tests.dist import parity_worker
from tests.dist.ranks import start_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3")
PLACEMENTS = ("replicated", "zero3")
CELLS = [f"{stage}-{placement}" for stage in STAGES for placement in PLACEMENTS]
SAME = ("loss", "single_loss", "long_loss", "lm_loss", "reverse_kl", "tokens", "mean_length", "advantage_std")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells on two ranks in one launch, and the first on one process."""
    folder = tmp_path_factory.mktemp("parity")
    parity_worker.write_inputs(folder)
    start_ranks("tests.dist.parity_worker", str(folder), *CELLS)
    alone = parity_worker.config(folder, "zero0-replicated")
    distill(alone.model_copy(update={"name": "alone"}))
    return folder


def figures(folder: Path, name: str) -> list[dict[str, float]]:
    lines = tiny.logged(folder / name)
    assert len(lines) == parity_worker.STEPS, name
    return [{key: line[key] for key in SAME} for line in lines]


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_of_any_stage_have_the_losses_of_one_process(runs: Path, cell: str) -> None:
    want, got = figures(runs, "alone"), figures(runs, cell)
    for step, (one, two) in enumerate(zip(want, got, strict=True)):
        for key in SAME:
            assert two[key] == pytest.approx(one[key], abs=1e-6, rel=1e-6), (cell, step, key)


def test_another_seed_is_another_run(runs: Path) -> None:
    """Negative control: the figures that are compared above do tell two runs apart."""
    other = parity_worker.config(runs, "zero0-replicated").model_copy(update={"name": "other", "seed": 11})
    distill(other)
    assert figures(runs, "other")[-1]["loss"] != pytest.approx(figures(runs, "alone")[-1]["loss"], rel=1e-4)

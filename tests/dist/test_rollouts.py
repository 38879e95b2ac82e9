"""Two real processes draw, row by row, what one process draws: tokens, both models' hidden states, scores, advantages.

In float64 with a teacher on each rank; with one that is sharded (which DeepSpeed holds in 32 bits) to its rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.ranks import Ranks
from tests.dist import rollout_worker
from tests.dist.ranks import start_ranks
from tests.dist.rollout_worker import LONGEST, ROWS, STREAMED, Spoken, speak, write_inputs

TOLERANCE = {"float64-replicated": 1e-9, "float32-zero3": 1e-4, "float32-offload": 1e-4}
CELLS = [f"{kind}-{mix}" for kind in TOLERANCE for mix in (0.0, 0.2)]
BROKEN = CELLS[0] + STREAMED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells on two ranks in one launch."""
    folder = tmp_path_factory.mktemp("rollouts")
    write_inputs(folder)
    start_ranks("tests.dist.rollout_worker", str(folder), *CELLS, BROKEN)
    return folder


def of_two(folder: Path, cell: str) -> Spoken:
    """What the rows of both ranks said."""
    shares = [torch.load(folder / f"{cell}.{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(shares[0]) + len(shares[1]) == ROWS and min(len(share) for share in shares) >= ROWS // 2 - 1
    return {**shares[0], **shares[1]}


def of_one(folder: Path, cell: str) -> Spoken:
    """The same cell with a teacher that is whole, on this process alone."""
    return speak(folder, cell.replace("zero3", "replicated").replace("offload", "replicated"), Ranks())


def differences(one: dict[str, Any], other: dict[str, Any], *, within: float) -> set[str]:
    assert one.keys() == other.keys()
    return {name for name in one if not _same(one[name], other[name], within)}


def _same(one: Any, other: Any, within: float) -> bool:
    if not isinstance(one, Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.allclose(one, other, rtol=0, atol=within) if one.is_floating_point() else torch.equal(one, other)


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_say_what_one_process_says(folder: Path, cell: str) -> None:
    two, one = of_two(folder, cell), of_one(folder, cell)
    assert two.keys() == one.keys() == {prompt.uid for prompt in rollout_worker.prompts()}
    within = TOLERANCE[cell.rpartition("-")[0]]
    for uid, row in one.items():
        assert differences(two[uid], row, within=within) == set(), uid
        assert str(row["student"].dtype) == f"torch.{cell.partition('-')[0]}"
    lengths = {len(row["ids"]) for row in one.values()}
    assert len(lengths) > 4 and max(lengths) == LONGEST  # rows end at different times
    assert any(bool(row["drew"].any()) for row in one.values()) == (not cell.endswith("0.0"))


def test_random_numbers_of_a_rank_are_seen(folder: Path) -> None:
    """Negative control: with a stream of its own on each rank, rows of the second say something else."""
    broken, one = of_two(folder, BROKEN), of_one(folder, CELLS[0])
    second = torch.load(folder / f"{BROKEN}.1.pt", weights_only=True).keys()
    wrong = {uid for uid, row in one.items() if "ids" in differences(broken[uid], row, within=1e-9)}
    assert wrong <= second and len(wrong) > ROWS // 4

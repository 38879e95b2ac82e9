"""Pairs as the rows of one forward: sums over the tokens of a row have a fixed order on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.preference_reference import Known
from minillm.preferred_rows import PairRows
from minillm.types import PreferencePair, Prompt

LENGTHS = [(3, 1), (2, 7), (1, 1)]
ATOMIC = ("index_add", "scatter_add", "scatter_reduce", "index_reduce", "bincount")
"""Operations that add by atomics on a GPU: the order, and so the last bits, are other ones each time."""


def rows_of(lengths: list[tuple[int, int]]) -> PairRows:
    pairs = [
        PreferencePair(
            prompt=Prompt(uid=str(place), text="", ids=(5, 6)), chosen="", rejected="", chosen_ids=(7,) * chosen,
            rejected_ids=(8,) * rejected, source="", teacher_logps=None,
        )
        for place, (chosen, rejected) in enumerate(lengths)
    ]  # fmt: skip
    known = Known(pairs=pairs, reference=None, soft_targets=None)
    return PairRows.of(known, range(len(pairs)), pad_id=0, device=torch.device("cpu"))


def some(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).requires_grad_()


class Called(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        if "index_put" in func.__name__ and (args[3:4] == (True,) or (kwargs or {}).get("accumulate")):
            self.names.add("scatter_add")
        return func(*args, **(kwargs or {}))


def unordered(sum_rows: Callable[[Tensor], Tensor], value_N: Tensor) -> list[str]:
    """Operations without a fixed order, in the sums and in their gradient."""
    with Called() as called:
        (sum_rows(value_N) ** 2).sum().backward()
    assert called.names
    return sorted(name for name in called.names if name.startswith(ATOMIC))


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1]])
def test_each_row_has_the_sum_over_its_own_tokens(lengths: list[tuple[int, int]]) -> None:
    rows = rows_of(lengths)
    sizes = [*(chosen for chosen, _ in lengths), *(rejected for _, rejected in lengths)]
    value_N = some(sum(sizes))
    sum_R = rows.by_row(value_N)
    twin = [float(part.double().sum()) for part in value_N.detach().split(sizes)]
    assert sum_R.dtype == torch.float64 and sum_R.tolist() == pytest.approx(twin, rel=1e-14)
    (slope_N,) = torch.autograd.grad((sum_R * torch.arange(len(sizes))).sum(), value_N)
    assert slope_N.tolist() == [float(row) for row, size in enumerate(sizes) for _ in range(size)]


def test_no_pair_is_no_row_and_leads_back_to_the_numbers() -> None:
    value_N = some(0)
    sum_R = rows_of([]).by_row(value_N)
    assert sum_R.shape == (0,) and sum_R.requires_grad


def test_the_sums_have_a_fixed_order_on_any_device() -> None:
    rows = rows_of(LENGTHS)
    count = sum(map(sum, LENGTHS))
    assert unordered(rows.by_row, some(count)) == []
    # The control: adding by the row of each token is seen.
    row_N = torch.arange(len(rows.tokens_R)).repeat_interleave(rows.tokens_R)
    zero_R = torch.zeros(len(rows.tokens_R), dtype=torch.float64)
    assert unordered(lambda value_N: zero_R.index_add(0, row_N, value_N.double()), some(count)) == ["index_add.default"]

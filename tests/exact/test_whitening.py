"""Whitening over kept tokens, and GRPO's scores: golden numbers, and what no scale or padding may change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.credit import group_scores, whitened, whole_return
from minillm.errors import ShapeMismatch
from tests.exact.tabular import assert_close


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def random_rows(seed: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    value_BT = torch.randn(6, 9, generator=noise, dtype=torch.float64)
    return value_BT, torch.arange(9) < torch.randint(0, 10, (6, 1), generator=noise)


def test_golden_whitening_ignores_padding() -> None:
    """(2, 2.5, 3) with five pads: (-1.2247, 0, 1.2247); over the padding it would be (0.8597, 1.2643, 1.6689)."""
    value_BT = row(2.0, 2.5, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    mask_BT = torch.arange(8)[None] < 3
    got_BT = whitened(value_BT, mask_BT)
    assert_close(got_BT[:, :3], row(-1.2247448714, 0.0, 1.2247448714), atol=1e-9)
    assert torch.equal(got_BT[:, 3:], torch.zeros(1, 5, dtype=torch.float64))
    over_pads_BT = (value_BT - value_BT.mean()) / value_BT.std(correction=0)
    assert_close(over_pads_BT[:, :3], row(0.8597, 1.2643, 1.6689), atol=5e-5)


@pytest.mark.parametrize("seed", range(5))
def test_kept_tokens_have_mean_zero_and_variance_one(seed: int) -> None:
    value_BT, mask_BT = random_rows(seed)
    kept_N = whitened(torch.where(mask_BT, value_BT, torch.nan), mask_BT)[mask_BT]
    assert float(kept_N.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(kept_N.square().mean()) == pytest.approx(1.0, abs=1e-12)
    for scale in (1e-6, 3.0, 1e6):
        assert_close(whitened(scale * value_BT, mask_BT)[mask_BT], kept_N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_varies_the_result_is_zero(dtype: torch.dtype) -> None:
    for value_BT, mask_BT in (
        (torch.full((3, 4), 0.1, dtype=dtype), torch.ones(3, 4, dtype=torch.bool)),
        (torch.full((1, 4), 0.1, dtype=dtype), torch.arange(4)[None] < 1),
        (torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=torch.bool)),
        (torch.zeros(0, 3, dtype=dtype), torch.zeros(0, 3, dtype=torch.bool)),
    ):
        assert torch.equal(whitened(value_BT, mask_BT), torch.zeros_like(value_BT))


def test_ranks_whiten_together() -> None:
    """Each rank hears the sums over all rows and adds its own: the halves are then those of the whole."""
    value_BT, mask_BT = random_rows(7)
    heard: list[Tensor] = []
    added: list[list[Tensor]] = [[], []]

    def over_all(sums: Tensor) -> Tensor:
        heard.append(sums)
        return sums

    want_BT = whitened(value_BT, mask_BT, total=over_all)
    for mine, rows in zip(added, (slice(0, 2), slice(2, 6)), strict=True):

        def reply(sums: Tensor, mine: list[Tensor] = mine) -> Tensor:
            mine.append(sums)
            return heard[len(mine) - 1]

        assert_close(whitened(value_BT[rows], mask_BT[rows], total=reply), want_BT[rows])
    for first, second, whole in zip(*added, heard, strict=True):
        assert_close(first + second, whole)
    with pytest.raises(AssertionError):  # negative control: each rank for itself
        assert_close(whitened(value_BT[:2], mask_BT[:2]), want_BT[:2])


def scores(*values: float, prompts: tuple[int, ...] | None = None) -> Tensor:
    value_B = torch.tensor(values, dtype=torch.float64)
    prompt_B = torch.tensor(prompts or (0,) * len(values))
    return group_scores(value_B, prompt_B=prompt_B, value_A=value_B, prompt_A=prompt_B)


def test_golden_group_scores() -> None:
    third = -1.0 / 3.0**0.5
    assert_close(scores(1.0, 0.0, 0.0, 0.0), torch.tensor([3.0**0.5, third, third, third], dtype=torch.float64))
    assert_close(scores(1.0, 0.0, 0.0, 1.0), torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    assert torch.equal(scores(0.1, 0.1, 0.1), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(scores(5.0, 7.0, prompts=(0, 1)), torch.zeros(2, dtype=torch.float64))


def test_group_scores_forget_scale_and_level_and_sum_to_zero() -> None:
    values = (0.3, -2.0, 1.1, 7.0, 7.5)
    prompts = (0, 0, 0, 1, 1)
    want_B = scores(*values, prompts=prompts)
    assert_close(scores(*(3.0 * value - 4.0 for value in values), prompts=prompts), want_B)
    assert float(want_B[:3].sum()) == pytest.approx(0.0, abs=1e-12)
    assert float(want_B[3:].sum()) == pytest.approx(0.0, abs=1e-12)


def test_a_whole_return_stands_at_every_kept_token() -> None:
    reward_BT = torch.tensor([[1.0, 2.0, torch.nan], [4.0, 5.0, 6.0]])
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    assert whole_return(reward_BT, mask_BT).tolist() == [[3.0, 3.0, 0.0], [15.0, 15.0, 15.0]]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match="mask of the values"):
        whitened(row(1.0, 2.0), torch.ones(1, 3, dtype=torch.bool))

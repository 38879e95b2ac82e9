"""Returns: golden numbers, the double sum as a slow twin, and masks of every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.credit import future_return, return_to_go
from minillm.errors import ShapeMismatch
from tests.exact.tabular import assert_close

Return = Callable[..., Tensor]


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def all_kept(reward_BT: Tensor) -> Tensor:
    return torch.ones_like(reward_BT, dtype=torch.bool)


def double_sum(
    reward_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float,
    per_token: bool,
    first: int,
    horizon: int | None = None,
    carry_BT: Tensor | None = None,
) -> Tensor:
    """The definition: the rewards of the kept tokens ``first`` or more kept steps ahead, one by one."""
    result_BT = torch.zeros_like(reward_BT)
    for b in range(len(reward_BT)):
        kept = mask_BT[b].nonzero()[:, 0].tolist()
        for i, t in enumerate(kept):
            ahead = kept[i + first :][:horizon]
            share = [gamma**k for k in range(len(ahead))]
            carried = [1.0 if carry_BT is None else float(carry_BT[b, ahead[:k]].prod()) for k in range(len(ahead))]
            terms = zip(share, carried, ahead, strict=True)
            total = sum(g * c * float(reward_BT[b, s]) for g, c, s in terms)
            result_BT[b, t] = total / sum(share) if per_token and share else total
    return result_BT


def ragged(case: int) -> tuple[Tensor, Tensor]:
    """Random rewards under a random mask: holes, left padding, empty rows and full rows all occur."""
    noise = torch.Generator().manual_seed(case)
    reward_BT = torch.randn(5, 7, generator=noise, dtype=torch.float64)
    share_B1 = torch.rand(5, 1, generator=noise)
    share_B1[0], share_B1[1] = 0.0, 1.1
    return reward_BT, torch.rand(5, 7, generator=noise) < share_B1


CASES = [(case, gamma, per_token) for case in range(20) for gamma in (1.0, 0.9, 0.0) for per_token in (False, True)]


def agree(function: Return, first: int) -> None:
    for case, gamma, per_token in CASES:
        reward_BT, mask_BT = ragged(case)
        want_BT = double_sum(reward_BT, mask_BT, gamma=gamma, per_token=per_token, first=first)
        assert_close(function(reward_BT, mask_BT, gamma=gamma, per_token=per_token), want_BT)


def test_future_return_is_the_double_sum() -> None:
    agree(future_return, first=1)


@pytest.mark.parametrize("horizon", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("carried", [False, True])
def test_horizon_and_weights_are_those_of_the_double_sum(horizon: int, carried: bool) -> None:
    for case, gamma, per_token in CASES:
        reward_BT, mask_BT = ragged(case)
        carry_BT = reward_BT.flip(0).abs() if carried else None
        settings: dict[str, Any] = {
            "gamma": gamma, "per_token": per_token, "horizon": horizon, "carry_BT": carry_BT
        }  # fmt: skip
        want_BT = double_sum(reward_BT, mask_BT, first=1, **settings)
        assert_close(future_return(reward_BT, mask_BT, **settings), want_BT)


@pytest.mark.parametrize("horizon", [1, 3, None])
@pytest.mark.parametrize("carried", [False, True])
def test_return_to_go_weighs_and_cuts_off_what_comes_after(horizon: int | None, carried: bool) -> None:
    """The present reward as it is; each later one times the weights up to its own token."""
    for case, gamma, per_token in CASES:
        reward_BT, mask_BT = ragged(case)
        carry_BT = reward_BT.flip(0).abs() if carried else None
        got_BT = return_to_go(
            reward_BT, mask_BT, gamma=gamma, per_token=per_token, horizon=horizon, carry_BT=carry_BT
        )  # fmt: skip
        for b, t in mask_BT.nonzero().tolist():
            ahead = [s for s in mask_BT[b].nonzero()[:, 0].tolist() if s > t][:horizon]
            weight, total, count = 1.0, float(reward_BT[b, t]), 1.0
            for k, s in enumerate(ahead, start=1):
                weight *= 1.0 if carry_BT is None else float(carry_BT[b, s])
                total, count = total + gamma**k * weight * float(reward_BT[b, s]), count + gamma**k
            assert float(got_BT[b, t]) == pytest.approx(total / count if per_token else total, abs=1e-12)
        assert not bool(got_BT[~mask_BT].any())


def test_a_horizon_by_position_instead_of_kept_tokens_is_noticed() -> None:
    """Negative control: differences of two unlimited returns, ``horizon`` positions apart, over a mask with holes."""
    reward_BT, mask_BT = ragged(5)
    whole_BT = future_return(reward_BT, mask_BT)
    by_position_BT = torch.where(mask_BT, whole_BT - torch.nn.functional.pad(whole_BT, (0, 2))[:, 2:], 0.0)
    with pytest.raises(AssertionError):
        assert_close(by_position_BT, future_return(reward_BT, mask_BT, horizon=2))


def test_a_long_horizon_is_none_at_all() -> None:
    reward_BT, mask_BT = ragged(6)
    assert torch.equal(future_return(reward_BT, mask_BT, horizon=7), future_return(reward_BT, mask_BT))


def test_return_to_go_is_the_double_sum() -> None:
    agree(return_to_go, first=0)


@pytest.mark.parametrize("first", [0, 1])
def test_discount_by_absolute_index_is_noticed(first: int) -> None:
    """Negative control: gamma^t times the return, as one published trainer has it."""

    def by_index(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float, per_token: bool) -> Tensor:
        del per_token
        share_T = gamma ** torch.arange(reward_BT.shape[1], dtype=torch.float64)
        tail_BT = (torch.where(mask_BT, reward_BT, 0.0) * share_T).flip(1).cumsum(1).flip(1)
        return torch.where(mask_BT, tail_BT - first * reward_BT * share_T, 0.0)

    with pytest.raises(AssertionError):
        agree(by_index, first=first)


def test_golden_returns() -> None:
    reward_BT = row(1.0, 2.0, 3.0)
    mask_BT = all_kept(reward_BT)
    assert_close(future_return(reward_BT, mask_BT), row(5.0, 3.0, 0.0))
    assert_close(future_return(reward_BT, mask_BT, per_token=True), row(2.5, 3.0, 0.0))
    assert_close(future_return(reward_BT, mask_BT, gamma=0.95), row(4.85, 3.0, 0.0))
    assert_close(future_return(reward_BT, mask_BT, gamma=0.95, per_token=True), row(4.85 / 1.95, 3.0, 0.0))
    assert_close(return_to_go(reward_BT, mask_BT), row(6.0, 5.0, 3.0))
    assert_close(return_to_go(reward_BT, mask_BT, per_token=True), row(2.0, 2.5, 3.0))
    assert_close(return_to_go(reward_BT, mask_BT, gamma=0.95), row(5.6075, 4.85, 3.0))
    got_BT = return_to_go(reward_BT, mask_BT, gamma=0.95, per_token=True)
    assert_close(got_BT, row(1.965820, 2.487179, 3.0), atol=1e-6)


def test_discounted_sum_over_plain_count_is_noticed() -> None:
    """Negative control: the official code divides a discounted sum by an undiscounted count; another number."""
    reward_BT = row(1.0, 2.0, 3.0)
    official_BT = return_to_go(reward_BT, all_kept(reward_BT), gamma=0.95) / row(3.0, 2.0, 1.0)
    assert_close(official_BT, row(1.869167, 2.425, 3.0), atol=1e-6)
    with pytest.raises(AssertionError):
        assert_close(official_BT, return_to_go(reward_BT, all_kept(reward_BT), gamma=0.95, per_token=True), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1.0, 0.95, 0.9])
def test_constant_reward_gives_a_constant_normalised_return(gamma: float, dtype: torch.dtype) -> None:
    """Over 1,100 tokens: in float32 a weight gamma^t would have become 0 and its quotient NaN."""
    reward_BT = torch.full((1, 1100), -1.0, dtype=dtype)
    got_BT = return_to_go(reward_BT, all_kept(reward_BT), gamma=gamma, per_token=True)
    torch.testing.assert_close(got_BT, reward_BT, rtol=0, atol=1e-5)
    ahead_BT = future_return(reward_BT, all_kept(reward_BT), gamma=gamma, per_token=True)
    torch.testing.assert_close(ahead_BT[:, :-1], reward_BT[:, :-1], rtol=0, atol=1e-5)
    assert float(ahead_BT[0, -1]) == 0.0


def test_official_normalisation_lets_early_tokens_fade() -> None:
    """Negative control: -1 everywhere becomes -0.0781 with 256 tokens to go."""
    reward_BT = torch.full((1, 256), -1.0, dtype=torch.float64)
    official = float(return_to_go(reward_BT, all_kept(reward_BT), gamma=0.95)[0, 0]) / 256
    assert official == pytest.approx(-0.0781, abs=5e-5)


@pytest.mark.parametrize("function", [future_return, return_to_go])
@pytest.mark.parametrize("per_token", [False, True])
def test_padding_and_what_lies_under_it_change_nothing(function: Return, per_token: bool) -> None:
    reward_BT, _ = ragged(3)
    mask_BT = torch.arange(7) < torch.tensor([7, 5, 3, 1, 0])[:, None]
    want_BT = function(reward_BT, mask_BT, gamma=0.9, per_token=per_token)
    wide_BT = torch.cat([torch.where(mask_BT, reward_BT, torch.nan), torch.full((5, 4), torch.inf).double()], dim=1)
    wide_mask_BT = torch.cat([mask_BT, torch.zeros(5, 4, dtype=torch.bool)], dim=1)
    got_BT = function(wide_BT, wide_mask_BT, gamma=0.9, per_token=per_token)
    assert torch.equal(got_BT[:, :7], want_BT)
    assert torch.equal(got_BT[:, 7:], torch.zeros(5, 4, dtype=torch.float64))


def test_padding_that_counts_is_noticed() -> None:
    """Negative control: a mask that is true everywhere lets the padding's value into the returns."""
    reward_BT = row(1.0, 2.0, 3.0, 7.0, 7.0)
    mask_BT = torch.tensor([[True, True, True, False, False]])
    assert_close(future_return(reward_BT, mask_BT), row(5.0, 3.0, 0.0, 0.0, 0.0))
    with pytest.raises(AssertionError):
        assert_close(future_return(reward_BT, all_kept(reward_BT)), row(5.0, 3.0, 0.0, 0.0, 0.0))


def test_inputs_are_not_written_to() -> None:
    reward_BT, mask_BT = ragged(4)
    before_BT, before_mask_BT = reward_BT.clone(), mask_BT.clone()
    once_BT = future_return(reward_BT, mask_BT)
    assert torch.equal(future_return(reward_BT, mask_BT), once_BT)
    assert torch.equal(reward_BT, before_BT) and torch.equal(mask_BT, before_mask_BT)


@pytest.mark.parametrize("function", [future_return, return_to_go])
def test_a_mask_of_another_shape_is_refused(function: Return) -> None:
    with pytest.raises(ShapeMismatch, match="mask of the rewards"):
        function(row(1.0, 2.0), torch.ones(1, 3, dtype=torch.bool))

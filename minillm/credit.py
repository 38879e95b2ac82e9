"""Credit: from the rewards of a rollout to detached advantages.

Legend: B rows that get an advantage, A rows that may serve as their baseline (all ranks' rows), T response positions.
Everything here runs without gradient: an advantage is a number, not a function of the weights.

The decomposition (Gu et al. 2024, eq. 3): the gradient of KL(student || teacher) is the exact per-state KL gradient
(the *single-step* term, see ``divergences.reverse_kl``) plus ``-sum_t R_{t+1} grad log q(y_t)``, where the return
starts at the *next* token. Counting the present reward in both places inflates the gradient (docs/methods/minillm.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.types import require_shape


@torch.no_grad()
def future_return(
    reward_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    per_token: bool = False,
    horizon: int | None = None,
    carry_BT: Tensor | None = None,
) -> Tensor:
    """Discounted reward of the tokens *after* each kept token, [B, T]; 0 for the last one and off the mask.

    ``r_{t+1} + gamma r_{t+2} + ...``, of the next ``horizon`` tokens or of all. ``per_token`` divides by the discounted
    number of those tokens (sum of gamma^k, so that a constant reward gives a constant return); the last token's empty
    sum stays 0. ``carry_BT`` multiplies, at each token, what comes after it: under teacher mixing the importance weight
    of the token, without which the rewards behind it are those of another distribution. Padding is skipped, not summed.
    """
    require_shape("mask of the rewards", mask_BT, tuple(reward_BT.shape))
    if carry_BT is not None:
        require_shape("weights of what comes after", carry_BT, tuple(reward_BT.shape))
    future_BT = torch.zeros_like(reward_BT)
    # Column k sums the next k + 1 tokens at most; without a horizon one column sums them all. Sums of their own and not
    # differences of two long ones, which would cancel.
    rows, width = reward_BT.shape
    total_BK = reward_BT.new_zeros(rows, min(horizon or 1, max(width, 1)))
    weight_BK = torch.zeros_like(total_BK)
    # A recurrence, not gamma**t: in float32 0.9**987 is 0 and a normalised tail becomes 0/0.
    for t in reversed(range(width)):
        future_BT[:, t] = (total_BK / weight_BK.clamp(min=1.0) if per_token else total_BK)[:, -1]
        kept_B1, reward_B1 = mask_BT[:, t, None], reward_BT[:, t, None]
        beyond_BK = _shorter(total_BK) if horizon else total_BK
        if carry_BT is not None:
            beyond_BK = carry_BT[:, t, None] * beyond_BK
        total_BK = torch.where(kept_B1, reward_B1 + gamma * beyond_BK, total_BK)
        weight_BK = torch.where(kept_B1, 1.0 + gamma * (_shorter(weight_BK) if horizon else weight_BK), weight_BK)
    return torch.where(mask_BT, future_BT, 0.0)


@torch.no_grad()
def return_to_go(
    reward_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    per_token: bool = False,
    horizon: int | None = None,
    carry_BT: Tensor | None = None,
) -> Tensor:
    """Discounted reward from each kept token *on*, itself included, [B, T]; 0 off the mask.

    The plain policy gradient's return (Gu et al. 2024, eq. 2): right by itself and for rewards of which the single-step
    term knows nothing, wrong for the teacher's beside it. ``horizon`` and ``carry_BT`` as in ``future_return``, and
    the carry weighs each later reward as its token's own doing; the present one's weight is the advantage's.
    """
    require_shape("mask of the rewards", mask_BT, tuple(reward_BT.shape))
    later_BT = reward_BT if carry_BT is None else reward_BT * carry_BT
    ahead_BT = future_return(later_BT, mask_BT, gamma=gamma, horizon=horizon, carry_BT=carry_BT)
    total_BT = reward_BT + gamma * ahead_BT
    if per_token:
        count_BT = 1.0 + gamma * future_return(torch.ones_like(reward_BT), mask_BT, gamma=gamma, horizon=horizon)
        total_BT = total_BT / count_BT
    return torch.where(mask_BT, total_BT, 0.0)


@torch.no_grad()
def whole_return(reward_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The reward of a whole response at each of its kept tokens, [B, T]; 0 off the mask."""
    require_shape("mask of the rewards", mask_BT, tuple(reward_BT.shape))
    total_B1 = torch.where(mask_BT, reward_BT, 0.0).sum(dim=1, keepdim=True)
    return torch.where(mask_BT, total_B1, 0.0)


@torch.no_grad()
def whitened_with_padding(
    value_BT: Tensor, mask_BT: Tensor, *, longest: int, total: Callable[[Tensor], Tensor] = lambda mine: mine
) -> Tensor:
    """As ``whitened``, but over B x ``longest`` places of which those without a token count as 0 (the published code).

    So the mean is too near 0 where rows are short: most of a level that all tokens share stays, and how much depends on
    ``longest`` and on batch mates. 1e-8 is added to the variance, as there.
    """
    kept_BT = torch.where(mask_BT, value_BT, 0.0).double()
    places, sum_, square = total(
        torch.stack([kept_BT.new_tensor(float(len(kept_BT) * longest)), kept_BT.sum(), kept_BT.square().sum()])
    )
    mean = sum_ / places.clamp(min=1.0)
    variance = square / places.clamp(min=1.0) - mean.square()
    return torch.where(mask_BT, (kept_BT - mean) / (variance + 1e-8).sqrt(), 0.0).to(value_BT.dtype)


@torch.no_grad()
def group_scores(value_B: Tensor, *, prompt_B: Tensor, value_A: Tensor, prompt_A: Tensor) -> Tensor:
    """Each row's value less its group's mean, over its group's standard deviation (of the population), [B].

    GRPO's advantage (Shao et al. 2024): a group is the rows of one prompt, the row itself included. 0 where the group
    does not vary. It bends the gradient: a row is part of its own mean, and dividing by the spread weighs prompts
    by how little their responses differ, so that the advantage does not shrink as student and teacher agree. Beside a
    reward at every token it also throws away which token earned what (docs/methods/minillm.md has the measurement).
    """
    same_BA = prompt_B[:, None] == prompt_A[None, :]
    count_B = same_BA.sum(dim=1).clamp(min=1)
    mean_B = torch.where(same_BA, value_A, 0.0).sum(dim=1) / count_B
    apart_BA = torch.where(same_BA, value_A[None, :] - mean_B[:, None], 0.0)
    spread_B = (apart_BA.square().sum(dim=1) / count_B).sqrt()
    largest_B = torch.where(same_BA, value_A.abs(), 0.0).amax(dim=1)
    return torch.where(_varies(spread_B, largest_B), (value_B - mean_B) / spread_B, 0.0)


@torch.no_grad()
def whitened(value_BT: Tensor, mask_BT: Tensor, *, total: Callable[[Tensor], Tensor] = lambda mine: mine) -> Tensor:
    """Values less their mean, over their standard deviation (of the population), of the kept tokens only, [B, T].

    ``total`` sums over ranks. 0 off the mask, and throughout where values do not vary. It bends the gradient: the
    mean holds each token's own value, and the divisor is made of what was sampled. Multiplying every reward by one
    positive number changes nothing, so the step no longer shrinks as student and teacher agree.
    """
    require_shape("mask of the values", mask_BT, tuple(value_BT.shape))
    kept_BT = torch.where(mask_BT, value_BT, 0.0).double()
    count, sum_ = total(torch.stack([mask_BT.sum().double(), kept_BT.sum()]))
    mean = sum_ / count.clamp(min=1.0)
    apart_BT = torch.where(mask_BT, kept_BT - mean, 0.0)
    square, size = total(torch.stack([apart_BT.square().sum(), kept_BT.abs().sum()]))
    spread = (square / count.clamp(min=1.0)).sqrt()
    scaled_BT = apart_BT / spread
    return torch.where(mask_BT & _varies(spread, size / count.clamp(min=1.0)), scaled_BT, 0.0).to(value_BT.dtype)


def peers(
    kind: str,
    *,
    prompt_B: Tensor,
    row_B: Tensor,
    prompt_A: Tensor,
    row_A: Tensor,
    coin_group_B: Tensor | None = None,
    coin_group_A: Tensor | None = None,
) -> Tensor:
    """Which of the A rows may serve as a baseline for each of the B rows, bool [B, A].

    ``position_mean``: rows of other prompts. ``leave_one_out``: other samples of the same prompt. Row numbers are
    global, so that a row never serves itself. ``group_mean`` is all samples of the prompt, the row itself included,
    which shrinks the policy gradient: of G samples by 1 / G where all are as long. With coin groups given, rows that
    share this row's coins are left out too: under a shared coin and weights q/m such a baseline is not independent of
    the token (design D5); with ``importance: coin`` it is, and no groups need be given.
    """
    same_prompt_BA = prompt_B[:, None] == prompt_A[None, :]
    other_row_BA = row_B[:, None] != row_A[None, :]
    if kind == "position_mean":
        allowed_BA = ~same_prompt_BA
    elif kind == "leave_one_out":
        allowed_BA = same_prompt_BA & other_row_BA
    elif kind == "group_mean":
        allowed_BA = same_prompt_BA
    else:
        raise AssertionError(f"unknown baseline {kind!r}")
    assert (coin_group_B is None) == (coin_group_A is None), "coin groups of one side only would be ignored"
    if coin_group_B is not None and coin_group_A is not None:
        allowed_BA = allowed_BA & (coin_group_B[:, None] != coin_group_A[None, :])
    return allowed_BA


@torch.no_grad()
def position_baseline(value_AT: Tensor, mask_AT: Tensor, allowed_BA: Tensor) -> Tensor:
    """Mean of ``value`` at each position over the allowed rows that are still alive there, [B, T].

    0 where no allowed row is left. A row's baseline depends on other rows only, so it leaves the expectation of
    the policy gradient untouched as long as those rows are independent of this row's token (see ``peers``).
    """
    require_shape("rows that may serve", allowed_BA, (allowed_BA.shape[0], value_AT.shape[0]))
    allowed_BA = allowed_BA.to(value_AT.dtype)
    alive_AT = mask_AT.to(value_AT.dtype)
    return (allowed_BA @ torch.where(mask_AT, value_AT, 0.0)) / (allowed_BA @ alive_AT).clamp(min=1.0)


def _varies(spread: Tensor, size: Tensor) -> Tensor:
    """Whether a standard deviation is more than the rounding of equal values of this size."""
    return spread > 8.0 * torch.finfo(spread.dtype).eps * size


def _shorter(total_BK: Tensor) -> Tensor:
    """Sums over one token less: column k holds what column k - 1 held."""
    return torch.cat([torch.zeros_like(total_BK[:, :1]), total_BK[:, :-1]], dim=1)

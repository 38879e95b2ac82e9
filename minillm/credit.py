"""Credit: from the rewards of a rollout to detached advantages.

Legend: B rows that get an advantage, A rows that may serve as their baseline (all ranks' rows), T response positions.
Everything here runs without gradient: an advantage is a number, not a function of the weights.

The decomposition (Gu et al. 2024, eq. 3): the gradient of KL(student || teacher) is the exact per-state KL gradient
(the *single-step* term, see ``divergences.reverse_kl``) plus ``-sum_t R_{t+1} grad log q(y_t)``, where the return
starts at the *next* token. Counting the present reward in both places inflates the gradient (docs/methods/minillm.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.types import require_shape


@torch.no_grad()
def future_return(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, per_token: bool = False) -> Tensor:
    """Discounted reward of the tokens *after* each kept token, [B, T]; 0 for the last one and off the mask.

    ``per_token`` divides by the discounted number of those tokens (sum of gamma^k, so that a constant reward gives a
    constant return); the last token's empty sum stays 0. Padding is skipped, not summed.
    """
    require_shape("mask of the rewards", mask_BT, tuple(reward_BT.shape))
    future_BT = torch.zeros_like(reward_BT)
    total_B = reward_BT.new_zeros(reward_BT.shape[0])
    weight_B = torch.zeros_like(total_B)
    # A recurrence, not gamma**t: in float32 0.9**987 is 0 and a normalised tail becomes 0/0.
    for t in reversed(range(reward_BT.shape[1])):
        future_BT[:, t] = total_B / weight_B.clamp(min=1.0) if per_token else total_B
        kept_B = mask_BT[:, t]
        total_B = torch.where(kept_B, reward_BT[:, t] + gamma * total_B, total_B)
        weight_B = torch.where(kept_B, 1.0 + gamma * weight_B, weight_B)
    return torch.where(mask_BT, future_BT, 0.0)


@torch.no_grad()
def return_to_go(reward_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, per_token: bool = False) -> Tensor:
    """Discounted reward from each kept token *on*, itself included, [B, T]; 0 off the mask.

    The plain policy gradient's return (Gu et al. 2024, eq. 2): right by itself, wrong beside the single-step term.
    """
    require_shape("mask of the rewards", mask_BT, tuple(reward_BT.shape))
    total_BT = reward_BT + gamma * future_return(reward_BT, mask_BT, gamma=gamma)
    if per_token:
        count_BT = 1.0 + gamma * future_return(torch.ones_like(reward_BT), mask_BT, gamma=gamma)
        total_BT = total_BT / count_BT
    return torch.where(mask_BT, total_BT, 0.0)


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
    global, so that a row never serves itself. With coin groups given, rows that share this row's coins are left out
    too: under a shared coin and weights q/m such a baseline is not independent of the token (design D5); with
    ``importance: coin`` it is, and no groups need be given.
    """
    same_prompt_BA = prompt_B[:, None] == prompt_A[None, :]
    other_row_BA = row_B[:, None] != row_A[None, :]
    if kind == "position_mean":
        allowed_BA = ~same_prompt_BA
    elif kind == "leave_one_out":
        allowed_BA = same_prompt_BA & other_row_BA
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

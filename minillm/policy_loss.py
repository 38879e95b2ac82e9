"""The policy-gradient part of the objective: importance weights, and the clipped surrogate.

Legend: B sequences, T response positions. ``logq_new`` carries the gradient; ``logq_old`` is the student as it
sampled, ``logp`` the teacher. Weights say how a token was drawn, the ratio q_new / q_old says how far the student has
moved since: the PPO clip acts on the second only and weights multiply outside it (design D6). Clipping ratio times
weight, as the paper's Algorithm 1 has it, deletes gradient at the very first update (docs/methods/minillm.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.types import require_shape


@torch.no_grad()
def importance_weights(
    kind: str,
    *,
    logq_BT: Tensor,
    logp_BT: Tensor,
    teacher_drew_BT: Tensor,
    teacher_mix: float,
    max_log_ratio: float,
    cap: float | None = None,
) -> Tensor:
    """Weight of each token under teacher mixing ``m = (1 - a) q + a p``, [B, T].

    ``none``: 1, a bias of its own at a > 0. ``per_step``: q(y_t) / m(y_t), between 0 and 1 / (1 - a), mean 1 under m
    (Gu et al. 2024, after eq. 5). ``coin``: 1 / (1 - a) where the student drew and 0 where the teacher did; also mean
    1, and any function of coins and of other rows is a valid baseline (design D5). At a = 0 each of them is exactly
    1. None corrects the distribution of *prefixes*: that needs the product over past tokens (``running_products``), for
    which ``per_decision`` gives the weights q / m, and ``truncated`` those at most ``cap`` (as V-trace does, Espeholt
    et al. 2018): products then grow less, and the gradient is biased.
    ``max_log_ratio`` = c clamps log p - log q (nats) so that ``exp`` cannot overflow; it moves a weight by less than
    e^-c / a where the teacher's probability is the larger, and a e^-c / (1 - a)^2 where it is the smaller. Off the
    mask a weight means nothing.
    """
    if kind == "none" or teacher_mix == 0.0:
        return torch.ones_like(logq_BT)
    if kind in {"per_step", "per_decision", "truncated"}:
        log_ratio_BT = (logp_BT - logq_BT).clamp(-max_log_ratio, max_log_ratio)
        weight_BT = 1.0 / ((1.0 - teacher_mix) + teacher_mix * log_ratio_BT.exp())
        assert (cap is not None) == (kind == "truncated"), (kind, cap)
        return weight_BT.clamp(max=cap) if kind == "truncated" else weight_BT
    assert kind == "coin" and teacher_mix < 1.0, (kind, teacher_mix)
    return torch.full_like(logq_BT, 1.0 / (1.0 - teacher_mix)).masked_fill(teacher_drew_BT, 0.0)


@torch.no_grad()
def running_products(weight_BT: Tensor, mask_BT: Tensor, *, max_log: float) -> tuple[Tensor, Tensor]:
    """Products of the weights *before* each kept token and *up to* it, both [B, T]; 1 and 1 off the mask.

    The first belongs to what is known before a token is drawn, the second to the token. Their logarithms are held
    within +-``max_log`` nats, as those of ratios are.
    """
    log_BT = torch.where(mask_BT, weight_BT.double().log(), 0.0)
    upto_BT = log_BT.cumsum(dim=1)
    before_BT = upto_BT - log_BT
    return tuple(  # type: ignore[return-value]
        torch.where(mask_BT, of.clamp(-max_log, max_log).exp(), 1.0).to(weight_BT.dtype) for of in (before_BT, upto_BT)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """Loss per token (its gradient is the policy gradient), two shares to watch, each bool per token, and how far the
    student has moved: an estimate of KL(q_old || q_new) per token, never below 0 (k3, Schulman 2020)."""

    loss: Tensor
    clipped: Tensor
    clamped: Tensor
    drift: Tensor


def clipped_surrogate(
    logq_new: Tensor,
    logq_old: Tensor,
    *,
    advantage: Tensor,
    importance: Tensor,
    clip: float | None,
    max_log_ratio: float,
    dual_clip: float | None = None,
    weight_in_clip: bool = False,
) -> Surrogate:
    """``-w min(ratio A, clip(ratio) A)`` for each token, any shape (PPO, Schulman et al. 2017, eq. 7; w outside the
    clip).

    ``clip`` is the half-width of the trusted band around ratio 1, or None for the plain importance-weighted gradient.
    ``weight_in_clip`` clips ratio times weight instead (the paper's Algorithm 1 and its code): then it deletes gradient
    before any update, at tokens whose weight alone is outside the band.
    The band bounds no loss where A < 0 and the ratio grows: there ``dual_clip`` = c > 1 holds it at c |A| (Ye et al.
    2020). That too deletes gradient, and counts as clipped.
    The ratio is clamped in log space to +-``max_log_ratio`` nats, never multiplied into an infinity. At logq_new =
    logq_old the gradient is exactly ``-w A grad log q`` whatever the clip.
    """
    fixed = (logq_old, advantage, importance)
    assert not any(value.requires_grad for value in fixed), "credit and the old log-probs must be detached"
    for what, value in zip(("old log-probs", "advantages", "importance weights"), fixed, strict=True):
        require_shape(what, value, tuple(logq_new.shape))
    log_ratio = logq_new - logq_old
    clamped = (log_ratio.abs() > max_log_ratio).detach()
    ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio).exp()
    if weight_in_clip:
        ratio, importance = ratio * importance, torch.ones_like(importance)
    gain = ratio * advantage
    clipped = torch.zeros_like(clamped)
    if clip is not None:
        trusted = ratio.clamp(1.0 - clip, 1.0 + clip) * advantage
        clipped = (trusted < gain).detach()
        gain = torch.minimum(gain, trusted)
    if dual_clip is not None:
        least = dual_clip * advantage
        beyond = (advantage < 0) & (gain < least)
        clipped = clipped | beyond.detach()
        gain = torch.where(beyond, least, gain)
    held = log_ratio.clamp(-max_log_ratio, max_log_ratio).detach()
    drift = held.exp() - 1.0 - held
    return Surrogate(loss=-importance * gain, clipped=clipped, clamped=clamped, drift=drift)

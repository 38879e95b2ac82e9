"""Importance weights and the clipped surrogate.

Legend: V ids of one next token, N cases, D entries of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minillm import divergences, policy_loss
from minillm.policy_loss import Surrogate
from minillm.selftest.check import ROUNDING, Check, Found, differing, gap, log, rough, worst

STUDENT_1V, TEACHER_1V = log(0.6, 0.4), log(0.8, 0.2)
"""The pair that golden numbers are of."""
KINDS = ("none", "per_step", "coin")


def weights(kind: str, logq: Tensor, logp: Tensor, *, alpha: float, drew: bool = False) -> Tensor:
    """The library's weights, all tokens drawn by one of the two."""
    return policy_loss.importance_weights(
        kind, logq_BT=logq, logp_BT=logp, teacher_drew_BT=torch.full(logq.shape, drew), teacher_mix=alpha,
        max_log_ratio=20.0,
    )  # fmt: skip


def golden_weights() -> Found:
    """q (.6, .4), p (.8, .2), a fifth from the teacher: .9375 and 1.1111; by coin 1.25, or 0 for the teacher's."""
    one_1V = torch.ones_like(STUDENT_1V)
    by_token = weights("per_step", STUDENT_1V, TEACHER_1V, alpha=0.2)
    by_coin = [weights("coin", STUDENT_1V, TEACHER_1V, alpha=0.2, drew=drew) for drew in (False, True)]
    alone = weights("per_step", STUDENT_1V, TEACHER_1V, alpha=1.0)
    return Found(
        worst(
            gap(by_token, torch.tensor([[0.9375, 1.0 / 0.9]], dtype=torch.float64)),
            gap(by_coin[0], 1.25 * one_1V),
            gap(by_coin[1], 0.0 * one_1V),
            gap(alone, (STUDENT_1V - TEACHER_1V).exp()),
        ),
        ROUNDING,
    )


def mean_weights() -> Found:
    """Weights have mean 1 over coin and token, and lie between 0 and 1 / (1 - alpha)."""
    logq_1V, logp_1V = (2 * rough(1, 7, seed=4)).log_softmax(-1), rough(1, 7, seed=3).log_softmax(-1)
    errors = []
    for kind in KINDS:
        for alpha in (0.05, 0.3, 0.7):
            tails_1V, heads_1V = (weights(kind, logq_1V, logp_1V, alpha=alpha, drew=drew) for drew in (False, True))
            mean = (1.0 - alpha) * (logq_1V.exp() * tails_1V).sum() + alpha * (logp_1V.exp() * heads_1V).sum()
            both_2V = torch.cat([tails_1V, heads_1V])
            errors += [(mean - 1.0).abs(), -both_2V.min(), both_2V.max() - 1.0 / (1.0 - alpha)]
    return Found(worst(*errors), ROUNDING)


def no_mixing() -> Found:
    """Where the student sampled alone every weight is 1 to the bit."""
    wrong = 0.0
    for dtype in (torch.float32, torch.float64):
        logq_1V, logp_1V = STUDENT_1V.to(dtype), TEACHER_1V.to(dtype)
        for kind in (*KINDS, "per_decision"):
            wrong += differing(weights(kind, logq_1V, logp_1V, alpha=0.0), torch.ones_like(logq_1V))
    return Found(wrong, 0.0)


def surrogate(
    ratio_N: Tensor, advantage_N: Tensor, weight_N: Tensor, **bounds: float | None
) -> tuple[Surrogate, Tensor]:
    """The library's surrogate where the student has moved by these ratios, and its slope in log q_new."""
    new_N = ratio_N.log().requires_grad_()
    found = policy_loss.clipped_surrogate(
        new_N, torch.zeros_like(ratio_N), advantage=advantage_N, importance=weight_N, max_log_ratio=20.0,
        clip=bounds.get("clip"), dual_clip=bounds.get("dual_clip"),
    )  # fmt: skip
    return found, torch.autograd.grad(found.loss.sum(), new_N)[0]


def clip_at_start() -> Found:
    """Before the student has moved no clip deletes gradient, whatever the weight: the slope is -w A."""
    odds_N = torch.linspace(-6.0, 6.0, 60, dtype=torch.float64).exp().repeat(2)
    weight_N, advantage_N = 1.0 / (0.8 + 0.2 * odds_N), torch.cat([torch.ones(60), -torch.ones(60)]).double() * 1.7
    slopes = [surrogate(torch.ones_like(odds_N), advantage_N, weight_N, clip=clip)[1] for clip in (None, 0.01, 0.2)]
    return Found(worst(*(gap(slope_N, -weight_N * advantage_N) for slope_N in slopes)), ROUNDING)


def golden_clip() -> Found:
    """-w min(r A, clip(r) A) at seven points, its slope, and which of them count as clipped."""
    rows = (
        (1.1, 1.0, -1.1, 0), (1.5, 1.0, -1.2, 1), (0.5, 1.0, -0.5, 0), (0.9, -1.0, 0.9, 0), (0.5, -1.0, 0.8, 1),
        (1.5, -1.0, 1.5, 0), (1.5, 0.0, 0.0, 0),
    )  # fmt: skip
    ratio_N, advantage_N, want_N, clipped_N = torch.tensor(rows, dtype=torch.float64).T
    weight_N = torch.full_like(ratio_N, 1.25)
    found, slope_N = surrogate(ratio_N, advantage_N, weight_N, clip=0.2)
    want_slope_N = torch.where(clipped_N > 0, 0.0, -weight_N * ratio_N * advantage_N)
    errors = gap(found.loss, weight_N * want_N), gap(slope_N, want_slope_N), gap(found.clipped.double(), clipped_N)
    return Found(worst(*errors), ROUNDING)


def dual_clip() -> Found:
    """Where A < 0 the loss is at most c |A|, with no slope beyond; where A > 0 nothing changes."""
    ratio_N = torch.tensor([0.9, 2.9, 5.0, 100.0] * 2, dtype=torch.float64)
    advantage_N, weight_N = torch.ones_like(ratio_N), torch.full_like(ratio_N, 0.5)
    advantage_N[:4] = -1.0
    found, slope_N = surrogate(ratio_N, advantage_N, weight_N, dual_clip=3.0)
    want_N = weight_N * torch.cat([ratio_N[:4].clamp(max=3.0), -ratio_N[4:]])
    want_slope_N = torch.where((advantage_N < 0) & (ratio_N > 3.0), 0.0, want_N)
    return Found(worst(gap(found.loss, want_N), gap(slope_N, want_slope_N)), ROUNDING)


def drift() -> Found:
    """How far the student has moved, on average over the old one's tokens, is KL(old || new)."""
    old_1V, new_1V = (rough(1, 6, seed=seed).log_softmax(-1) for seed in (1, 2))
    one_1V = torch.ones_like(old_1V)
    found = policy_loss.clipped_surrogate(
        new_1V, old_1V, advantage=one_1V, importance=one_1V, clip=0.2, max_log_ratio=20.0
    ).drift
    mean, want = (old_1V.exp() * found).sum(), divergences.reverse_kl(old_1V, new_1V).sum()
    return Found(worst((mean - want).abs(), -found.min()), ROUNDING)


CHECKS = (
    Check(name="weights: golden numbers", run=golden_weights),
    Check(name="weights: mean 1, and their bounds", run=mean_weights),
    Check(name="weights: exactly 1 without mixing", run=no_mixing),
    Check(name="clip: none at the weights that sampled", run=clip_at_start),
    Check(name="clip: golden numbers", run=golden_clip),
    Check(name="clip: dual clip bounds the loss", run=dual_clip),
    Check(name="clip: drift is the KL to the old student", run=drift),
)

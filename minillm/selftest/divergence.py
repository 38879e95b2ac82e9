"""Divergences: golden numbers, slopes in closed form, forbidden ids, and what one-sample estimators are as losses.

Legend: N states, V ids. q is the student, p the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from minillm import divergences
from minillm.selftest.check import ROUNDING, Check, Found, gap, log, rough, worst

STUDENT_1V, TEACHER_1V = log(0.6, 0.4), log(0.8, 0.2)
WRITTEN = 6e-7
"""Limit for golden numbers of six digits."""

Divergence = Callable[[Tensor, Tensor], Tensor]


def family() -> tuple[Divergence, ...]:
    """All divergences of the library, between log-probabilities [N, V]."""
    return (
        divergences.reverse_kl,
        divergences.forward_kl,
        partial(divergences.jensen_shannon, beta=0.3),
        partial(divergences.skew_forward_kl, skew=0.1),
        partial(divergences.skew_reverse_kl, skew=0.1),
    )


def logits() -> tuple[Tensor, Tensor]:
    """Five states of both models, six ids; the student's a leaf."""
    return rough(5, 6, seed=1).requires_grad_(), rough(5, 6, seed=2)


def slope(divergence: Divergence, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The values [N], and the slope of their sum in the student's logits [N, V]."""
    value_N = divergence(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
    return value_N.detach(), torch.autograd.grad(value_N.sum(), student_NV)[0]


def golden_slopes() -> Found:
    """q (.6, .4), p (.8, .2): .104650 with slope (-.235399, .235399); forward .091516 with q - p = (-.2, .2)."""
    student_1V = STUDENT_1V.clone().requires_grad_()
    reverse, forward = (slope(kind, student_1V, TEACHER_1V) for kind in family()[:2])
    wide_NV, other_NV = logits()
    value_N, slope_NV = slope(divergences.reverse_kl, wide_NV, other_NV)
    q_NV, p_NV = wide_NV.detach().softmax(-1), other_NV.softmax(-1)
    return Found(
        worst(
            gap(reverse[0], torch.tensor([0.104650])),
            gap(reverse[1], torch.tensor([[-0.235399, 0.235399]])),
            gap(forward[0], torch.tensor([0.091516])),
            gap(forward[1], torch.tensor([[-0.2, 0.2]])),
            gap(slope_NV, q_NV * ((q_NV / p_NV).log() - value_N[:, None])),
        ),
        WRITTEN,
    )


def golden_family() -> Found:
    """Jensen-Shannon .024157 at one half, and both KLs at its ends; skewed .075543 and .081716; bounds and ends."""

    def of(kind: Divergence) -> Tensor:
        return kind(STUDENT_1V, TEACHER_1V)

    skewed = [
        of(partial(kind, skew=skew))
        for kind in (divergences.skew_forward_kl, divergences.skew_reverse_kl)
        for skew in (0.1, 0.0)
    ]
    ends = [of(partial(divergences.jensen_shannon, beta=beta)) / 1e-6 for beta in (1e-6, 1 - 1e-6)]
    far = divergences.skew_forward_kl(log(1.0, 1e-9), log(1e-9, 1.0), skew=0.1)
    return Found(
        worst(
            gap(of(partial(divergences.jensen_shannon, beta=0.5)), torch.tensor([0.024157])),
            gap(ends[0], torch.tensor([0.091516])),
            gap(ends[1], torch.tensor([0.104650])),
            gap(skewed[0], torch.tensor([0.075543])),
            gap(skewed[1], of(divergences.forward_kl)),
            gap(skewed[2], torch.tensor([0.081716])),
            gap(skewed[3], of(divergences.reverse_kl)),
            far + math.log(0.1),
        ),
        2e-6,
    )


def zero_when_equal() -> Found:
    """Each is 0, with slope 0, where both models agree; and well above 0 where they do not."""
    student_NV, teacher_NV = logits()
    errors = []
    for kind in family():
        value_N, slope_NV = slope(kind, student_NV, student_NV.detach())
        apart_N, _ = slope(kind, student_NV, teacher_NV)
        errors += [value_N.abs(), slope_NV.abs(), (0.01 - apart_N).clamp(min=0.0)]
    return Found(worst(*errors), ROUNDING)


def forbidden() -> Found:
    """Ids that both forbid are as good as removed: no NaN, no share of the value, no slope."""
    student_NV, teacher_NV = logits()
    kept_V = torch.tensor([True, False, True, True, False, True])
    masked_NV = student_NV.detach().masked_fill(~kept_V, -math.inf).requires_grad_()
    errors = []
    for kind in family():
        want_N, want_NV = slope(kind, student_NV.detach()[:, kept_V].requires_grad_(), teacher_NV[:, kept_V])
        got_N, got_NV = slope(kind, masked_NV, teacher_NV.masked_fill(~kept_V, -math.inf))
        errors += [gap(got_N, want_N), gap(got_NV[:, kept_V], want_NV), worst(got_NV[:, ~kept_V].abs())]
    entropy_N = divergences.entropy(masked_NV.log_softmax(-1))
    errors.append(gap(entropy_N, divergences.entropy(student_NV[:, kept_V].log_softmax(-1))))
    return Found(worst(*errors), ROUNDING)


def estimators() -> Found:
    """k1 and k3 both have the reverse KL as their mean; as losses k1 has slope 0 and k3 the forward KL's."""
    student_NV, teacher_NV = logits()
    logq_NV, logp_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    chance_NV = logq_NV.detach().exp()  # who is sampled is not differentiated: that is what "as a loss" means
    k1_NV = logq_NV - logp_NV
    k3_NV = (-k1_NV).exp() - 1.0 + k1_NV
    want_N, reverse_NV = slope(divergences.reverse_kl, student_NV, teacher_NV)
    _, forward_NV = slope(divergences.forward_kl, student_NV, teacher_NV)
    means = [gap((chance_NV * each).sum(-1), want_N) for each in (k1_NV, k3_NV)]
    slopes = [
        torch.autograd.grad((chance_NV * each).sum(), student_NV, retain_graph=True)[0]
        for each in (k1_NV, k3_NV, 0.5 * k1_NV.square())
    ]
    wanted = (torch.zeros_like(forward_NV), forward_NV, reverse_NV)
    return Found(worst(*means, *(gap(got, want) for got, want in zip(slopes, wanted, strict=True))), ROUNDING)


CHECKS = (
    Check(name="divergence: single-step slope, golden numbers", run=golden_slopes),
    Check(name="divergence: golden numbers of the family", run=golden_family),
    Check(name="divergence: 0 where models agree", run=zero_when_equal),
    Check(name="divergence: forbidden ids count for nothing", run=forbidden),
    Check(name="divergence: estimators k1, k2, k3 as losses", run=estimators),
)

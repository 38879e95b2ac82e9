"""The clipped surrogate: the clip acts on q_new / q_old, the weight stands outside it, credit is a constant."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillm.credit import future_return, return_to_go
from minillm.policy_loss import Surrogate, clipped_surrogate
from tests.exact.tabular import (
    assert_close,
    credit,
    enumerate_pair,
    gradient,
    make_pair,
    minillm_loss_N,
    policy_loss_N,
    weights,
)

ALPHA, CLIP = 0.2, 0.2


def surrogate(
    new_N: Tensor, old_N: Tensor, *, advantage_N: Tensor, importance_N: Tensor, clip: float | None = CLIP
) -> Surrogate:
    return clipped_surrogate(
        new_N, old_N, advantage=advantage_N, importance=importance_N, clip=clip, max_log_ratio=20.0
    )


def clip_on_weight_times_ratio(
    new_N: Tensor, old_N: Tensor, *, advantage_N: Tensor, importance_N: Tensor, clip: float | None = CLIP
) -> Surrogate:
    """The broken twin: the paper's Algorithm 1 (and the official code) clip q_new / m."""
    assert clip is not None
    ratio_N = (new_N - old_N).exp() * importance_N
    gain_N = torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip, 1 + clip) * advantage_N)
    none_N = torch.zeros_like(gain_N, dtype=torch.bool)
    return Surrogate(loss=-gain_N, clipped=none_N, clamped=none_N, drift=0 * gain_N)


def draws() -> tuple[Tensor, Tensor, Tensor]:
    """(student log-prob, p / q, advantage) over a grid of ratios and both signs of credit."""
    gap_N = torch.linspace(-6.0, 6.0, 60, dtype=torch.float64).repeat(2)
    sign_N = torch.ones(120, dtype=torch.float64)
    sign_N[60:] = -1.0
    logq_N = torch.full_like(gap_N, -1.5)
    return logq_N, gap_N.exp(), 1.7 * sign_N


def slope_at_old(twin: Callable[..., Surrogate], *, clip: float | None = CLIP) -> tuple[Tensor, Tensor]:
    """Gradient of the loss in log q at theta = theta_old, and what the unclipped policy gradient says, -w A."""
    logq_N, odds_N, advantage_N = draws()
    importance_N = 1.0 / ((1.0 - ALPHA) + ALPHA * odds_N)
    new_N = logq_N.clone().requires_grad_()
    loss_N = twin(new_N, logq_N, advantage_N=advantage_N, importance_N=importance_N, clip=clip).loss
    (slope_N,) = torch.autograd.grad(loss_N.sum(), new_N)
    return slope_N, -importance_N * advantage_N


@pytest.mark.parametrize("clip", [None, 0.0, 0.01, 0.2, 0.9])
def test_at_the_old_weights_the_clip_does_nothing(clip: float | None) -> None:
    slope_N, want_N = slope_at_old(surrogate, clip=clip)
    assert_close(slope_N, want_N, atol=1e-15)


def test_clip_around_the_weight_deletes_gradient() -> None:
    """Negative control: dead where A > 0 and p / q < 1/6, or A < 0 and p / q > 2.25, before any step was taken."""
    slope_N, want_N = slope_at_old(clip_on_weight_times_ratio)
    _, odds_N, advantage_N = draws()
    dead_N = ((advantage_N > 0) & (odds_N < 1 / 6)) | ((advantage_N < 0) & (odds_N > 2.25))
    assert torch.equal(slope_N == 0.0, dead_N)
    assert 0 < int(dead_N.sum()) < len(dead_N)
    assert_close(slope_N[~dead_N], want_N[~dead_N], atol=1e-15)


@pytest.mark.parametrize("kind", ["none", "per_step", "coin"])
@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_whole_gradient_is_the_same_with_and_without_clip(kind: str, future: str) -> None:
    student, teacher = make_pair()
    every = enumerate_pair(student, teacher)
    drew_NT = torch.rand(every.mask_NT.shape, generator=torch.Generator().manual_seed(0)) < ALPHA
    weight_NT = weights(kind, every, drew_NT, alpha=ALPHA)
    advantage_NT = credit(every, future=future)
    with_D, without_D = (
        gradient((every.chance_N * policy_loss_N(every, advantage_NT, weight_NT=weight_NT, clip=clip)).sum(), student)
        for clip in (CLIP, None)
    )
    assert_close(with_D, without_D, atol=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "want", "clipped"),
    [
        (1.1, 1.0, -1.1, False),
        (1.5, 1.0, -1.2, True),
        (0.5, 1.0, -0.5, False),
        (0.9, -1.0, 0.9, False),
        (0.5, -1.0, 0.8, True),
        (1.5, -1.0, 1.5, False),
        (1.5, 0.0, 0.0, False),
    ],
)
@pytest.mark.parametrize("weight", [1.0, 1.25, 0.0])
def test_clip_is_pessimistic_and_weight_multiplies(
    ratio: float, advantage: float, want: float, clipped: bool, weight: float
) -> None:
    """-w min(r A, clip(r) A): a step that has gone far enough the right way earns nothing more."""
    new_N = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    got = surrogate(
        new_N,
        torch.zeros(1, dtype=torch.float64),
        advantage_N=torch.tensor([advantage], dtype=torch.float64),
        importance_N=torch.tensor([weight], dtype=torch.float64),
    )
    (slope_N,) = torch.autograd.grad(got.loss.sum(), new_N)
    assert_close(got.loss.detach(), torch.tensor([weight * want], dtype=torch.float64))
    assert bool(got.clipped) is clipped
    assert_close(slope_N, torch.tensor([0.0 if clipped else -weight * ratio * advantage], dtype=torch.float64))


@pytest.mark.parametrize(("ratio", "want", "cut"), [(0.9, 0.9, False), (2.9, 2.9, False), (5.0, 3.0, True)])
def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative(ratio: float, want: float, cut: bool) -> None:
    """At most c |A|, and beyond that no gradient; a positive advantage is not touched."""
    new_N = torch.tensor([math.log(ratio)] * 2, dtype=torch.float64, requires_grad=True)
    got = clipped_surrogate(
        new_N, torch.zeros(2, dtype=torch.float64), advantage=torch.tensor([-1.0, 1.0], dtype=torch.float64),
        importance=torch.full((2,), 0.5, dtype=torch.float64), clip=None, max_log_ratio=20.0, dual_clip=3.0,
    )  # fmt: skip
    (slope_N,) = torch.autograd.grad(got.loss.sum(), new_N)
    assert_close(got.loss.detach(), torch.tensor([0.5 * want, -0.5 * ratio], dtype=torch.float64))
    assert got.clipped.tolist() == [cut, False]
    assert_close(slope_N, torch.tensor([0.0 if cut else 0.5 * ratio, -0.5 * ratio], dtype=torch.float64))


def test_without_dual_clip_that_loss_has_no_bound() -> None:
    """Negative control: the clip alone leaves min(r A, clip(r) A) = r A."""
    far_N = torch.tensor([math.log(100.0)], dtype=torch.float64)
    one_N = torch.ones(1, dtype=torch.float64)
    assert float(surrogate(far_N, torch.zeros_like(far_N), advantage_N=-one_N, importance_N=one_N).loss) > 99.0


def test_drift_is_zero_at_the_old_weights_and_the_kl_on_average() -> None:
    """E under q_old of r - 1 - log r is KL(q_old || q_new), by sum over the vocabulary."""
    old_V, new_V = torch.randn(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(-1)
    one_V = torch.ones_like(old_V)
    assert torch.equal(surrogate(old_V, old_V, advantage_N=one_V, importance_N=one_V).drift, 0 * one_V)
    drift_V = surrogate(new_V, old_V, advantage_N=one_V, importance_N=one_V).drift
    assert float(drift_V.min()) > 0.0
    assert float(old_V.exp() @ drift_V) == pytest.approx(float(old_V.exp() @ (old_V - new_V)), abs=1e-14)


def test_without_clip_the_loss_is_the_plain_ratio() -> None:
    new_N = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    one_N = torch.ones_like(new_N)
    got = surrogate(new_N, torch.zeros_like(new_N), advantage_N=one_N, importance_N=one_N, clip=None)
    assert_close(got.loss, -new_N.exp())
    assert not bool(got.clipped.any()) and not bool(got.clamped.any())


def test_a_huge_ratio_is_clamped_and_counted() -> None:
    new_N = torch.tensor([0.0, 19.0, 21.0, 1e6, -1e6], dtype=torch.float32, requires_grad=True)
    one_N = torch.ones(5)
    got = surrogate(new_N, torch.zeros(5), advantage_N=-one_N, importance_N=one_N, clip=None)
    assert got.clamped.tolist() == [False, False, True, True, True]
    (slope_N,) = torch.autograd.grad(got.loss.sum(), new_N)
    assert bool(got.loss.isfinite().all()) and bool(slope_N.isfinite().all())


def test_credit_with_a_gradient_is_refused() -> None:
    new_N, one_N = torch.zeros(2, requires_grad=True), torch.ones(2)
    attached_N = torch.ones(2, requires_grad=True)
    with pytest.raises(AssertionError, match="detached"):
        surrogate(new_N, torch.zeros(2), advantage_N=attached_N, importance_N=one_N)
    with pytest.raises(AssertionError, match="detached"):
        surrogate(new_N, torch.zeros(2), advantage_N=one_N, importance_N=attached_N)


@pytest.mark.parametrize("function", [future_return, return_to_go])
def test_credit_carries_no_gradient(function: Callable[..., Tensor]) -> None:
    reward_BT = torch.randn(2, 3, requires_grad=True)
    assert not function(reward_BT, torch.ones(2, 3, dtype=torch.bool)).requires_grad


def test_attached_credit_would_be_another_gradient() -> None:
    """Negative control: the same return with the graph left on it moves the gradient of a single response."""
    student, teacher = make_pair()
    every = enumerate_pair(student, teacher)
    reward_NT = torch.where(every.mask_NT, every.logp_NT - every.logq_NT, 0.0)
    ahead_NT = torch.where(every.mask_NT, reward_NT.flip(1).cumsum(1).flip(1) - reward_NT, 0.0)
    assert_close(ahead_NT.detach(), credit(every, future="sampled"))
    attached_D = gradient((-ahead_NT * every.logq_NT).sum(1)[-1], student)
    detached_D = gradient((-ahead_NT.detach() * every.logq_NT).sum(1)[-1], student)
    assert_close(detached_D, gradient(policy_loss_N(every, credit(every, future="sampled"))[-1], student))
    assert float((attached_D - detached_D).norm()) > 0.1


def test_teacher_gets_no_gradient_from_the_policy_term() -> None:
    """Its log-probs enter through rewards and weights only, and those are numbers."""
    student, teacher = make_pair()
    every = enumerate_pair(student, teacher)
    logp_NT = every.logp_NT.clone().requires_grad_()
    advantage_NT = future_return(logp_NT - every.logq_NT, every.mask_NT)
    loss = policy_loss_N(every, advantage_NT).sum()
    (none,) = torch.autograd.grad(loss, logp_NT, allow_unused=True)
    assert none is None
    assert gradient(minillm_loss_N(every, future="sampled").sum(), student).abs().max() > 0.0

"""Importance weights under teacher mixing m = (1 - alpha) q + alpha p: their algebra, and what they leave biased."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from minillm.policy_loss import importance_weights
from tests.exact.tabular import (
    Enumeration,
    TabularLM,
    assert_close,
    chance_given_coins,
    coin_patterns,
    enumerate_pair,
    expected_gradient,
    gradient,
    gradients,
    make_pair,
    minillm_loss_N,
    mixed_chance_N,
    policy_loss_N,
    relative_error,
    sequence_kl,
    weights,
)

ALPHAS = [0.05, 0.2, 0.3, 0.7]


def token_pair(seed: int = 5, vocab: int = 4) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the next token under student and teacher, each [V]."""
    noise = torch.Generator().manual_seed(seed)
    both_2V = 2 * torch.randn(2, vocab, generator=noise, dtype=torch.float64)
    return both_2V.log_softmax(-1)[0], both_2V.log_softmax(-1)[1]


def weight_of(
    kind: str, logq_V: Tensor, logp_V: Tensor, *, alpha: float, drew: bool = False, max_log_ratio: float = 20.0
) -> Tensor:
    return importance_weights(
        kind,
        logq_BT=logq_V,
        logp_BT=logp_V,
        teacher_drew_BT=torch.full(logq_V.shape, drew),
        teacher_mix=alpha,
        max_log_ratio=max_log_ratio,
    )


def mean_weight(kind: str, *, alpha: float) -> float:
    """E[w] over the coin and the token it lets be drawn."""
    logq_V, logp_V = token_pair()
    tails = (logq_V.exp() * weight_of(kind, logq_V, logp_V, alpha=alpha, drew=False)).sum()
    heads = (logp_V.exp() * weight_of(kind, logq_V, logp_V, alpha=alpha, drew=True)).sum()
    return float((1.0 - alpha) * tails + alpha * heads)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", ["none", "per_step", "coin"])
def test_weights_have_mean_one(kind: str, alpha: float) -> None:
    assert mean_weight(kind, alpha=alpha) == pytest.approx(1.0, abs=1e-12)


def test_a_weight_with_the_wrong_denominator_is_noticed() -> None:
    """Negative control: p / m is a weight too, with mean 1 as well, but q / p is not."""
    logq_V, logp_V = token_pair()
    mixed_V = 0.8 * logq_V.exp() + 0.2 * logp_V.exp()
    assert abs(float((mixed_V * (logq_V - logp_V).exp()).sum()) - 1.0) > 0.1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_weights_keep_their_bounds(alpha: float) -> None:
    logq_T = torch.linspace(-200.0, 0.0, 41, dtype=torch.float64)
    for drew in (False, True):
        for kind in ("per_step", "coin"):
            weight_T = weight_of(kind, logq_T, logq_T.flip(0), alpha=alpha, drew=drew)
            assert float(weight_T.min()) >= 0.0
            assert float(weight_T.max()) <= 1.0 / (1.0 - alpha) + 1e-12
            assert bool(weight_T.isfinite().all())


def test_golden_weights() -> None:
    """q = (.6, .4), p = (.8, .2), alpha .2: m = (.64, .36)."""
    logq_V = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    logp_V = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    want_V = torch.tensor([0.9375, 1.0 / 0.9], dtype=torch.float64)
    assert_close(weight_of("per_step", logq_V, logp_V, alpha=0.2), want_V)
    assert_close(weight_of("coin", logq_V, logp_V, alpha=0.2), torch.full((2,), 1.25, dtype=torch.float64))
    assert_close(weight_of("coin", logq_V, logp_V, alpha=0.2, drew=True), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["none", "per_step", "coin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_mixing_weights_are_exactly_one(kind: str, dtype: torch.dtype) -> None:
    logq_V, logp_V = token_pair()
    for drew in (False, True):
        weight_V = weight_of(kind, logq_V.to(dtype), logp_V.to(dtype), alpha=0.0, drew=drew)
        assert weight_V.dtype is dtype
        assert torch.equal(weight_V, torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("kind", ["none", "per_step", "coin"])
def test_weights_keep_the_precision_of_the_log_probs(kind: str) -> None:
    """1 / 0.7 is no float32: a weight that passed through one is off by 1e-8."""
    logq_V, logp_V = token_pair()
    weight_V = weight_of(kind, logq_V, logp_V, alpha=0.3)
    want_V = {
        "none": torch.ones_like(logq_V),
        "per_step": logq_V.exp() / (0.7 * logq_V.exp() + 0.3 * logp_V.exp()),
        "coin": torch.full_like(logq_V, 1.0 / 0.7),
    }[kind]
    assert weight_V.dtype is torch.float64
    assert_close(weight_V, want_V, atol=1e-14)


def test_equal_models_have_weight_one_per_step() -> None:
    logq_V, _ = token_pair()
    assert_close(weight_of("per_step", logq_V, logq_V, alpha=0.2), torch.ones(4, dtype=torch.float64), atol=1e-15)


def test_with_the_teacher_alone_the_weight_is_q_over_p() -> None:
    logq_V, logp_V = token_pair()
    assert_close(weight_of("per_step", logq_V, logp_V, alpha=1.0), (logq_V - logp_V).exp())
    every = enumerate_pair(*make_pair())
    assert_close(mixed_chance_N(every, alpha=1.0), every.logp_NT.sum(1).exp())
    assert_close(mixed_chance_N(every, alpha=0.0), every.chance_N)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_clamp_of_the_log_ratio_hardly_moves_a_weight(alpha: float) -> None:
    """Bounds: alpha e^-max / (1 - alpha)^2 where p << q, e^-max / alpha where p >> q. Here max is 5, to show it."""
    gap_T = torch.linspace(-60.0, 60.0, 121, dtype=torch.float64)
    exact_T = 1.0 / ((1.0 - alpha) + alpha * gap_T.exp())
    off_T = (weight_of("per_step", torch.zeros_like(gap_T), gap_T, alpha=alpha, max_log_ratio=5.0) - exact_T).abs()
    assert float(off_T[gap_T < 0].max()) <= alpha * math.exp(-5.0) / (1.0 - alpha) ** 2
    assert float(off_T[gap_T > 0].max()) <= math.exp(-5.0) / alpha
    assert float(off_T[gap_T.abs() <= 5.0].max()) < 1e-15
    assert float(off_T.max()) > 1e-4  # the clamp did act


def test_a_log_ratio_past_the_floats_gives_a_finite_weight() -> None:
    logq_T = torch.tensor([0.0, -1e4, -1.0], dtype=torch.float32)
    logp_T = torch.tensor([-1e4, 0.0, -math.inf], dtype=torch.float32)
    assert bool(weight_of("per_step", logq_T, logp_T, alpha=0.2).isfinite().all())


def test_single_step_needs_no_weight() -> None:
    """E[w grad KL] = grad KL for every alpha, and the weight only adds variance."""
    student, teacher = make_pair(vocab=4, length=1)
    every = enumerate_pair(student, teacher)
    slope_ND = gradients(every.kl_NT[:, 0], student)
    want_D = slope_ND[0]
    for alpha in ALPHAS:
        chance_N = mixed_chance_N(every, alpha=alpha)
        drew_NT = torch.zeros_like(every.mask_NT)
        weighted_ND = weights("per_step", every, drew_NT, alpha=alpha) * slope_ND
        assert_close(chance_N @ weighted_ND, want_D)
        assert float(chance_N @ ((weighted_ND - want_D) ** 2).sum(1)) > 1e-4
        assert float(chance_N @ ((slope_ND - want_D) ** 2).sum(1)) < 1e-24


def test_unweighted_score_under_the_mixture_is_biased() -> None:
    """Negative control of the weights: E_m[grad log q] is 0 with them and p-ward without."""
    logq_V, logp_V = token_pair()
    score_VV = torch.eye(4, dtype=torch.float64) - logq_V.exp()
    mixed_V = 0.8 * logq_V.exp() + 0.2 * logp_V.exp()
    weighted_V = mixed_V * weight_of("per_step", logq_V, logp_V, alpha=0.2)
    assert_close(weighted_V @ score_VV, torch.zeros(4, dtype=torch.float64))
    assert float((mixed_V @ score_VV).norm()) > 0.05


def mixed_objective(every: Enumeration, student: TabularLM, *, kind: str, future: str, alpha: float) -> Tensor:
    """Expected gradient of the objective over coins and responses, [D]."""
    total_D = torch.zeros(student.table.numel(), dtype=torch.float64)
    heads_KT, chance_K = coin_patterns(student.length, alpha=alpha)
    chance_KN = chance_K[:, None] * chance_given_coins(every, heads_KT)
    for heads_T, chance_N in zip(heads_KT, chance_KN, strict=True):
        weight_NT = weights(kind, every, heads_T.expand_as(every.mask_NT), alpha=alpha)
        loss_N = minillm_loss_N(every, future=future, weight_NT=weight_NT)
        total_D += expected_gradient(every, loss_N, student, chance_N=chance_N)
    return total_D


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_coin_weights_are_per_step_weights_on_average(future: str) -> None:
    """E[coin weight | token] = q / m, and the future does not look back at this coin: the same expected gradient."""
    student, teacher = make_pair()
    every = enumerate_pair(student, teacher)
    coin_D = mixed_objective(every, student, kind="coin", future=future, alpha=0.3)
    assert_close(coin_D, mixed_objective(every, student, kind="per_step", future=future, alpha=0.3))
    assert relative_error(mixed_objective(every, student, kind="none", future=future, alpha=0.3), coin_D) > 1e-3


@pytest.mark.parametrize("kind", ["none", "per_step", "coin"])
@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_without_mixing_every_kind_gives_the_exact_gradient(kind: str, future: str) -> None:
    student, teacher = make_pair()
    every = enumerate_pair(student, teacher)
    want_D = gradient(sequence_kl(every), student)
    assert_close(mixed_objective(every, student, kind=kind, future=future, alpha=0.0), want_D)


BIAS = {
    ("none", "sampled"): 0.267779,
    ("none", "expected"): 0.245932,
    ("per_step", "sampled"): 0.209113,
    ("per_step", "expected"): 0.093358,
    ("coin", "sampled"): 0.209113,
    ("coin", "expected"): 0.093358,
}
"""Relative error of the expected gradient at alpha .2 with each kind of weight and future, V = T = 4, recorded."""


@pytest.mark.parametrize(("kind", "future"), list(BIAS))
def test_bias_left_by_one_step_weights_is_recorded(kind: str, future: str) -> None:
    """None of these weights corrects the distribution of prefixes, so none is exact at alpha > 0."""
    student, teacher = make_pair(vocab=4, length=4, seed=1)
    every = enumerate_pair(student, teacher)
    want_D = gradient(sequence_kl(every), student)
    got_D = mixed_objective(every, student, kind=kind, future=future, alpha=0.2)
    assert relative_error(got_D, want_D) == pytest.approx(BIAS[kind, future], abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_products_of_weights_over_the_past_would_be_exact(alpha: float) -> None:
    """Control of the bias above: with the product over i <= t' on each reward the same sums give the exact gradient."""
    student, teacher = make_pair(vocab=4, length=4, seed=1)
    every = enumerate_pair(student, teacher)
    weight_NT = weights("per_step", every, torch.zeros_like(every.mask_NT), alpha=alpha)
    through_NT = torch.where(every.mask_NT, weight_NT, 1.0).cumprod(dim=1)
    before_NT = torch.cat([torch.ones_like(through_NT[:, :1]), through_NT[:, :-1]], dim=1)
    reward_NT = through_NT * every.reward_NT
    ahead_NT = torch.where(every.mask_NT, reward_NT.flip(1).cumsum(1).flip(1) - reward_NT, 0.0)
    loss_N = (before_NT * every.kl_NT).sum(1) + policy_loss_N(every, ahead_NT)
    got_D = expected_gradient(every, loss_N, student, chance_N=mixed_chance_N(every, alpha=alpha))
    assert_close(got_D, gradient(sequence_kl(every), student))


def test_weights_carry_no_gradient() -> None:
    logq_V, logp_V = token_pair()
    for kind in ("none", "per_step", "coin"):
        weight_V = weight_of(kind, logq_V.clone().requires_grad_(), logp_V.clone().requires_grad_(), alpha=0.2)
        assert not weight_V.requires_grad


def test_a_weight_with_a_gradient_would_bend_the_policy_gradient() -> None:
    """Negative control: q / m differentiated along with the surrogate gives another gradient for a single token."""
    logq_V, logp_V = token_pair()
    new_V = logq_V.clone().requires_grad_()
    attached_V = 1.0 / (0.8 + 0.2 * (logp_V - new_V).exp())
    (free,) = torch.autograd.grad(attached_V.sum(), new_V)
    assert float(free.norm()) > 0.05

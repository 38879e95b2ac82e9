"""Divergences: golden numbers, gradients in closed form, the estimators that are not them, and forbidden tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillm.divergences import (
    entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    top_k_and_rest,
)
from minillm.errors import ShapeMismatch
from tests.exact.tabular import assert_close

Divergence = Callable[[Tensor, Tensor], Tensor]


def middle(logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
    return jensen_shannon(logq_NV, logp_NV, beta=0.3)


def entropy_of_student(logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
    del logp_NV
    return entropy(logq_NV)


def coarse(divergence: Divergence, k: int) -> Divergence:
    """The divergence of the teacher's top k and the rest."""
    return lambda logq_NV, logp_NV: divergence(*top_k_and_rest(logq_NV, logp_NV, k=k))


FAMILY: list[Divergence] = [reverse_kl, forward_kl, middle]
Q = torch.tensor([0.6, 0.4], dtype=torch.float64)
P = torch.tensor([0.8, 0.2], dtype=torch.float64)


def logits(seed: int = 0, rows: int = 5, vocab: int = 6) -> tuple[Tensor, Tensor]:
    """Student logits that want a gradient, and teacher logits."""
    noise = torch.Generator().manual_seed(seed)
    student_NV = 2 * torch.randn(rows, vocab, generator=noise, dtype=torch.float64)
    return student_NV.requires_grad_(), 2 * torch.randn(rows, vocab, generator=noise, dtype=torch.float64)


def value_and_slope(divergence: Divergence, student_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of two rows of logits, and its gradient in the student's logits."""
    value_N = divergence(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
    (slope_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
    return value_N.detach(), slope_NV


def as_logits(probability_V: Tensor) -> Tensor:
    return probability_V.log()[None].clone().requires_grad_()


def test_golden_values_and_gradients() -> None:
    """q = (.6, .4), p = (.8, .2); a gradient belongs to the logits."""
    value_N, slope_NV = value_and_slope(reverse_kl, as_logits(Q), P.log()[None])
    assert float(value_N) == pytest.approx(0.104650, abs=1e-6)
    assert_close(slope_NV, torch.tensor([[-0.235399, 0.235399]], dtype=torch.float64), atol=1e-6)
    value_N, slope_NV = value_and_slope(forward_kl, as_logits(Q), P.log()[None])
    assert float(value_N) == pytest.approx(0.091516, abs=1e-6)
    assert_close(slope_NV, torch.tensor([[-0.2, 0.2]], dtype=torch.float64))
    assert float(entropy(Q.log()[None])) == pytest.approx(0.673012, abs=1e-6)


def test_direction_is_noticed() -> None:
    """Negative control: with the arguments the other way round the golden numbers fail."""
    assert float(reverse_kl(P.log()[None], Q.log()[None])) == pytest.approx(0.091516, abs=1e-6)
    assert abs(float(reverse_kl(P.log()[None], Q.log()[None])) - 0.104650) > 1e-2


def test_single_step_gradient_in_closed_form() -> None:
    """d KL(q || p) / d logit_v = q_v (log(q_v / p_v) - KL), and q - p for the forward KL."""
    student_NV, teacher_NV = logits()
    q_NV, p_NV = student_NV.detach().softmax(-1), teacher_NV.softmax(-1)
    value_N, slope_NV = value_and_slope(reverse_kl, student_NV, teacher_NV)
    assert_close(slope_NV, q_NV * ((q_NV / p_NV).log() - value_N[:, None]))
    assert_close(value_and_slope(forward_kl, student_NV, teacher_NV)[1], q_NV - p_NV)
    with pytest.raises(AssertionError):  # negative control: the two are not each other
        assert_close(slope_NV, q_NV - p_NV, atol=0.1)


def test_entropy_in_closed_form() -> None:
    student_NV, teacher_NV = logits()
    q_NV = student_NV.detach().softmax(-1)
    value_N, slope_NV = value_and_slope(entropy_of_student, student_NV, teacher_NV)
    assert_close(value_N, -(q_NV * q_NV.log()).sum(-1))
    assert_close(slope_NV, -q_NV * (q_NV.log() + value_N[:, None]))


@pytest.mark.parametrize("divergence", FAMILY)
def test_zero_when_equal_and_only_then(divergence: Divergence) -> None:
    student_NV, teacher_NV = logits()
    value_N, slope_NV = value_and_slope(divergence, student_NV, student_NV.detach())
    assert float(value_N.abs().max()) < 1e-15
    assert float(slope_NV.abs().max()) < 1e-15
    assert float(value_and_slope(divergence, student_NV, teacher_NV)[0].min()) > 1e-2


def test_estimators_have_the_value_but_not_the_gradient() -> None:
    """k1 = log q/p, k3 = p/q - 1 - log p/q: both have mean KL(q || p); as losses they give 0 and the forward KL's."""
    student_NV, teacher_NV = logits()
    logq_NV, logp_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    chance_NV = logq_NV.detach().exp()  # who is sampled is not differentiated: that is what "as a loss" means
    k1_NV = logq_NV - logp_NV
    k3_NV = (-k1_NV).exp() - 1.0 + k1_NV
    assert float(k3_NV.detach().min()) >= 0.0
    for estimator_NV in (k1_NV, k3_NV):
        assert_close((chance_NV * estimator_NV).sum(-1).detach(), reverse_kl(logq_NV, logp_NV).detach())
    (slope_k1_NV,) = torch.autograd.grad((chance_NV * k1_NV).sum(), student_NV, retain_graph=True)
    (slope_k3_NV,) = torch.autograd.grad((chance_NV * k3_NV).sum(), student_NV)
    assert_close(slope_k1_NV, torch.zeros_like(slope_k1_NV))
    assert_close(slope_k3_NV, value_and_slope(forward_kl, student_NV, teacher_NV)[1])
    for slope_NV in (slope_k1_NV, slope_k3_NV):  # the library's reverse KL is neither
        assert float((value_and_slope(reverse_kl, student_NV, teacher_NV)[1] - slope_NV).norm()) > 0.1


def test_estimators_whose_gradient_is_the_reverse_kl() -> None:
    """k2 = (log q/p)² / 2 as a loss, k3 weighted by q / q_old, and k1 as a detached reward on the score."""
    student_NV, teacher_NV = logits()
    logq_NV, logp_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    chance_NV, k1_NV = logq_NV.detach().exp(), logq_NV - logp_NV
    k3_NV = (-k1_NV).exp() - 1.0 + k1_NV
    ratio_NV = (logq_NV - logq_NV.detach()).exp()
    want_NV = value_and_slope(reverse_kl, *logits())[1]
    for loss_NV in (k1_NV.square() / 2, ratio_NV * k3_NV, k1_NV.detach() * logq_NV):
        (slope_NV,) = torch.autograd.grad((chance_NV * loss_NV).sum(), student_NV, retain_graph=True)
        assert_close(slope_NV, want_NV)
    assert float(((chance_NV * k1_NV.square() / 2).sum(-1) - reverse_kl(logq_NV, logp_NV)).detach().abs().min()) > 1e-2


def test_skewed_divergences_of_the_golden_pair() -> None:
    logq_NV, logp_NV = Q.log()[None], P.log()[None]
    assert float(skew_forward_kl(logq_NV, logp_NV, skew=0.1)) == pytest.approx(0.075543, abs=1e-6)
    assert float(skew_reverse_kl(logq_NV, logp_NV, skew=0.1)) == pytest.approx(0.081716, abs=1e-6)
    for skewed, plain in ((skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl)):
        assert float(skewed(logq_NV, logp_NV, skew=0.0)) == float(plain(logq_NV, logp_NV))
        assert float(skewed(logq_NV, logp_NV, skew=1.0)) == pytest.approx(0.0, abs=1e-15)
    apart_NV = torch.tensor([[1.0, 1e-30]]).double().log(), torch.tensor([[1e-30, 1.0]]).double().log()
    assert 0 < float(skew_forward_kl(*apart_NV, skew=0.1)) <= -math.log(0.1) < float(forward_kl(*apart_NV))


def test_top_k_and_rest_of_the_golden_pair() -> None:
    """Without the bucket the truncated reverse KL is negative."""
    teacher_NV = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    student_NV = torch.tensor([[0.1, 0.1, 0.1, 0.7]], dtype=torch.float64).log()
    logq_NK, logp_NK = top_k_and_rest(student_NV, teacher_NV, k=2)
    assert float((logq_NK.exp() * (logq_NK - logp_NK))[:, :2].sum()) == pytest.approx(-0.2708, abs=5e-5)
    assert float(reverse_kl(logq_NK, logp_NK)) == pytest.approx(0.8382, abs=5e-5)
    assert float(reverse_kl(student_NV, teacher_NV)) == pytest.approx(1.5360, abs=5e-5)


@pytest.mark.parametrize("divergence", FAMILY)
def test_top_k_and_rest_never_exceeds_the_whole_and_reaches_it(divergence: Divergence) -> None:
    student_NV, teacher_NV = logits()
    whole_N, whole_slope_NV = value_and_slope(divergence, student_NV, teacher_NV)
    values = [value_and_slope(coarse(divergence, k), student_NV, teacher_NV)[0] for k in range(1, 7)]
    for smaller, larger in itertools.pairwise([*values, whole_N + 1e-12]):
        assert bool((smaller <= larger + 1e-12).all()) and bool((smaller >= 0).all())
    assert_close(values[-1], whole_N)
    assert_close(value_and_slope(coarse(divergence, 6), student_NV, teacher_NV)[1], whole_slope_NV)
    assert float((whole_N - values[1]).min()) > 1e-3  # two ids and the rest do say less


def test_a_rest_without_mass_adds_nothing() -> None:
    student_NV, teacher_NV = logits()
    beyond_V = torch.arange(6) >= 3
    student_NV = student_NV.detach().masked_fill(beyond_V, -math.inf).requires_grad_()
    teacher_NV = teacher_NV.masked_fill(beyond_V, -math.inf)
    for divergence in FAMILY:
        want_N, want_slope_NV = value_and_slope(divergence, student_NV, teacher_NV)
        got_N, slope_NV = value_and_slope(coarse(divergence, 3), student_NV, teacher_NV)
        assert_close(got_N, want_N)
        assert_close(slope_NV, want_slope_NV)
    for k in (0, 7):
        with pytest.raises(ValueError, match="between 1 and 6"):
            top_k_and_rest(student_NV, teacher_NV, k=k)


def test_jensen_shannon_of_the_golden_pair() -> None:
    def at(beta: float) -> float:
        return float(jensen_shannon(Q.log()[None], P.log()[None], beta=beta))

    assert at(0.5) == pytest.approx(0.024157, abs=1e-6)
    assert at(1e-4) / 1e-4 == pytest.approx(0.0915, abs=5e-5)  # KL(p || q)
    assert at(1 - 1e-4) / 1e-4 == pytest.approx(0.1046, abs=5e-5)  # KL(q || p)
    assert at(1e-6) < 1e-6 and at(1 - 1e-6) < 1e-6
    assert abs(at(0.2) - at(0.8)) > 1e-4  # negative control: beta does not weigh both sides alike


def test_jensen_shannon_in_closed_form() -> None:
    student_NV, teacher_NV = logits()
    q_NV, p_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)
    m_NV = 0.3 * p_NV + 0.7 * q_NV
    want_N = (0.3 * p_NV * (p_NV / m_NV).log() + 0.7 * q_NV * (q_NV / m_NV).log()).sum(-1)
    value_N, slope_NV = value_and_slope(middle, student_NV, teacher_NV)
    assert_close(value_N, want_N.detach())
    assert_close(slope_NV, torch.autograd.grad(want_N.sum(), student_NV)[0])


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_ends_of_jensen_shannon_are_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="strictly between"):
        jensen_shannon(Q.log()[None], P.log()[None], beta=beta)


@pytest.mark.parametrize("divergence", [*FAMILY, entropy_of_student])
def test_a_token_that_both_forbid_is_as_good_as_removed(divergence: Divergence) -> None:
    """Top-k support and heads of different width: masked with -inf equals cut away, in value and in every gradient."""
    student_NV, teacher_NV = logits()
    kept_V = torch.tensor([True, False, True, True, False, True])
    want_N, want_slope_NV = value_and_slope(
        divergence, student_NV.detach()[:, kept_V].requires_grad_(), teacher_NV[:, kept_V]
    )
    student_NV = student_NV.detach().masked_fill(~kept_V, -math.inf).requires_grad_()
    got_N, slope_NV = value_and_slope(divergence, student_NV, teacher_NV.masked_fill(~kept_V, -math.inf))
    assert_close(got_N, want_N)
    assert torch.equal(slope_NV[:, ~kept_V], torch.zeros(5, 2, dtype=torch.float64))
    assert_close(slope_NV[:, kept_V], want_slope_NV)


def test_subtracting_before_selecting_is_noticed() -> None:
    """Negative control: the short form gives NaN for a token that both forbid, and NaN in the whole gradient."""
    student_NV, teacher_NV = logits()
    student_NV = student_NV.detach().masked_fill(torch.arange(6) == 1, -math.inf).requires_grad_()

    def short(logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
        return torch.where(logq_NV > -math.inf, logq_NV.exp() * (logq_NV - logp_NV), 0.0).sum(-1)

    value_N, slope_NV = value_and_slope(short, student_NV, teacher_NV.masked_fill(torch.arange(6) == 1, -math.inf))
    assert bool(value_N.isfinite().all()) and bool(slope_NV.isnan().any())


def test_a_token_that_only_the_first_forbids_adds_nothing() -> None:
    """Student gives no mass where the teacher does: reverse KL and JSD stay finite, forward KL is +inf and says so."""
    student_NV, teacher_NV = logits()
    student_NV = student_NV.detach().masked_fill(torch.arange(6) == 1, -math.inf).requires_grad_()
    for divergence in (reverse_kl, middle):
        value_N, slope_NV = value_and_slope(divergence, student_NV, teacher_NV)
        assert bool(value_N.isfinite().all()) and bool(slope_NV.isfinite().all())
        assert torch.equal(slope_NV[:, 1], torch.zeros(5, dtype=torch.float64))
    forbidden_N = forward_kl(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
    assert bool((forbidden_N.detach() == math.inf).all())


@pytest.mark.parametrize("gap", [1.0, 200.0])
def test_a_token_that_only_the_second_forbids_is_infinite(gap: float) -> None:
    """Also where the student's mass is below the smallest float: +inf, never NaN."""
    logq_NV = torch.tensor([[-gap, 0.0, 0.0]]).log_softmax(-1)
    logp_NV = torch.tensor([[-math.inf, 0.0, 0.0]]).log_softmax(-1)
    assert float(reverse_kl(logq_NV, logp_NV)) == math.inf
    assert float(forward_kl(logp_NV, logq_NV)) == math.inf


@pytest.mark.parametrize("divergence", [*FAMILY, entropy_of_student])
def test_nan_in_is_nan_out(divergence: Divergence) -> None:
    """A student that has blown up must not read as one that agrees: NaN is not a forbidden token."""
    student_NV, teacher_NV = logits()
    broken_NV = student_NV.detach().masked_fill(torch.arange(6) == 1, math.nan)
    assert bool(divergence(broken_NV.log_softmax(-1), teacher_NV.log_softmax(-1)).isnan().all())


@pytest.mark.parametrize("divergence", [*FAMILY, entropy_of_student])
def test_arbitrary_rows_past_the_real_ids_change_nothing(divergence: Divergence) -> None:
    """Cut both heads to the shared ids, then renormalise: what the teacher's padding rows hold does not matter."""
    student_NV, teacher_NV = logits()
    wide_NV = torch.cat([student_NV.detach(), torch.full((5, 3), 4.0).double()], dim=1).requires_grad_()
    junk_NV = torch.cat([teacher_NV, torch.tensor([1e9, -1e9, 3.0]).double().expand(5, 3)], dim=1)

    def cut(logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
        return divergence(logq_NV[:, :6].log_softmax(-1), logp_NV[:, :6].log_softmax(-1))

    want_N, want_slope_NV = value_and_slope(divergence, student_NV, teacher_NV)
    got_N = cut(wide_NV, junk_NV)
    (slope_NV,) = torch.autograd.grad(got_N.sum(), wide_NV)
    assert_close(got_N.detach(), want_N)
    assert_close(slope_NV[:, :6], want_slope_NV)
    assert torch.equal(slope_NV[:, 6:], torch.zeros(5, 3, dtype=torch.float64))


def test_cutting_without_renormalising_is_noticed() -> None:
    """Negative control: columns cut from a distribution that counted the padding rows no longer sum to 1."""
    student_NV, teacher_NV = logits()
    wide_NV = torch.cat([teacher_NV, torch.full((5, 2), 2.0).double()], dim=1).log_softmax(-1)[:, :6]
    logq_NV = student_NV.detach().log_softmax(-1)
    assert float((reverse_kl(logq_NV, wide_NV) - reverse_kl(logq_NV, teacher_NV.log_softmax(-1))).min()) > 0.02


@pytest.mark.parametrize("divergence", [*FAMILY, entropy_of_student])
def test_temperature_and_scale_cancel(divergence: Divergence) -> None:
    """Both logits times c at temperature T c: the same number; T = 1 is no operation; another T is another number."""
    student_NV, teacher_NV = logits()
    student_NV = student_NV.detach()

    def at(scale: float, temperature: float) -> Tensor:
        first_NV = (scale * student_NV / temperature).log_softmax(-1)
        return divergence(first_NV, (scale * teacher_NV / temperature).log_softmax(-1))

    assert torch.equal(at(1.0, 1.0), divergence(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)))
    assert_close(at(3.0, 2.1), at(1.0, 0.7))
    assert float((at(1.0, 0.7) - at(1.0, 1.0)).abs().min()) > 1e-3


@pytest.mark.parametrize("divergence", FAMILY)
def test_columns_that_do_not_match_are_refused(divergence: Divergence) -> None:
    with pytest.raises((ShapeMismatch, RuntimeError)):
        divergence(torch.zeros(2, 3).log_softmax(-1), torch.zeros(2, 4).log_softmax(-1))


def test_one_row_is_not_spread_over_many() -> None:
    with pytest.raises(ShapeMismatch, match="log-probabilities"):
        reverse_kl(torch.zeros(2, 3).log_softmax(-1), torch.zeros(1, 3).log_softmax(-1))

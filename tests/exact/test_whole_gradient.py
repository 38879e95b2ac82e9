"""The MiniLLM objective, averaged over every response, has the gradient of the exact sequence KL.

Responses end at EOS, so their lengths vary. Nothing here is sampled: where a test says equal it means 1e-12.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.credit import future_return, return_to_go
from tests.exact.tabular import (
    Enumeration,
    TabularLM,
    assert_close,
    bend,
    credit,
    enumerate_pair,
    expected_gradient,
    finite_difference,
    gradient,
    gradients,
    make_pair,
    minillm_loss_N,
    policy_loss_N,
    relative_error,
    sequence_kl,
)

SIZES = [(2, 1), (2, 4), (3, 3), (4, 4)]


def toy(vocab: int = 3, length: int = 3, seed: int = 0) -> tuple[TabularLM, Enumeration, Tensor]:
    """Student, everything it can say, and the gradient that is wanted."""
    student, teacher = make_pair(vocab=vocab, length=length, seed=seed)
    every = enumerate_pair(student, teacher)
    return student, every, gradient(sequence_kl(every), student)


@pytest.mark.parametrize("future", ["sampled", "expected"])
@pytest.mark.parametrize(("vocab", "length"), SIZES)
def test_objective_is_the_gradient_of_the_sequence_kl(vocab: int, length: int, future: str) -> None:
    student, every, want_D = toy(vocab, length)
    assert_close(expected_gradient(every, minillm_loss_N(every, future=future), student), want_D)


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_objective_agrees_with_finite_differences(future: str) -> None:
    student, teacher = make_pair()
    slope_D = finite_difference(lambda: sequence_kl(enumerate_pair(student, teacher)), student)
    every = enumerate_pair(student, teacher)
    assert_close(expected_gradient(every, minillm_loss_N(every, future=future), student), slope_D, atol=1e-9)


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_without_eos_the_identity_holds_too(future: str) -> None:
    student, teacher = make_pair()
    every = enumerate_pair(student, teacher, eos=None)
    assert bool(every.mask_NT.all())
    want_D = gradient(sequence_kl(every), student)
    assert_close(expected_gradient(every, minillm_loss_N(every, future=future), student), want_D)


def test_counting_the_present_reward_twice_adds_the_single_step_gradient() -> None:
    """Single + return from t = exact + single: what the official code does, and the negative control of the above."""
    student, every, want_D = toy()
    single_D = expected_gradient(every, every.kl_NT.sum(1), student)
    twice_N = every.kl_NT.sum(1) + policy_loss_N(every, return_to_go(every.reward_NT, every.mask_NT))
    got_D = expected_gradient(every, twice_N, student)
    assert_close(got_D, want_D + single_D)
    assert float(single_D.norm() / want_D.norm()) > 0.5


@pytest.mark.parametrize(("future", "want"), [("sampled", 0.014198), ("expected", 0.014198)])
def test_discount_is_no_gradient_of_the_kl(future: str, want: float) -> None:
    """Recorded at gamma 0.95 (V = T = 4): relative error. Sampled and expected returns are wrong by the same amount."""
    student, every, want_D = toy(4, 4, seed=1)
    got_D = expected_gradient(every, minillm_loss_N(every, future=future, gamma=0.95), student)
    assert relative_error(got_D, want_D) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("future", "error", "off"), [("sampled", 0.238335, 0.214052), ("expected", 0.248484, 0.220512)]
)
def test_length_normalisation_is_no_gradient_of_the_kl(future: str, error: float, off: float) -> None:
    """Recorded: relative error, and what no rescaling mends. Sampled and expected are two estimands, not one."""
    student, every, want_D = toy(4, 4, seed=1)
    got_D = expected_gradient(every, minillm_loss_N(every, future=future, per_token=True), student)
    assert relative_error(got_D, want_D) == pytest.approx(error, abs=1e-5)
    assert bend(got_D, want_D) == pytest.approx(off, abs=1e-5)


def test_plain_policy_gradients_are_all_the_same_gradient() -> None:
    """Return to go, the same minus 1 (the paper's eq. 2), and the whole return: each is the gradient by itself."""
    student, every, want_D = toy()
    to_go_NT = return_to_go(every.reward_NT, every.mask_NT)
    whole_NT = torch.where(every.mask_NT, every.reward_NT.sum(1, keepdim=True), 0.0)
    for advantage_NT in (to_go_NT, torch.where(every.mask_NT, to_go_NT - 1.0, 0.0), whole_NT):
        assert_close(expected_gradient(every, policy_loss_N(every, advantage_NT), student), want_D)


def test_next_step_return_alone_is_not_the_gradient() -> None:
    """Negative control: without the single-step term the next-step return misses the present token."""
    student, every, want_D = toy()
    got_D = expected_gradient(every, policy_loss_N(every, credit(every, future="sampled")), student)
    assert relative_error(got_D, want_D) > 0.5


def test_chain_rule_of_the_kl() -> None:
    """KL over whole responses = expected sum of the KLs at the visited states."""
    for vocab, length in SIZES:
        _, every, _ = toy(vocab, length)
        assert_close((every.chance_N * every.kl_NT.sum(1)).sum(), sequence_kl(every))


def test_chain_rule_notices_a_lost_eos() -> None:
    """Negative control: a mask of ``token != pad`` where pad is EOS drops the closing EOS and bends the gradient."""
    student, every, want_D = toy()
    kept_NT = every.response_NT != 0
    lost = torch.where(kept_NT, every.kl_NT, 0.0).sum(1)
    assert float(((every.chance_N * lost).sum() - sequence_kl(every)).detach()) < -0.05
    advantage_NT = future_return(every.reward_NT, kept_NT)
    got_D = expected_gradient(every, lost + policy_loss_N(every, advantage_NT), student)
    assert relative_error(got_D, want_D) > 0.05


def test_variance_of_one_response_falls_with_expected_returns() -> None:
    """Recorded: trace of the covariance, with sampled and with expected returns, relative to plain return to go."""
    student, every, want_D = toy(3, 4, seed=3)
    losses = {
        "to_go": policy_loss_N(every, return_to_go(every.reward_NT, every.mask_NT)),
        "sampled": minillm_loss_N(every, future="sampled"),
        "expected": minillm_loss_N(every, future="expected"),
    }
    variance = {
        name: float(every.chance_N @ ((gradients(loss_N, student) - want_D) ** 2).sum(1))
        for name, loss_N in losses.items()
    }
    assert variance["sampled"] / variance["to_go"] == pytest.approx(0.434997, abs=1e-5)
    assert variance["expected"] / variance["to_go"] == pytest.approx(0.285513, abs=1e-5)


def nearby(delta: float) -> tuple[TabularLM, Enumeration]:
    """A student, and a teacher that differs from it by ``delta`` in a fixed random direction."""
    student, direction = make_pair()
    teacher = TabularLM(vocab=3, length=3, seed=0)
    teacher.table = (student.table + delta * direction.table).detach()
    return student, enumerate_pair(student, teacher)


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_at_the_teacher_nothing_moves(future: str) -> None:
    student, every = nearby(0.0)
    assert float(every.reward_NT.abs().max()) == 0.0
    assert float(every.kl_NT.detach().abs().max()) == 0.0
    assert float(credit(every, future=future).abs().max()) == 0.0
    assert float(expected_gradient(every, minillm_loss_N(every, future=future), student).abs().max()) < 1e-16


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_gradient_vanishes_linearly_at_the_teacher(future: str) -> None:
    """Also for one single response: nothing is divided by its own spread, so noise is not blown up."""
    size, worst = [], []
    for delta in (1e-3, 1e-4):
        student, every = nearby(delta)
        size.append(float(expected_gradient(every, minillm_loss_N(every, future=future), student).norm()))
        worst.append(float(gradient(minillm_loss_N(every, future=future)[-1], student).norm()))
    assert size[0] / size[1] == pytest.approx(10.0, rel=0.01)
    assert worst[0] / worst[1] == pytest.approx(10.0, rel=0.01)


def test_whitened_credit_does_not_vanish_at_the_teacher() -> None:
    """Negative control: divided by its own standard deviation the credit of one response keeps its size."""
    size = []
    for delta in (1e-3, 1e-4):
        student, every = nearby(delta)
        value_NT = credit(every, future="sampled")
        white_NT = torch.where(every.mask_NT, value_NT / value_NT[every.mask_NT].std(), 0.0)
        size.append(float(gradient(policy_loss_N(every, white_NT)[-1], student).norm()))
    assert size[0] / size[1] == pytest.approx(1.0, rel=0.05)

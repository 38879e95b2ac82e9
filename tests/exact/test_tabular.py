"""The enumeration harness itself: the tests beside this one are worth what these checks are worth."""

from __future__ import annotations

import pytest
import torch

from tests.exact.tabular import (
    EOS,
    assert_close,
    chance_given_coins,
    coin_patterns,
    enumerate_pair,
    every_response,
    finite_difference,
    gradient,
    gradients,
    make_pair,
    mixed_chance_N,
    sequence_kl,
)


def test_every_response_is_listed_once() -> None:
    response_NT, mask_NT = every_response(vocab=3, length=3)
    assert len(response_NT) == 1 + 2 * (1 + 2 * 3)
    kept = {tuple(row[mask].tolist()) for row, mask in zip(response_NT, mask_NT, strict=True)}
    assert len(kept) == len(response_NT)
    assert all(EOS not in row[:-1] for row in kept)


def test_first_eos_counts_once_and_nothing_after_it() -> None:
    response_NT, mask_NT = every_response(vocab=3, length=4)
    for row, mask in zip(response_NT.tolist(), mask_NT.tolist(), strict=True):
        wanted = row.index(EOS) + 1 if EOS in row else 4  # an unfinished response counts every token
        assert mask == [t < wanted for t in range(4)]


@pytest.mark.parametrize(("vocab", "length"), [(2, 1), (3, 3), (4, 4)])
def test_probabilities_sum_to_one(vocab: int, length: int) -> None:
    every = enumerate_pair(*make_pair(vocab=vocab, length=length))
    assert_close(every.chance_N.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert_close(mixed_chance_N(every, alpha=0.3).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_padding_ids_counted_as_tokens_are_noticed() -> None:
    """Negative control: with a mask that is true everywhere, the probabilities no longer sum to 1."""
    student, _ = make_pair()
    response_NT, _ = every_response(vocab=3, length=3)
    logq_NT = student.logits(response_NT).log_softmax(-1).gather(-1, response_NT[..., None])[..., 0]
    assert abs(float(logq_NT.detach().sum(1).exp().sum()) - 1.0) > 0.05


def test_coins_then_models_is_the_mixture() -> None:
    """Drawing from the teacher at heads and from the student at tails draws from (1 - alpha) q + alpha p."""
    every = enumerate_pair(*make_pair())
    heads_KT, chance_K = coin_patterns(3, alpha=0.3)
    by_coins_N = chance_K @ chance_given_coins(every, heads_KT)
    assert_close(by_coins_N, mixed_chance_N(every, alpha=0.3))
    assert (by_coins_N - mixed_chance_N(every, alpha=0.2)).abs().max() > 1e-3


def test_autograd_and_finite_differences_agree() -> None:
    student, teacher = make_pair()
    exact_D = gradient(sequence_kl(enumerate_pair(student, teacher)), student)
    slope_D = finite_difference(lambda: sequence_kl(enumerate_pair(student, teacher)), student)
    assert_close(slope_D, exact_D, atol=1e-9)


def test_gradients_of_a_vector_are_its_gradients_one_by_one() -> None:
    student, teacher = make_pair()
    every = enumerate_pair(student, teacher)
    assert_close(gradients(every.logq_NT.sum(1), student)[4], gradient(every.logq_NT[4].sum(), student))

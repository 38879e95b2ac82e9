"""Denominators: sums over tokens, divided by the number of sequences in the whole step (design D7).

Batches of one, two and three independent responses are enumerated; responses end at EOS, so that the number of tokens
in a batch is random.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.micro_batches import Limits, cut
from minillm.packing import Reads
from tests.exact.tabular import (
    TabularLM,
    assert_close,
    bend,
    enumerate_pair,
    gradient,
    gradients,
    make_pair,
    minillm_loss_N,
    relative_error,
    sequence_kl,
)

EXPECTED_LENGTH = 2.5


def toy() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(probability [N], length [N], gradient of each response's summed loss [N, D], gradient wanted [D])."""
    student, teacher = make_pair(vocab=4, length=4, seed=1)
    every = enumerate_pair(student, teacher)
    slope_ND = gradients(minillm_loss_N(every, future="expected"), student)
    return every.chance_N, every.length_N.double(), slope_ND, gradient(sequence_kl(every), student)


def over_batches(rows: int, chance_N: Tensor, *, share_of: Tensor) -> Tensor:
    """E over batches of ``rows`` responses of 1 / (share of this response + shares of its mates), [N], for one row."""
    total, chance = share_of, chance_N
    for _ in range(rows - 1):
        total = (total[..., None] + share_of).flatten(1) if total.dim() > 1 else total[:, None] + share_of
        chance = (chance[..., None] * chance_N).flatten(1) if chance.dim() > 1 else chance[:, None] * chance_N
    return (chance / total).reshape(len(chance_N), -1).sum(1)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_sum_over_sequences_keeps_the_gradient(rows: int) -> None:
    """Tokens summed, divided by the number of sequences times a constant: the exact gradient times that constant."""
    chance_N, length_N, slope_ND, want_D = toy()
    per_row_N = over_batches(rows, chance_N, share_of=torch.ones_like(length_N)) / EXPECTED_LENGTH
    got_D = rows * per_row_N @ slope_ND
    assert_close(got_D, want_D / EXPECTED_LENGTH)
    assert bend(got_D, want_D) < 1e-7


@pytest.mark.parametrize(("rows", "want"), [(1, 0.106604), (2, 0.036117), (3, 0.021153)])
def test_token_mean_bends_the_gradient(rows: int, want: float) -> None:
    """Recorded: divided by the sampled number of tokens, the part of the gradient that no learning rate mends."""
    chance_N, length_N, slope_ND, want_D = toy()
    got_D = rows * over_batches(rows, chance_N, share_of=length_N) @ slope_ND
    assert bend(got_D, want_D) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("constant", [0.5, 3.0])
def test_two_denominators_for_the_two_parts_are_noticed(constant: float) -> None:
    """Negative control: single-step and long-horizon parts divided by different constants are another objective."""
    student, teacher = make_pair(vocab=4, length=4, seed=1)
    every = enumerate_pair(student, teacher)
    want_D = gradient(sequence_kl(every), student)
    single_D = gradient((every.chance_N * every.kl_NT.sum(1)).sum(), student)
    long_D = want_D - single_D
    assert bend(single_D + constant * long_D, want_D) > 0.01


def batch() -> tuple[TabularLM, Tensor, Tensor]:
    """A student, and the summed loss and length of seven responses of different lengths."""
    student, teacher = make_pair(vocab=3, length=4, seed=2)
    every = enumerate_pair(student, teacher)
    pick = torch.tensor([0, 3, 5, 9, 1, 20, 11])
    return student, minillm_loss_N(every, future="sampled")[pick], every.length_N[pick].double()


SPLITS = [[7], [1, 6], [3, 4], [2, 2, 3], [1] * 7, [4, 0, 3]]


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("denominator", ["sequences", "tokens"])
def test_cutting_a_batch_changes_nothing(sizes: list[int], denominator: str) -> None:
    """Each piece divided by the count of the whole step: pieces add up, empty ones included."""
    student, loss_B, length_B = batch()
    count = float(len(loss_B)) if denominator == "sequences" else float(length_B.sum())
    whole_D = gradient(loss_B.sum() / count, student)
    pieces = [gradient(part.sum() / count, student) for part in torch.split(loss_B, sizes)]
    assert_close(torch.stack(pieces).sum(0), whole_D, atol=1e-13)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("budget", [1, 4, 6, 9, 40])
def test_cutting_a_batch_by_a_budget_of_tokens_changes_nothing(budget: int, packed: bool) -> None:
    student, loss_B, length_B = batch()
    whole_D = gradient(loss_B.sum() / len(loss_B), student)
    cuts = cut(length_B.long().tolist(), limits=Limits(places=budget), reads=Reads(hidden=170) if packed else None)
    assert (len(cuts) == 1) == (budget == 40)
    pieces = [gradient(loss_B[torch.tensor(rows)].sum() / len(loss_B), student) for rows in cuts]
    assert_close(torch.stack(pieces).sum(0), whole_D, atol=1e-13)


def test_a_mean_of_means_is_noticed() -> None:
    """Negative control: each piece divided by its own count, then averaged, depends on the cut."""
    student, loss_B, length_B = batch()
    whole_D = gradient(loss_B.sum() / length_B.sum(), student)
    parts = zip(torch.split(loss_B, [1, 6]), torch.split(length_B, [1, 6]), strict=True)
    own = [gradient(part.sum() / count.sum(), student) for part, count in parts]
    assert relative_error(torch.stack(own).mean(0), whole_D) > 0.05


def test_order_of_the_rows_changes_nothing() -> None:
    student, loss_B, _ = batch()
    whole_D = gradient(loss_B.sum(), student)
    assert_close(gradient(loss_B[torch.tensor([6, 2, 0, 5, 3, 1, 4])].sum(), student), whole_D, atol=1e-13)

"""Heads that are wider than their ids: whatever further rows hold, losses and gradients are those without them.

Two models of 16 ids each, the width of each of them 0, 3 or 5 rows beyond, filled with numbers or with none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from minillm.models import Head
from minillm.scoring import STATISTICS, TeacherView
from minillm.token_loss import Task

REAL, N, STUDENT_H, TEACHER_H = 16, 7, 6, 5
WIDTHS = (0, 3, 5)
GARBAGE = {"large": 40.0, "small": -40.0, "NaN": math.nan, "infinite": math.inf, "of another model": None}
LOSSES = tuple(name for name in STATISTICS if name != "cached_kl")
EXACT = 1e-12


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(hidden: int, *, seed: int, beyond: int, garbage: float | None, real_ids: int = REAL) -> Head:
    """One with the same real rows whatever stands beyond them."""
    projection = nn.Linear(hidden, REAL + beyond, bias=True, dtype=torch.float64)
    further = 9 * random(seed + 50, beyond, hidden) if garbage is None else torch.full((beyond, hidden), garbage)
    with torch.no_grad():
        projection.weight.copy_(torch.cat([random(seed, REAL, hidden), further.double()]))
        projection.bias.copy_(torch.cat([random(seed + 1, REAL), torch.full((beyond,), garbage or 9.0).double()]))
    return Head(projection, real_ids=real_ids, scale=1.0, softcap=None)


def found(
    student: Head, teacher: Head, *, temperature: float = 1.0
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    """(Values, gradients of the student's weight, bias and states) of all losses together."""
    hidden_NH = random(3, N, STUDENT_H).requires_grad_()
    kept: dict[str, Tensor] = {}

    def loss(numbers: dict[str, Tensor], here: Tensor) -> Tensor:
        kept.update({name: numbers[name].detach() for name in LOSSES})
        return torch.stack([numbers[name] for name in LOSSES]).sum()

    task = Task(
        taken_N=torch.arange(N) % REAL,
        teacher=TeacherView(head=teacher.weights(), hidden_NH=random(4, N, TEACHER_H)),
        wanted=LOSSES,
        temperature=temperature,
        jsd_beta=0.3,
        skew=0.2,
    )
    total, _ = student(hidden_NH, task=task, loss=loss)
    total.backward()
    assert student.weight.grad is not None and student.bias.grad is not None and hidden_NH.grad is not None
    return kept, student.weight.grad, student.bias.grad, hidden_NH.grad


def cases() -> Iterator[tuple[int, int, str]]:
    yield from ((own, other, kind) for own, other in itertools.product(WIDTHS, WIDTHS) for kind in GARBAGE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_stands_beyond_the_ids_of_either_head_changes_nothing(temperature: float) -> None:
    plain = head(STUDENT_H, seed=1, beyond=0, garbage=0.0)
    taught = head(TEACHER_H, seed=2, beyond=0, garbage=0.0)
    values, weight, bias, states = found(plain, taught, temperature=temperature)
    count = 0
    for own, other, kind in cases():
        student = head(STUDENT_H, seed=1, beyond=own, garbage=GARBAGE[kind])
        teacher = head(TEACHER_H, seed=2, beyond=other, garbage=GARBAGE[kind])
        got, *gradients = found(student, teacher, temperature=temperature)
        where = f"student +{own}, teacher +{other}, {kind}"
        for name in LOSSES:
            assert float((got[name] - values[name]).abs().max()) <= EXACT, (where, name)
        for gradient, wanted in zip(gradients, (weight, bias, states), strict=True):
            rows = len(wanted)
            assert float((gradient[:rows] - wanted).abs().max()) <= EXACT, where
            assert bool((gradient[rows:] == 0).all()), where
        count += 1
    print(f"{count} cases")
    assert count == len(WIDTHS) ** 2 * len(GARBAGE)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_control_a_mask_on_one_side_only_is_refused(side: str) -> None:
    wide = {"student": REAL, "teacher": REAL} | {side: REAL + 3}
    student = head(STUDENT_H, seed=1, beyond=3, garbage=None, real_ids=wide["student"])
    teacher = head(TEACHER_H, seed=2, beyond=3, garbage=None, real_ids=wide["teacher"])
    with pytest.raises(AssertionError, match="ids are not the same"):
        found(student, teacher)


def test_control_rows_that_count_on_both_sides_are_seen() -> None:
    """Cut to the smaller of two equal widths, garbage stays in the softmax."""
    values = found(head(STUDENT_H, seed=1, beyond=0, garbage=0.0), head(TEACHER_H, seed=2, beyond=0, garbage=0.0))[0]
    student = head(STUDENT_H, seed=1, beyond=3, garbage=None, real_ids=REAL + 3)
    teacher = head(TEACHER_H, seed=2, beyond=3, garbage=None, real_ids=REAL + 3)
    got, weight, _, _ = found(student, teacher)
    assert max(float((got[name] - values[name]).abs().max()) for name in LOSSES) > 1e-3
    assert bool((weight[REAL:] != 0).any())

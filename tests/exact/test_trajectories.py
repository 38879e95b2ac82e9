"""Training on enumerated gradients of the objective that a run steps on: where the exact one leads, and what it is
without its long-horizon part.

Legend: X prefixes, V ids, D entries of the student's table.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.divergences import reverse_kl
from minillm.selftest.listed import listed, objective_N, stage, tables

RATE = 2.0
SMALL = 2e-4


def stepped(table_XV: Tensor, slope_D: Tensor) -> Tensor:
    """One step of plain gradient descent."""
    return table_XV - RATE * slope_D.view_as(table_XV)


def trained(table_XV: Tensor, teacher_XV: Tensor, *, steps: int, single: float = 1.0, **settings: Any) -> Tensor:
    """The student's table after so many steps on the expected gradient of a stage's loss, with ``single`` times its
    single-step part."""
    chosen = stage(future="expected", **settings)
    for _ in range(steps):
        every = listed(table_XV, teacher_XV)
        single_N = every.kl_NT.sum(1)
        loss_N = objective_N(every, chosen) + (single - 1.0) * single_N
        table_XV = stepped(table_XV, every.expected_gradient(loss_N))
    return table_XV


def distance(table_XV: Tensor, teacher_XV: Tensor) -> float:
    """Reverse KL of whole responses."""
    return float(listed(table_XV, teacher_XV).sequence_kl().detach())


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_a_student_that_can_be_its_teacher_becomes_it(gamma: float) -> None:
    """The reverse KL goes to 0, with and without the long-horizon part."""
    student_XV, teacher_XV = tables()
    assert distance(student_XV, teacher_XV) > 0.3
    near_XV = trained(student_XV, teacher_XV, steps=400, gamma=gamma)
    assert distance(near_XV, teacher_XV) < SMALL
    assert distance(trained(near_XV, teacher_XV, steps=200, gamma=gamma), teacher_XV) < SMALL / 2


def test_the_return_from_the_next_token_alone_says_nothing_instead() -> None:
    """Negative control: without the single-step part to end at once costs nothing, so that is what is learnt."""
    student_XV, teacher_XV = tables()
    silent = listed(trained(student_XV, teacher_XV, steps=400, single=0.0), teacher_XV)
    at_once_N = silent.mask_NT.sum(1) == 1
    assert float(silent.chance_N[at_once_N].sum()) > 0.95
    assert float(silent.sequence_kl().detach()) > 0.3


def on_policy_distillation(table_XV: Tensor, teacher_XV: Tensor) -> Tensor:
    """Gradient of GKD at beta 1 on the student's own text (Agarwal et al. 2024), prefix by prefix: each prefix counts
    by the chance that the student gets there, which is not differentiated."""
    every = listed(table_XV, teacher_XV)
    seen: set[tuple[int, ...]] = set()
    total = torch.zeros((), dtype=table_XV.dtype)
    for n, (response, mask) in enumerate(zip(every.response_NT.tolist(), every.mask_NT.tolist(), strict=True)):
        for t in range(sum(mask)):
            if (prefix := tuple(response[:t])) not in seen:
                seen.add(prefix)
                chance = every.logq_NT.detach()[n, :t].sum().exp()
                total = total + chance * reverse_kl(every.logq_NTV[n, t][None], every.logp_NTV[n, t][None]).sum()
    return every.gradient(total)


def test_without_the_long_horizon_training_is_on_policy_distillation_step_for_step() -> None:
    start_XV, teacher_XV = tables()
    ours_XV = theirs_XV = whole_XV = start_XV
    for _ in range(30):
        ours_XV = trained(ours_XV, teacher_XV, steps=1, gamma=0.0)
        theirs_XV = stepped(theirs_XV, on_policy_distillation(theirs_XV, teacher_XV))
        whole_XV = trained(whole_XV, teacher_XV, steps=1)
        assert float((ours_XV - theirs_XV).abs().max()) < 1e-12
    assert float((ours_XV - whole_XV).abs().max()) > 0.05  # the long horizon goes another way

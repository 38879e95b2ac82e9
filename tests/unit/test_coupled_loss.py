"""A loss that compares whole responses: its value and gradient are those of autograd through whole logits, and those of
the closed forms, however tokens are cut into tiles.

Legend: N tokens, V vocabulary ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.pairwise_loss import Compared, Value, pair_logit, pairwise_loss
from minillm.scoring import STATISTICS, HeadWeights, TeacherView
from minillm.token_loss import Task, token_loss
from tests.heads import HEADS, SETTINGS, Case, N, gap

TINY = 1e-10
CHOSEN = slice(0, 5)
"""Tokens of the first response; all others are of the second."""
VALUES: tuple[Value, ...] = ("dpo", "tdpo1", "tdpo2")
BETA, ALPHA = 0.3, 0.4


def of_the_pair(numbers: Mapping[str, Tensor], _: slice, *, value: Value = "tdpo2") -> Tensor:
    """DPO's or TDPO's loss of two responses of 5 and 8 tokens."""
    rejected = slice(CHOSEN.stop, len(numbers["logq"]))
    ratio_N, kl_N = numbers["logq"] - numbers["logp"], numbers["forward_kl"]
    h_1 = pair_logit(
        value,
        Compared(
            m_w_B=ratio_N[CHOSEN].sum()[None], m_l_B=ratio_N[rejected].sum()[None],
            k_w_B=kl_N[CHOSEN].sum()[None], k_l_B=kl_N[rejected].sum()[None],
        ),
        alpha=ALPHA,
    )  # fmt: skip
    return pairwise_loss(h_1, beta=BETA).sum()


def of_all_numbers(numbers: Mapping[str, Tensor], _: slice) -> Tensor:
    """Everything by everything."""
    sums = torch.stack([number.sum() for name, number in numbers.items() if name != "logp"])
    return (sums.square().sum() + 1.0).log() + numbers["logq"][0] * numbers["entropy"][-1]


@pytest.mark.parametrize("cut", [(1, 1), (4, 3), (N, 5), (None, None)])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", [of_the_pair, of_all_numbers])
def test_value_and_gradient_are_those_of_whole_logits(
    loss: Any, head: dict[str, Any], settings: dict[str, Any], cut: tuple[int | None, int | None]
) -> None:
    case = Case(**head)
    task = case.task(tile=cut[0], piece=cut[1], **settings)
    mine, numbers = token_loss(case.hidden_NH, head=case.head, task=task, loss=loss, coupled=True)
    twin = case.twin(**settings)
    wanted = loss(twin, slice(0, N))
    assert gap(mine, wanted) < TINY
    for name in STATISTICS:
        assert gap(numbers[name], twin[name]) < TINY and not numbers[name].requires_grad, name
    for a, b in zip(*(torch.autograd.grad(3.0 * each, case.leaves) for each in (mine, wanted)), strict=True):
        assert gap(a, b) < 1e-9


def test_tiles_would_change_such_a_loss_if_it_were_not_told() -> None:
    """The control: without ``coupled`` it is called tile by tile."""
    case = Case()
    values = [
        token_loss(case.hidden_NH, head=case.head, task=case.task(tile=tile, piece=tile), loss=of_all_numbers)[0]
        for tile in (N, 7)
    ]
    assert gap(*values) > 0.1


@pytest.mark.parametrize("value", VALUES)
def test_what_reaches_the_logits_is_the_closed_form(value: Value) -> None:
    """With the identity as head, hidden states are logits: c (onehot - q), c (onehot - reference), and the mixture."""
    case = Case()
    eye = HeadWeights(weight_VH=torch.eye(case.weight_VH.shape[0], dtype=torch.float64), bias_V=None)
    logits_NV = case.head.logits(case.hidden_NH).detach().requires_grad_()
    ref_NV = case.teacher.head.logits(case.teacher.hidden_NH)
    task = Task(
        taken_N=case.taken_N, wanted=("logq", "logp", "forward_kl"), tile=4, piece=3,
        teacher=TeacherView(head=eye, hidden_NH=ref_NV),
    )  # fmt: skip
    h: list[Tensor] = []

    def loss(numbers: Mapping[str, Tensor], here: slice) -> Tensor:
        made = of_the_pair(numbers, here, value=value)
        h.append(made.detach())
        return made

    found, _ = token_loss(logits_NV, head=eye, task=task, loss=loss, coupled=True)
    (slope_NV,) = torch.autograd.grad(found, logits_NV)
    assert len(h) == 1
    c = -BETA * (1.0 - math.exp(-float(h[0])))  # 1 - sigma(beta h) = sigma(-beta h)
    q_NV, p_NV = logits_NV.detach().softmax(-1), ref_NV.softmax(-1)
    chosen_N1 = (torch.arange(N) < CHOSEN.stop)[:, None]
    other_NV = {
        "dpo": q_NV,
        "tdpo1": p_NV,
        "tdpo2": torch.where(chosen_N1, q_NV, (1 - ALPHA) * q_NV + ALPHA * p_NV),
    }
    taken_NV = torch.nn.functional.one_hot(case.taken_N, q_NV.shape[1]).double()
    sign_N1 = torch.where(chosen_N1, 1.0, -1.0).double()
    for name, minus_NV in other_NV.items():
        far = gap(slope_NV, sign_N1 * c * (taken_NV - minus_NV)) > 1e-3
        assert far == (name != value), name
    assert gap(slope_NV, sign_N1 * c * (taken_NV - other_NV[value])) < 1e-12


def test_a_reference_with_vanishing_probabilities_has_a_finite_kl() -> None:
    """Logits (0, -200) in 32 bits; the logarithm of a softmax is no number there."""
    ref_1V = torch.tensor([[0.0, -200.0]])
    eye = HeadWeights(weight_VH=torch.eye(2), bias_V=None)
    hidden_1H = torch.tensor([[0.3, 0.1]], requires_grad=True)
    task = Task(
        taken_N=torch.zeros(1, dtype=torch.long), wanted=("logq", "logp", "forward_kl"),
        teacher=TeacherView(head=eye, hidden_NH=ref_1V),
    )  # fmt: skip
    loss, numbers = token_loss(hidden_1H, head=eye, task=task, loss=lambda of, _: of["forward_kl"].sum(), coupled=True)
    (slope_1H,) = torch.autograd.grad(loss, hidden_1H)
    assert torch.isfinite(numbers["forward_kl"]).all() and torch.isfinite(slope_1H).all()
    p_1V = ref_1V.softmax(-1)
    assert torch.isnan((p_1V * p_1V.log()).sum())  # the control


def test_without_a_token_the_gradient_is_nothing() -> None:
    case = Case(tokens=0)
    loss, _ = token_loss(
        case.hidden_NH, head=case.head, task=case.task(), loss=lambda of, _: of["logq"].sum() + 2.0, coupled=True
    )
    assert loss.item() == 2.0
    assert all(float(grad.abs().sum()) == 0.0 for grad in torch.autograd.grad(loss, case.leaves))


def test_a_loss_of_no_number_has_no_gradient() -> None:
    case = Case()
    loss, _ = token_loss(
        case.hidden_NH, head=case.head, task=case.task(), loss=lambda *_: torch.tensor(2.0), coupled=True
    )
    assert all(float(grad.abs().sum()) == 0.0 for grad in torch.autograd.grad(loss, case.leaves))


def test_a_student_that_forbids_an_id_has_the_gradients_of_autograd() -> None:
    """Where the formulas do not hold, the definition is taken, in both passes alike."""
    case = Case()
    assert case.bias_V is not None
    with torch.no_grad():
        case.bias_V[3] = -math.inf
    case.taken_N[case.taken_N == 3] = 4

    def loss(of: Mapping[str, Tensor], _: slice) -> Tensor:
        return of["logq"].sum().square()

    task = case.task(tile=4, piece=3, wanted=("logq",))
    found, _ = token_loss(case.hidden_NH, head=case.head, task=task, loss=loss, coupled=True)
    logq_NV = case.head.logits(case.hidden_NH).log_softmax(-1)
    wanted = loss({"logq": logq_NV.gather(1, case.taken_N[:, None])}, slice(0, N))
    for a, b in zip(*(torch.autograd.grad(each, case.leaves[:1]) for each in (found, wanted)), strict=True):
        assert gap(a, b) < 1e-9

"""The fused loss: its numbers and gradients are those of autograd through whole logits. Its memory is in
``test_token_loss_memory``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import scoring
from minillm.kept import Kept
from minillm.policy_loss import clipped_surrogate
from minillm.scoring import STATISTICS, HeadWeights, Piece, TeacherView
from minillm.token_loss import Task, token_loss
from tests.heads import HEADS, JSD_BETA, SETTINGS, SKEW, STUDENT_H, Case, N, V, gap, gradients_of_twin, weights

TINY = 1e-10
VISIBLE = 1e-4
OF_THE_STUDENT = [name for name in STATISTICS if name != "logp"]


def total(numbers: Mapping[str, Tensor], here: slice) -> Tensor:
    """A loss that depends on every number, on some of them not linearly."""
    rest = sum((numbers[name] for name in OF_THE_STUDENT), torch.zeros(()))
    return (weights(N)[here] * (rest + numbers["logq"].exp() * numbers["reverse_kl"])).sum()


@pytest.mark.parametrize("cut", [(1, 1), (4, 3), (N, 5), (64, N), (None, None)])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_each_number_has_the_gradient_of_whole_logits(
    head: dict[str, Any], settings: dict[str, Any], cut: tuple[int | None, int | None]
) -> None:
    case = Case(**head)
    want = case.twin(**settings)
    for name in OF_THE_STUDENT:
        for mine, theirs in zip(
            case.gradients(name, tile=cut[0], piece=cut[1], **settings),
            gradients_of_twin(case, want[name]),
            strict=True,
        ):
            assert gap(mine, theirs) < TINY, name


@pytest.mark.parametrize("cut", [(4, 3), (N, N)])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_loss_of_all_numbers_together_has_theirs(settings: dict[str, Any], cut: tuple[int, int]) -> None:
    case = Case(scale=0.4, softcap=2.5)
    task = case.task(tile=cut[0], piece=cut[1], **settings)
    loss, numbers = token_loss(case.hidden_NH, head=case.head, task=task, loss=total)
    want = case.twin(**settings)
    wanted = total(want, slice(0, N))
    assert gap(loss, wanted) < TINY
    for name in STATISTICS:
        assert gap(numbers[name], want[name]) < TINY and not numbers[name].requires_grad, name
    mine, theirs = (torch.autograd.grad(each, case.leaves) for each in (3.0 * loss, 3.0 * wanted))
    assert max(gap(a, b) for a, b in zip(mine, theirs, strict=True)) < 1e-9


def with_infinities(case: Case, *, model: str) -> None:
    """One model forbids id 3 of token 5 by itself: a bias would be finite, so its hidden state and weight are."""
    bias = case.bias_V if model == "student" else case.teacher.head.bias_V
    assert bias is not None
    with torch.no_grad():
        bias[3] = -math.inf


@pytest.mark.parametrize("name", OF_THE_STUDENT)
def test_a_student_that_forbids_an_id_has_the_gradients_of_autograd(name: str) -> None:
    """Where the formulas do not hold, the twin's own way is taken."""
    case = Case()
    with_infinities(case, model="student")
    case.taken_N[case.taken_N == 3] = 4
    task = case.task(tile=4, piece=3)
    loss, numbers = token_loss(case.hidden_NH, head=case.head, task=task, loss=lambda n, _: n[name].sum())
    if name in {"forward_kl", "cached_kl"}:  # the teacher may say what the student cannot: infinite, and not hidden
        said_N = (case.kept().ids_NK == 3).any(dim=1) | (name == "forward_kl")
        assert torch.equal(numbers[name] == math.inf, said_N) and bool(said_N.any())
        assert gap(numbers[name][~said_N], case.tiled()[name][~said_N]) < TINY if not said_N.all() else True
        return
    (grad,) = torch.autograd.grad(loss, [case.hidden_NH])
    assert bool(grad.isfinite().all()) and bool((grad != 0).any())
    value_N = case.tiled()[name]
    assert gap(numbers[name], value_N) < TINY


def test_a_teacher_that_forbids_an_id_makes_the_reverse_kl_infinite() -> None:
    case = Case()
    with_infinities(case, model="teacher")
    _, numbers = token_loss(case.hidden_NH, head=case.head, task=case.task(), loss=lambda n, _: n["reverse_kl"].sum())
    assert bool((numbers["reverse_kl"] == math.inf).all())


def test_a_nan_is_not_hidden() -> None:
    case = Case()
    with torch.no_grad():
        case.hidden_NH[2, 0] = math.nan
    loss, numbers = token_loss(
        case.hidden_NH, head=case.head, task=case.task(), loss=lambda n, _: n["reverse_kl"].sum()
    )
    assert math.isnan(loss.item()) and numbers["reverse_kl"].isnan().sum() == 1


@pytest.mark.parametrize("fault", ["middle", "no-onehot", "no-mean", "no-rest"])
def test_a_wrong_formula_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison of gradients."""
    case = Case()
    if fault == "middle":
        right = Piece._middle
        monkeypatch.setattr(Piece, "_middle", lambda self, teachers, out: right(self, teachers * 1.01, out))
        name = "jsd"
    elif fault == "no-rest":  # as if only the kept ids were learnt
        right_kl = scoring.kept_forward_kl_

        def without(kept: Kept, *, q_nV: Tensor, **more: Any) -> Any:
            value_n, _ = right_kl(kept, q_nV=q_nV, **more)
            return value_n, q_nV.clone().scatter_add_(1, kept.ids_NK, -kept.logp_NJ[:, :-1].exp())

        monkeypatch.setattr(scoring, "kept_forward_kl_", without)
        name = "cached_kl"
    elif fault == "no-onehot":
        monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda self, *_: self)
        name = "logq"
    else:
        monkeypatch.setattr(Piece, "expected", lambda _, weight, value: torch.linalg.vecdot(weight, value) * 1.01)
        name = "reverse_kl"
    theirs = gradients_of_twin(case, case.twin()[name])
    assert max(gap(a, b) for a, b in zip(case.gradients(name, tile=4), theirs, strict=True)) > VISIBLE


@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_a_cached_teacher_has_at_most_the_forward_kl_and_with_all_ids_that_one_and_its_gradient(k: int) -> None:
    case = Case(scale=0.4, softcap=2.5)
    whole_N, kept = case.tiled(wanted=("forward_kl",))["forward_kl"], case.kept(k=k)
    cached_N = case.tiled(wanted=("cached_kl",), teacher=None, kept=kept)["cached_kl"]
    assert bool((cached_N <= whole_N + TINY).all()) and bool((cached_N >= 0.0).all())
    exact = gradients_of_twin(case, case.twin()["forward_kl"])
    mine = case.gradients("cached_kl", kept=kept, teacher=None, wanted=("cached_kl",), tile=4, piece=3)
    apart = max(gap(a, b) for a, b in zip(mine, exact, strict=True))
    assert (apart < TINY and gap(cached_N, whole_N) < TINY) if k >= V - 1 else apart > VISIBLE  # and a control


def test_a_rest_of_almost_nothing_keeps_its_digits() -> None:
    """In 32 bits 1 - sum(q) would be 0 here, and the divergence infinite."""
    logits_NV = torch.tensor([[0.0, -30.0, -31.0]])
    kept = Kept(ids_NK=torch.tensor([[0]]), logp_NJ=torch.tensor([[0.5, 0.5]]).log())
    head = HeadWeights(weight_VH=torch.eye(3), bias_V=None)
    task = Task(taken_N=torch.zeros(1, dtype=torch.long), wanted=("cached_kl",), kept=kept)
    leaf = logits_NV.requires_grad_()
    loss, _ = token_loss(leaf, head=head, task=task, loss=lambda n, _: n["cached_kl"].sum())
    rest = math.exp(-30.0) + math.exp(-31.0)
    assert loss.item() == pytest.approx(math.log(0.5) - 0.5 * math.log(rest), rel=1e-6)
    (grad,) = torch.autograd.grad(loss, leaf)
    share = math.exp(-30.0) / rest
    assert grad[0].tolist() == pytest.approx([0.5, -0.5 * share, -0.5 * (1.0 - share)], rel=1e-5)


def test_a_clipped_surrogate_goes_back_through_it() -> None:
    """The policy gradient's loss: a function of the log-prob with kinks, masked in places."""
    case = Case()
    old_N, advantage_N = case.twin()["logq"].detach() + 0.3 * weights(N).sin(), weights(N) - 1.2

    def surrogate(logq: Tensor, here: slice) -> Tensor:
        return clipped_surrogate(
            logq, old_N[here], advantage=advantage_N[here], importance=torch.ones_like(logq), clip=0.2,
            max_log_ratio=20.0,
        ).loss.sum()  # fmt: skip

    loss, _ = token_loss(
        case.hidden_NH,
        head=case.head,
        task=case.task(tile=3, wanted=("logq",)),
        loss=lambda n, here: surrogate(n["logq"], here),
    )
    wanted = surrogate(case.twin()["logq"], slice(0, N))
    mine, theirs = (torch.autograd.grad(each, case.leaves) for each in (loss, wanted))
    assert max(gap(a, b) for a, b in zip(mine, theirs, strict=True)) < TINY
    assert any(bool((grad != 0).any()) for grad in mine)


def test_no_token_has_a_loss_with_a_gradient_of_0() -> None:
    case = Case(tokens=0)
    loss, numbers = token_loss(
        case.hidden_NH, head=case.head, task=case.task(), loss=lambda n, _: n["reverse_kl"].sum()
    )
    assert loss.item() == 0.0 and {name: value.shape for name, value in numbers.items()} == dict.fromkeys(
        STATISTICS, (0,)
    )
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(loss, case.leaves))


def test_a_loss_that_depends_on_nothing_has_a_gradient_of_0() -> None:
    case = Case()
    loss, _ = token_loss(case.hidden_NH, head=case.head, task=case.task(), loss=lambda n, _: n["logq"].detach().sum())
    assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(loss, case.leaves))


def test_nothing_of_the_size_of_all_logits_is_kept_for_the_backward_pass() -> None:
    case, sizes = Case(), []

    def record(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss, _ = token_loss(case.hidden_NH, head=case.head, task=case.task(tile=2), loss=total)
    kept = vars(loss.grad_fn.grads)  # type: ignore[union-attr]
    largest = max(tensor.numel() for tensor in kept.values() if isinstance(tensor, Tensor))
    assert largest == V * STUDENT_H and all(size < 2 * V for size in sizes)


def test_frozen_heads_cost_no_gradient_of_their_size() -> None:
    case = Case()
    case.head = HeadWeights(weight_VH=case.weight_VH.detach(), bias_V=None)
    loss, _ = token_loss(case.hidden_NH, head=case.head, task=case.task(), loss=total)
    assert loss.grad_fn.grads.weight_VH is None  # type: ignore[union-attr]


def test_half_precision_has_losses_in_32_bits_and_gradients_in_16() -> None:
    case = Case()
    weight_VH = case.weight_VH.detach().bfloat16().requires_grad_()
    hidden_NH = case.hidden_NH.detach().bfloat16().requires_grad_()
    head = HeadWeights(weight_VH=weight_VH, bias_V=None)

    def of_tiles(tile: int) -> tuple[Tensor, dict[str, Tensor]]:
        task = Task(taken_N=case.taken_N, wanted=("logq", "entropy"), tile=tile)
        return token_loss(hidden_NH, head=head, task=task, loss=lambda n, _: n["logq"].sum())

    loss, numbers = of_tiles(4)
    assert loss.dtype == torch.float32 and {value.dtype for value in numbers.values()} == {torch.float32}
    for grad, leaf in zip(torch.autograd.grad(loss, [hidden_NH, weight_VH]), (hidden_NH, weight_VH), strict=True):
        assert grad.dtype == torch.bfloat16 and grad.shape == leaf.shape
    # ... summed over tiles in 32 bits: the same as one tile's to the last rounding
    (one,), (other,) = (torch.autograd.grad(of_tiles(tile)[0], [weight_VH]) for tile in (4, N))
    assert torch.allclose(one.float(), other.float(), rtol=2**-6, atol=2**-6)
    with pytest.raises(AssertionError, match="a second backward pass"):  # gradients are scaled in place, once
        torch.autograd.grad(loss, [weight_VH])


def test_the_teacher_receives_no_gradient_even_if_it_could() -> None:
    case = Case()
    head = case.teacher.head
    frozen = case.gradients("reverse_kl")
    thawed = TeacherView(
        head=HeadWeights(weight_VH=head.weight_VH.clone().requires_grad_(), bias_V=head.bias_V, scale=0.7),
        hidden_NH=case.teacher.hidden_NH,
    )
    for one, other in zip(frozen, case.gradients("reverse_kl", teacher=thawed), strict=True):
        assert gap(one, other) < TINY
    assert thawed.head.weight_VH.grad is None


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_skew_keeps_divergences_below_its_logarithm(temperature: float) -> None:
    numbers = Case(seed=3).tiled(temperature=temperature)
    assert float(numbers["skew_fkl"].max()) <= -math.log(SKEW) and float(numbers["skew_rkl"].max()) <= -math.log(SKEW)
    assert JSD_BETA != 0.5  # the twin's default would hide a forgotten argument

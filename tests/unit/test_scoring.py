"""Numbers per token, tile by tile, are those of whole logits, and rows of a head beyond the real ids do not exist.

The twin here knows no tiles, masks or infinities: it goes row by row and keeps only the allowed columns.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minillm import divergences
from minillm.errors import NonFinite
from minillm.models import Head
from minillm.sampling import pack_support
from minillm.scoring import STATISTICS, HeadWeights, score, spread, token_statistics
from minillm.types import PromptBatch, Rollout, Stop
from tests.heads import HEADS, JSD_BETA, SETTINGS, SKEW, STUDENT_H, TEACHER_H, Case, N, V, gap

TINY = 1e-10
VISIBLE = 1e-4


@pytest.mark.parametrize("cut", [(1, 1), (4, 3), (N, 5), (64, N), (None, None)])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("head", HEADS)
def test_tiles_have_the_values_of_whole_logits(
    head: dict[str, Any], settings: dict[str, Any], cut: tuple[int | None, int | None]
) -> None:
    case = Case(**head)
    want, got = case.twin(**settings), case.tiled(tile=cut[0], piece=cut[1], **settings)
    assert set(got) == set(STATISTICS)
    for name in STATISTICS:
        assert got[name].shape == (N,) and gap(got[name], want[name]) < TINY, name
        assert not got[name].requires_grad


@pytest.mark.parametrize(
    ("head", "settings", "twin"),
    [
        pytest.param({}, {"temperature": 0.7}, {}, id="temperature-forgotten"),
        pytest.param({}, {"support": True}, {}, id="support-forgotten"),
        pytest.param({}, {}, {"temperature": 1.01}, id="another-temperature"),
    ],
)
def test_the_twin_tells_settings_apart(head: dict[str, Any], settings: dict[str, Any], twin: dict[str, Any]) -> None:
    """Negative control of the comparison above."""
    case = Case(**head)
    got, other = case.tiled(tile=4, **settings), case.twin(**twin)
    for name in STATISTICS:
        assert gap(got[name], other[name]) > VISIBLE, name


@pytest.mark.parametrize("change", [{"softcap": None}, {"scale": 1.0}, {"bias_V": None}])
def test_the_twin_tells_heads_apart(change: dict[str, Any]) -> None:
    """Negative control: each part of a head counts."""
    case = Case(scale=0.4, softcap=2.5)
    want = case.twin()
    parts = {"weight_VH": case.weight_VH, "bias_V": case.bias_V, "scale": 0.4, "softcap": 2.5, **change}
    case.head = HeadWeights(**parts)
    assert gap(case.tiled(tile=4)["reverse_kl"], want["reverse_kl"]) > VISIBLE


@pytest.mark.parametrize("wanted", [("logq",), ("reverse_kl", "logq"), ("entropy",)])
def test_only_what_is_wanted_comes_back(wanted: tuple[str, ...]) -> None:
    case = Case()
    got = case.tiled(wanted=wanted, tile=4)
    assert tuple(got) == wanted
    for name in wanted:
        assert gap(got[name], case.twin()[name]) < TINY


def test_without_skew_a_skewed_divergence_is_the_plain_one_even_where_a_probability_underflows() -> None:
    case = Case()
    with torch.no_grad():
        case.weight_VH.mul_(100.0)  # e to the minus hundreds
    got = token_statistics(
        case.hidden_NH, head=case.head, taken_N=case.taken_N, teacher=case.teacher, kept=case.kept(),
        wanted=STATISTICS, skew=0.0,
    )  # fmt: skip
    logq_NV, logp_NV = (
        head.logits(hidden_NH).detach().log_softmax(-1)
        for head, hidden_NH in ((case.head, case.hidden_NH), (case.teacher.head, case.teacher.hidden_NH))
    )
    assert float(logq_NV.min()) < math.log(torch.finfo(torch.float64).tiny)
    for skewed, plain in (("skew_fkl", "forward_kl"), ("skew_rkl", "reverse_kl")):
        assert torch.equal(got[skewed], got[plain])
        assert gap(got[skewed], getattr(divergences, plain)(logq_NV, logp_NV)) < TINY


def test_no_token_is_an_empty_tensor() -> None:
    got = Case(tokens=0).tiled()
    assert {name: value.shape for name, value in got.items()} == dict.fromkeys(STATISTICS, (0,))


PADDING = 11
GARBAGE = {"nan": math.nan, "infinite": math.inf, "huge": 1e30, "zero": 0.0}


def padded_head(case: Case, garbage: float, *, real_ids: int = V) -> Head:
    """The case's head as a module whose matrix has more rows than there are ids."""
    projection = nn.Linear(STUDENT_H, V + PADDING, bias=True, dtype=torch.float64)
    assert case.bias_V is not None
    with torch.no_grad():
        projection.weight.copy_(torch.cat([case.weight_VH, torch.full((PADDING, STUDENT_H), garbage)]))
        projection.bias.copy_(torch.cat([case.bias_V, torch.full((PADDING,), garbage)]))
    return Head(projection, real_ids=real_ids, scale=case.head.scale, softcap=case.head.softcap)


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("tile", [4, N])
@pytest.mark.parametrize("garbage", list(GARBAGE))
def test_rows_beyond_the_real_ids_change_nothing_and_receive_no_gradient(
    garbage: str, tile: int, support: bool
) -> None:
    case = Case(scale=0.4, softcap=2.5)
    head = padded_head(case, GARBAGE[garbage])
    got = head(
        case.hidden_NH, taken_N=case.taken_N, wanted=STATISTICS, teacher=case.teacher, tile=tile,
        jsd_beta=JSD_BETA, skew=SKEW, kept=case.kept(support=support),
        support_NC=pack_support(case.support_NV) if support else None,
    )  # fmt: skip
    want = case.tiled(tile=tile, support=support)
    for name in STATISTICS:
        assert torch.equal(got[name], want[name]), name
    loss, _ = head(
        case.hidden_NH, task=case.task(tile=tile, support=support),
        loss=lambda numbers, here: torch.stack([numbers[name] for name in STATISTICS]).sum(),
    )  # fmt: skip
    loss.backward()
    weight, bias = head.weight.grad, head.bias.grad
    assert weight is not None and bias is not None
    assert bool((weight[V:] == 0).all()) and bool((bias[V:] == 0).all())
    assert bool((weight[:V] != 0).all()) and bool(weight.isfinite().all())
    assert head(case.hidden_NH).shape == (N, V)


@pytest.mark.parametrize("rows", [V, V + 1])
def test_counting_a_padded_row_as_real_would_be_seen(rows: int) -> None:
    """Negative control: a head cut one row too late has another softmax."""
    case = Case()
    head = padded_head(case, 3.0, real_ids=rows)
    got = head(case.hidden_NH, taken_N=case.taken_N, wanted=("logq", "entropy"))
    same = gap(got["logq"], case.twin()["logq"]) < TINY
    assert same is (rows == V)


def test_half_precision_weights_give_numbers_in_32_bits() -> None:
    case = Case()
    weight_VH, hidden_NH = case.weight_VH.detach().bfloat16(), case.hidden_NH.detach().bfloat16()
    values = token_statistics(
        hidden_NH, head=HeadWeights(weight_VH=weight_VH, bias_V=None), taken_N=case.taken_N, wanted=("logq", "entropy")
    )
    assert {value.dtype for value in values.values()} == {torch.float32}


def a_rollout(*, uids: tuple[str, ...] = ("x", "y")) -> Rollout:
    noise = torch.Generator().manual_seed(0)
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    return Rollout(
        prompts=PromptBatch(
            uid_B=uids, sample_B=(0, 0), ids_BP=torch.ones(2, 1, dtype=torch.long), mask_BP=torch.ones(2, 1) > 0
        ),
        response_BT=torch.randint(0, V, (2, 3), generator=noise),
        mask_BT=mask_BT,
        stop_B=(Stop.EOS, Stop.LENGTH),
        teacher_drew_BT=torch.zeros_like(mask_BT),
        logq_BT=torch.zeros(2, 3),
        student_hidden_BTH=torch.randn(2, 3, STUDENT_H, generator=noise, dtype=torch.float64),
        teacher_hidden_BTH=torch.randn(2, 3, TEACHER_H, generator=noise, dtype=torch.float64),
        support_BTC=None,
        policy_step=0,
    )


class OwnHead:
    """A student as ``score`` sees it."""

    def __init__(self, head: HeadWeights) -> None:
        self.head = head

    def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
        return token_statistics(hidden_NH, head=self.head, **arguments)


def test_scores_stand_where_their_tokens_stand_and_carry_no_gradient() -> None:
    case, rollout = Case(), a_rollout()
    scored = score(rollout, student=OwnHead(case.head), teacher_head=case.teacher.head, temperature=1.0)
    assert rollout.student_hidden_BTH is not None
    hidden_H, token = rollout.student_hidden_BTH[1, 2], rollout.response_BT[1, 2]
    want = case.head.logits(hidden_H[None]).log_softmax(-1)[0, token]
    assert gap(scored.logq_BT[1, 2], want.detach()) < TINY
    for value_BT in (scored.logq_BT, scored.logp_BT, scored.reverse_kl_BT, scored.entropy_BT):
        assert not value_BT.requires_grad and float(value_BT[0, 2]) == 0.0


def test_the_forward_divergence_is_there_only_where_it_is_asked_for() -> None:
    """Training does not ask, and must not pay."""
    case, rollout = Case(), a_rollout()
    wanted: list[tuple[str, ...]] = []

    class Listening:
        def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
            wanted.append(tuple(arguments["wanted"]))
            return token_statistics(hidden_NH, head=case.head, **arguments)

    options: dict[str, Any] = {"teacher_head": case.teacher.head, "temperature": 0.7}
    plain = score(rollout, student=Listening(), **options)
    both = score(rollout, student=Listening(), **options, forward_kl=True)
    assert plain.forward_kl_BT is None and both.forward_kl_BT is not None
    assert wanted == [
        ("logq", "logp", "entropy", "reverse_kl"),
        ("logq", "logp", "entropy", "reverse_kl", "forward_kl"),
    ]
    assert torch.equal(plain.reverse_kl_BT, both.reverse_kl_BT)
    assert rollout.student_hidden_BTH is not None and rollout.teacher_hidden_BTH is not None
    at = rollout.mask_BT
    logq_NV = (case.head.logits(rollout.student_hidden_BTH[at]) / 0.7).log_softmax(-1)
    logp_NV = (case.teacher.head.logits(rollout.teacher_hidden_BTH[at]) / 0.7).log_softmax(-1)
    want_N = (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)
    assert gap(both.forward_kl_BT[at], want_N.detach()) < TINY
    assert gap(plain.reverse_kl_BT[at], want_N.detach()) > VISIBLE  # the control


def test_a_rollout_under_a_repetition_penalty_is_not_scored() -> None:
    """States do not tell which logits were penalised: any score would be of another sampler."""
    case, rollout = Case(), dataclasses.replace(a_rollout(), repetition_penalty=1.2)
    with pytest.raises(AssertionError, match="penalised"):
        score(rollout, student=OwnHead(case.head), teacher_head=case.teacher.head, temperature=1.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_names_its_row_and_position(broken: float) -> None:
    case, rollout = Case(), a_rollout(uids=("good", "bad"))
    assert rollout.teacher_hidden_BTH is not None
    rollout.teacher_hidden_BTH[1, 2] = broken
    with pytest.raises(NonFinite, match=r"'bad', response position 2; no update"):
        score(rollout, student=OwnHead(case.head), teacher_head=case.teacher.head, temperature=1.0)


def test_a_state_off_the_mask_is_never_scored() -> None:
    """The control of the test above: the same NaN where no token was sampled harms nobody."""
    case, rollout = Case(), a_rollout()
    assert rollout.teacher_hidden_BTH is not None
    rollout.teacher_hidden_BTH[0, 2] = math.nan
    scored = score(rollout, student=OwnHead(case.head), teacher_head=case.teacher.head, temperature=1.0)
    assert bool(scored.reverse_kl_BT.isfinite().all())


def test_values_are_laid_back_in_row_order() -> None:
    mask_BT = torch.tensor([[True, False, True], [False, True, False]])
    assert spread(torch.tensor([1.0, 2.0, 3.0]), mask_BT).tolist() == [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]

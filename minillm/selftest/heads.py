"""From hidden states to the loss: tile by tile against whole logits, and which parts of a head may not count.

Legend: N tokens, V ids, H hidden width, C packed bytes of V. All in float64, on the device that runs would use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillm import sampling, scoring, token_loss
from minillm.divergences import kept_and_rest
from minillm.kept import Kept
from minillm.models import Head
from minillm.scoring import STATISTICS, HeadWeights, Task, TeacherView
from minillm.selftest.check import Check, Found, device, differing, gap, rough, worst

TOKENS, IDS, WIDTH, TEACHER_WIDTH = 11, 13, 5, 7
JSD_BETA, SKEW = 0.3, 0.2
MOST = 4
"""Ids of the teacher that are kept."""
SCALE, SOFTCAP = 0.4, 2.5
CUTS = ((1, 1), (4, 3), (TOKENS, TOKENS))
"""Tokens of a tile, and of a piece of it."""
CLOSE = 1e-10


class Case:
    """Rough heads and states; the student's are leaves."""

    def __init__(self) -> None:
        at = device()
        self.hidden_NH = rough(TOKENS, WIDTH, seed=1).to(at).requires_grad_()
        self.weight_VH = rough(IDS, WIDTH, seed=2).to(at).requires_grad_()
        self.bias_V = rough(IDS, seed=3).to(at).requires_grad_()
        self.head = HeadWeights(weight_VH=self.weight_VH, bias_V=self.bias_V, scale=SCALE, softcap=SOFTCAP)
        teacher = HeadWeights(weight_VH=rough(IDS, TEACHER_WIDTH, seed=4).to(at), bias_V=None)
        self.teacher = TeacherView(head=teacher, hidden_NH=rough(TOKENS, TEACHER_WIDTH, seed=5).to(at))
        self.taken_N = (torch.arange(TOKENS) * 5 % IDS).to(at)
        self.kept_NV = (rough(TOKENS, IDS, seed=6) > 0).to(at)
        self.kept_NV[torch.arange(TOKENS), self.taken_N] = True

    @property
    def leaves(self) -> list[Tensor]:
        """What the loss has a slope in."""
        return [self.hidden_NH, self.weight_VH, self.bias_V]

    def task(self, **settings: Any) -> Task:
        """Every number of each token; ``kept`` restricts them to some ids."""
        allowed_NV = self.kept_NV if settings.pop("kept", False) else None
        packed_NC = None if allowed_NV is None else sampling.pack_support(allowed_NV)
        plain = {"wanted": STATISTICS, "teacher": self.teacher, "jsd_beta": JSD_BETA, "skew": SKEW}
        plain["kept"] = self.cached(allowed_NV)
        return Task(**{"taken_N": self.taken_N, "support_NC": packed_NC, **plain, **settings})

    def cached(self, allowed_NV: Tensor | None = None) -> Kept:
        """The teacher's likeliest ids at temperature 1."""
        logits_NV = self.teacher.head.logits(self.teacher.hidden_NH)
        logp_NV = sampling.restrict(logits_NV, allowed_NV).log_softmax(dim=-1)
        ids_NK = logp_NV.topk(MOST, dim=-1).indices
        return Kept(ids_NK=ids_NK, logp_NJ=kept_and_rest(logp_NV, ids_NK))

    def whole(self, *, temperature: float = 1.0, kept: bool = False) -> dict[str, Tensor]:
        """The same numbers by their definitions, row by row from whole logits."""
        linear_NV = SCALE * (self.hidden_NH @ self.weight_VH.T + self.bias_V)
        student_NV = SOFTCAP * (linear_NV / SOFTCAP).tanh() / temperature
        teacher_NV = self.teacher.hidden_NH @ self.teacher.head.weight_VH.T
        rows = []
        for n, taken in enumerate(self.taken_N.tolist()):
            columns = self.kept_NV[n].nonzero()[:, 0] if kept else torch.arange(IDS, device=student_NV.device)
            row = numbers_of(
                student_NV[n, columns], teacher_NV[n, columns] / temperature, at=int((columns < taken).sum())
            )
            rows.append(row | {"cached_kl": cached_kl(student_NV[n, columns], teacher_NV[n, columns])})
        return {name: torch.stack([row[name] for row in rows]) for name in STATISTICS}


def numbers_of(student_V: Tensor, teacher_V: Tensor, *, at: int) -> dict[str, Tensor]:
    """All numbers of one token, written out."""
    q, p = student_V.softmax(0), teacher_V.softmax(0)

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * (first / second).log()).sum()

    middle = JSD_BETA * p + (1 - JSD_BETA) * q
    return {
        "logq": q[at].log(),
        "logp": p[at].log(),
        "entropy": -(q * q.log()).sum(),
        "reverse_kl": kl(q, p),
        "forward_kl": kl(p, q),
        "jsd": JSD_BETA * kl(p, middle) + (1 - JSD_BETA) * kl(q, middle),
        "skew_fkl": kl(p, SKEW * p + (1 - SKEW) * q),
        "skew_rkl": kl(q, (1 - SKEW) * p + SKEW * q),
    }


def cached_kl(student_V: Tensor, teacher_V: Tensor) -> Tensor:
    """The forward KL over the teacher's likeliest ids and all others together."""
    order = teacher_V.argsort(descending=True)
    q, p = student_V.softmax(0)[order], teacher_V.softmax(0)[order]
    q, p = (torch.cat([each[:MOST], each[MOST:].sum(0, keepdim=True)]) for each in (q, p))
    return torch.where(p > 0, p * (p / q.where(p > 0, 1.0)).log(), 0.0).sum()


def total(of: Mapping[str, Tensor], here: slice) -> Tensor:
    """A loss that depends on every number of every token in another way."""
    weight_N = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64, device=of["logq"].device)[here]
    sum_N = torch.stack([(1 + place) * of[name] for place, name in enumerate(STATISTICS) if name != "logp"]).sum(dim=0)
    return (weight_N * (sum_N + of["logq"].exp() * of["reverse_kl"])).sum()


def against_whole(**settings: Any) -> float:
    """The largest difference of a number or of a slope of the loss, over several ways to cut the tokens."""
    case = Case()
    want = case.whole(**settings)
    wanted = total(want, slice(0, TOKENS))
    slopes = torch.autograd.grad(wanted, case.leaves)
    errors = []
    for tile, piece in CUTS:
        task = case.task(tile=tile, piece=piece, **settings)
        loss, of = token_loss.token_loss(case.hidden_NH, head=case.head, task=task, loss=total)
        errors += [gap(loss, wanted), *(gap(of[name], want[name]) for name in STATISTICS)]
        errors += [gap(got, slope) for got, slope in zip(torch.autograd.grad(loss, case.leaves), slopes, strict=True)]
    return worst(*errors)


def tiled_loss() -> Found:
    """Every number, and the slopes of a loss of all of them, are those of whole logits."""
    return Found(against_whole(), CLOSE)


def tiled_loss_truncated() -> Found:
    """The same at another temperature and over the ids that top-k and top-p keep."""
    return Found(worst(against_whole(temperature=0.7), against_whole(temperature=1.6, kept=True)), CLOSE)


def no_infinity() -> Found:
    """An id that a student forbids by -inf leaves its loss finite, and has no slope."""
    case = Case()
    with torch.no_grad():
        case.bias_V[3] = -math.inf
    head = HeadWeights(weight_VH=case.weight_VH, bias_V=case.bias_V)
    taken_N = torch.where(case.taken_N == 3, 4, case.taken_N)
    task = case.task(taken_N=taken_N, wanted=("logq", "entropy", "reverse_kl"), tile=4, piece=3)
    loss, _ = token_loss.token_loss(
        case.hidden_NH, head=head, task=task, loss=lambda of, _: torch.stack(list(of.values())).sum()
    )
    kept_V = torch.arange(IDS, device=loss.device) != 3
    logq_NV = (case.hidden_NH @ case.weight_VH.T + case.bias_V)[:, kept_V].log_softmax(-1)
    logp_NV = case.teacher.head.logits(case.teacher.hidden_NH).log_softmax(-1)[:, kept_V]
    place_N1 = (taken_N - (taken_N > 3).long())[:, None]
    q_NV = logq_NV.exp()
    want = logq_NV.gather(1, place_N1).sum() + (q_NV * (logq_NV - logp_NV) - q_NV * logq_NV).sum()
    slopes, wanted = (torch.autograd.grad(value, case.leaves[:2]) for value in (loss, want))
    return Found(worst(gap(loss, want), *map(gap, slopes, wanted), slopes[1][3].abs()), CLOSE)


def padded_rows() -> Found:
    """Rows of a head past the real ids may hold anything: the same numbers to the bit, and no slope."""
    case, more = Case(), 6
    task = case.task(tile=4, piece=3)
    want, of = token_loss.token_loss(case.hidden_NH, head=case.head, task=task, loss=total)
    wanted = torch.autograd.grad(want, [case.weight_VH, case.bias_V])
    wrong = 0.0
    for garbage in (math.nan, math.inf, 1e30):
        projection = nn.Linear(WIDTH, IDS + more, dtype=torch.float64, device=want.device)
        with torch.no_grad():
            projection.weight.fill_(garbage)[:IDS] = case.weight_VH
            projection.bias.fill_(garbage)[:IDS] = case.bias_V
        head = Head(projection, real_ids=IDS, scale=SCALE, softcap=SOFTCAP)
        loss, found = head(case.hidden_NH, task=task, loss=total)
        slopes = torch.autograd.grad(loss, [head.weight, head.bias])
        wrong += differing(loss, want) + sum(differing(found[name], of[name]) for name in STATISTICS)
        wrong += sum(differing(got[:IDS], slope) for got, slope in zip(slopes, wanted, strict=True))
        wrong += sum(float((slope[IDS:] != 0).sum()) for slope in slopes)
    return Found(wrong, 0.0)


def temperature() -> Found:
    """Both models' logits times 3 at temperature 2.1 are those at 0.7; at temperature 1 nothing is done."""
    case = Case()

    def at(scale: float, degrees: float) -> dict[str, Tensor]:
        student = HeadWeights(weight_VH=case.weight_VH, bias_V=case.bias_V, scale=scale)
        guide = HeadWeights(weight_VH=case.teacher.head.weight_VH, bias_V=None, scale=scale)
        return scoring.token_statistics(
            case.hidden_NH, head=student, taken_N=case.taken_N, wanted=STATISTICS, temperature=degrees,
            teacher=TeacherView(head=guide, hidden_NH=case.teacher.hidden_NH), kept=case.cached(),
        )  # fmt: skip

    cold, same, plain = at(1.0, 0.7), at(3.0, 2.1), at(1.0, 1.0)
    logq_NV = (case.hidden_NH @ case.weight_VH.T + case.bias_V).log_softmax(-1)
    logq_N = logq_NV.gather(1, case.taken_N[:, None])[:, 0]
    return Found(worst(gap(plain["logq"], logq_N), *(gap(same[name], cold[name]) for name in STATISTICS)), CLOSE)


def language_model() -> Found:
    """Cross-entropy on a reference has the slope q - 1 at its token, brought to the hidden states."""
    case = Case()
    head = HeadWeights(weight_VH=case.weight_VH, bias_V=case.bias_V)
    task = Task(taken_N=case.taken_N, wanted=("logq",), tile=4, piece=3)
    loss, _ = token_loss.token_loss(case.hidden_NH, head=head, task=task, loss=lambda of, _: -of["logq"].sum())
    slope_NV = head.logits(case.hidden_NH).softmax(-1).detach()
    slope_NV -= nn.functional.one_hot(case.taken_N, IDS)
    (got_NH,) = torch.autograd.grad(loss, case.hidden_NH)
    return Found(gap(got_NH, slope_NV @ case.weight_VH), CLOSE)


def stop_gradients() -> Found:
    """Neither the teacher's head and states nor the numbers that come back carry a gradient."""
    case = Case()
    view = TeacherView(
        head=HeadWeights(weight_VH=case.teacher.head.weight_VH.clone().requires_grad_(), bias_V=None),
        hidden_NH=case.teacher.hidden_NH.clone().requires_grad_(),
    )
    loss, of = token_loss.token_loss(case.hidden_NH, head=case.head, task=case.task(teacher=view), loss=total)
    reached = torch.autograd.grad(loss, [view.head.weight_VH, view.hidden_NH, *case.leaves], allow_unused=True)
    wrong = sum(slope is not None for slope in reached[:2]) + sum(slope is None for slope in reached[2:])
    return Found(float(wrong + sum(value.requires_grad for value in of.values())), 0.0)


CHECKS = (
    Check(name="loss: tiles against whole logits", run=tiled_loss),
    Check(name="loss: the same tempered and truncated", run=tiled_loss_truncated),
    Check(name="loss: ids forbidden by -inf", run=no_infinity),
    Check(name="loss: padded rows of a vocabulary", run=padded_rows),
    Check(name="loss: temperature and scale cancel", run=temperature),
    Check(name="loss: cross-entropy's slope", run=language_model),
    Check(name="loss: the teacher gets no gradient", run=stop_gradients),
)

"""Random heads and hidden states in float64 beside their slow obvious twin, for tests of numbers per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.divergences import kept_and_rest
from minillm.kept import Kept
from minillm.sampling import pack_support, restrict
from minillm.scoring import STATISTICS, HeadWeights, TeacherView, token_statistics
from minillm.token_loss import Task, token_loss

N, V, STUDENT_H, TEACHER_H = 13, 21, 6, 9
JSD_BETA, SKEW = 0.3, 0.2
K = 8
"""Ids that are kept of the teacher, more than some tokens' supports have."""
HEADS = [
    pytest.param({"bias": False}, id="plain"),
    pytest.param({}, id="bias"),
    pytest.param({"scale": 0.4, "softcap": 2.5}, id="bias-scale-softcap"),
]
SETTINGS = [
    pytest.param({}, id="all-ids"),
    pytest.param({"temperature": 0.7}, id="temperature"),
    pytest.param({"temperature": 1.6, "support": True}, id="temperature-support"),
]


class Case:
    """Random heads and hidden states in float64, the student's as leaves of a graph."""

    def __init__(self, *, seed: int = 0, tokens: int = N, **head: Any) -> None:
        noise = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=noise, dtype=torch.float64)

        bias = head.pop("bias", True)
        self.hidden_NH = random(tokens, STUDENT_H).requires_grad_()
        self.weight_VH = random(V, STUDENT_H).requires_grad_()
        self.bias_V = random(V).requires_grad_() if bias else None
        self.head = HeadWeights(weight_VH=self.weight_VH, bias_V=self.bias_V, **head)
        self.teacher = TeacherView(
            head=HeadWeights(weight_VH=random(V, TEACHER_H), bias_V=random(V), scale=0.7),
            hidden_NH=random(tokens, TEACHER_H),
        )
        self.taken_N = torch.randint(0, V, (tokens,), generator=noise)
        self.support_NV = torch.rand(tokens, V, generator=noise) < 0.5
        self.support_NV[torch.arange(tokens), self.taken_N] = True

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.hidden_NH, self.weight_VH, self.bias_V) if leaf is not None]

    def kept(self, *, support: bool = False, k: int = K) -> Kept:
        """The teacher's likeliest ids at temperature 1, of the support if there is one."""
        logits_NV = self.teacher.head.logits(self.teacher.hidden_NH)
        logp_NV = restrict(logits_NV, self.support_NV if support else None).log_softmax(dim=-1)
        ids_NK = logp_NV.topk(k, dim=-1).indices
        return Kept(ids_NK=ids_NK, logp_NJ=kept_and_rest(logp_NV, ids_NK))

    def tiled(self, **options: Any) -> dict[str, Tensor]:
        support = self.support_NV if options.pop("support", False) else None
        return token_statistics(
            self.hidden_NH,
            head=self.head,
            taken_N=self.taken_N,
            teacher=options.pop("teacher", self.teacher),
            wanted=options.pop("wanted", STATISTICS),
            kept=options.pop("kept", None) or self.kept(support=support is not None),
            support_NC=None if support is None else pack_support(support),
            jsd_beta=JSD_BETA,
            skew=SKEW,
            **options,
        )

    def task(self, **options: Any) -> Task:
        """The same question as ``tiled``'s, for ``token_loss``."""
        support = self.support_NV if options.pop("support", False) else None
        return Task(
            taken_N=self.taken_N,
            teacher=options.pop("teacher", self.teacher),
            wanted=options.pop("wanted", STATISTICS),
            kept=options.pop("kept", None) or self.kept(support=support is not None),
            support_NC=None if support is None else pack_support(support),
            jsd_beta=JSD_BETA,
            skew=SKEW,
            **options,
        )

    def gradients(self, name: str, **options: Any) -> list[Tensor]:
        """Of ``token_loss`` with the weighted sum of one number as the loss (see ``weights``)."""
        weight_N = weights(len(self.taken_N))
        loss, _ = token_loss(
            self.hidden_NH,
            head=self.head,
            task=self.task(**options),
            loss=lambda numbers, here: (weight_N[here] * numbers[name]).sum(),
        )
        return list(torch.autograd.grad(loss, self.leaves))

    def twin(self, *, temperature: float = 1.0, support: bool = False) -> dict[str, Tensor]:
        """The same, row by row from whole logits."""
        rows = [self._row(i, temperature=temperature, support=support) for i in range(len(self.taken_N))]
        return {name: torch.stack([row[name] for row in rows]) for name in STATISTICS}

    def _row(self, i: int, *, temperature: float, support: bool) -> dict[str, Tensor]:
        kept = self.support_NV[i].nonzero()[:, 0] if support else torch.arange(V)
        at = int((kept == self.taken_N[i]).nonzero())
        z = self.hidden_NH[i] @ self.weight_VH.T * self.head.scale
        if self.bias_V is not None:
            z = z + self.bias_V * self.head.scale
        if self.head.softcap is not None:
            z = torch.tanh(z / self.head.softcap) * self.head.softcap
        assert self.teacher.head.bias_V is not None
        y = (self.teacher.hidden_NH[i] @ self.teacher.head.weight_VH.T + self.teacher.head.bias_V) * 0.7
        q, p = torch.softmax(z[kept] / temperature, 0), torch.softmax(y[kept] / temperature, 0)
        m = JSD_BETA * p + (1 - JSD_BETA) * q
        plain = torch.softmax(y[kept], 0)
        top = plain.argsort(descending=True)[:K]
        rest = torch.ones_like(plain, dtype=torch.bool).index_fill(0, top, False)
        cached = (plain[top] * (plain[top] / q[top]).log()).sum()
        if rest.any():
            cached = cached + plain[rest].sum() * (plain[rest].sum() / q[rest].sum()).log()
        return {
            "logq": q[at].log(),
            "logp": p[at].log(),
            "entropy": -(q * q.log()).sum(),
            "reverse_kl": (q * (q / p).log()).sum(),
            "forward_kl": (p * (p / q).log()).sum(),
            "skew_fkl": (p * (p / (SKEW * p + (1 - SKEW) * q)).log()).sum(),
            "skew_rkl": (q * (q / ((1 - SKEW) * p + SKEW * q)).log()).sum(),
            "cached_kl": cached,
            "jsd": JSD_BETA * (p * (p / m).log()).sum() + (1 - JSD_BETA) * (q * (q / m).log()).sum(),
        }


def weights(tokens: int) -> Tensor:
    """Each token has another, so that no token can stand in for another."""
    return torch.linspace(0.5, 2.0, tokens, dtype=torch.float64)


def gradients_of_twin(case: Case, value_N: Tensor) -> list[Tensor]:
    """Of the same weighted sum, by autograd through whole logits."""
    total = (weights(len(value_N)) * value_N).sum()
    return list(torch.autograd.grad(total, case.leaves, retain_graph=True))


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())

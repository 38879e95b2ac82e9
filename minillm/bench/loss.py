"""The loss core against whole logits: time of forward and backward, and the memory beyond inputs and gradients.

Legend: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.bench.memory import extra_peak
from minillm.bench.pairs import Spread, in_turns, ratio, spread_of, threads
from minillm.scoring import HeadWeights, TeacherView
from minillm.token_loss import Task, token_loss

VARIANTS = ("tiles", "whole_logits")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCase:
    """One size at which both are measured."""

    tokens: int
    vocabulary: int
    hidden: int
    teacher_hidden: int
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LossFigures:
    """What was found for one case; seconds and bytes by variant."""

    case: LossCase
    seconds: dict[str, Spread]
    extra_bytes: dict[str, int]
    time_fraction: Spread
    """Tiles over whole logits."""
    memory_fraction: float


def measure_loss(case: LossCase, *, repeats: int) -> LossFigures:
    """MiniLLM's loss (reverse KL and a policy gradient) with its gradient, as it is trained and written out."""
    work = LossWork(case)
    with threads(case.threads):
        seconds = in_turns(
            {name: getattr(work, name) for name in VARIANTS}, repeats=repeats, device=torch.device(case.device)
        )
    extra = {name: _extra_bytes(case, name) for name in VARIANTS}
    return LossFigures(
        case=case,
        seconds={name: spread_of(values) for name, values in seconds.items()},
        extra_bytes=extra,
        time_fraction=ratio(seconds["tiles"], seconds["whole_logits"]),
        memory_fraction=extra["tiles"] / extra["whole_logits"],
    )


def whole_logits_loss(
    hidden_NH: Tensor, *, head: HeadWeights, teacher: TeacherView, taken_N: Tensor, advantage_N: Tensor
) -> Tensor:
    """The same loss through autograd, with both models' logits and what softmax makes of them whole: the slow twin."""
    logq_NV = head.logits(hidden_NH).log_softmax(dim=-1)
    logp_NV = teacher.head.logits(teacher.hidden_NH).log_softmax(dim=-1)
    single = (logq_NV.exp() * (logq_NV - logp_NV)).sum()
    return single - (advantage_N * logq_NV.gather(1, taken_N[:, None])[:, 0]).sum()


class LossWork:
    """Random inputs of one case, and both variants over them."""

    def __init__(self, case: LossCase) -> None:
        noise = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=noise) * scale).to(case.device, dtype)

        def head_of(width: int) -> HeadWeights:
            return HeadWeights(weight_VH=random(case.vocabulary, width, scale=width**-0.5), bias_V=None)

        self.hidden_NH = random(case.tokens, case.hidden).requires_grad_()
        self.head = head_of(case.hidden)
        self.head.weight_VH.requires_grad_()
        self.teacher = TeacherView(
            head=head_of(case.teacher_hidden), hidden_NH=random(case.tokens, case.teacher_hidden)
        )
        self.taken_N = torch.randint(0, case.vocabulary, (case.tokens,), generator=noise).to(case.device)
        self.advantage_N = torch.randn(case.tokens, generator=noise).to(case.device)

    def tiles(self) -> Tensor:
        """The loss as it is trained; its gradients are in ``hidden_NH.grad`` and ``head.weight_VH.grad``."""
        task = Task(taken_N=self.taken_N, wanted=("logq", "reverse_kl"), teacher=self.teacher)
        return self._with_gradient(token_loss(self.hidden_NH, head=self.head, task=task, loss=self._of_a_tile)[0])

    def whole_logits(self) -> Tensor:
        """The same through ``whole_logits_loss``."""
        return self._with_gradient(
            whole_logits_loss(
                self.hidden_NH, head=self.head, teacher=self.teacher, taken_N=self.taken_N, advantage_N=self.advantage_N
            )
        )

    def _of_a_tile(self, numbers: Mapping[str, Tensor], here: slice) -> Tensor:
        return numbers["reverse_kl"].sum() - (self.advantage_N[here] * numbers["logq"]).sum()

    def _with_gradient(self, loss: Tensor) -> Tensor:
        self.hidden_NH.grad = self.head.weight_VH.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _extra_bytes(case: LossCase, variant: str) -> int:
    """In a process of its own, whose allocator has seen nothing else."""
    if case.device != "cpu":
        return _extra_here(case, variant)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_extra_here, (case, variant))


def _extra_here(case: LossCase, variant: str) -> int:
    with threads(case.threads):
        return extra_peak(getattr(LossWork(case), variant), device=torch.device(case.device))

"""A loss on final hidden states, fused with its own gradient: heads, softmax, divergences and their derivatives in one
pass over tiles of tokens.

Legend: N tokens, n tokens of a tile, V real vocabulary ids, H hidden width, C packed bytes of V.

Logits of a tile exist once. Each tile gives its numbers per token; the objective makes a loss of them; the derivative
of that loss by each number (of size [n]) is pulled back, by formulas written out below, through the softmax and the
head into gradients of hidden states and head. So nothing of size [N, V] is kept, no logits are computed twice, and the
backward pass only multiplies by the number that comes from above (the idea of fused linear losses, Hsu et al. 2024,
"Liger Kernel"; here for a loss that is any function of the numbers of each token).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.sampling import restrict, unpack_support
from minillm.scoring import HeadWeights, TeacherView, rows_of_a_tile, tile_statistics

TileLoss = Callable[[Mapping[str, Tensor], slice], Tensor]
"""From the numbers of a tile's tokens, each [n], and their place among all N, to the tile's share of the loss. It must
be a sum over tokens, or how tokens are cut into tiles would change it."""


OF_ONE_MODEL = {"logq", "logp", "entropy"}
"""Numbers that are no divergence between the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked about each of N tokens."""

    taken_N: Tensor
    wanted: tuple[str, ...]
    temperature: float = 1.0
    teacher: TeacherView | None = None
    support_NC: Tensor | None = None
    jsd_beta: float = 0.5
    skew: float = 0.1
    tile: int | None = None


def token_loss(hidden_NH: Tensor, *, head: HeadWeights, task: Task, loss: TileLoss) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of ``loss`` over tiles, a scalar with gradient to hidden states and head; and the numbers [N], without.

    The numbers are those of ``scoring.tile_statistics``. With N = 0 the loss of an empty tile comes out, and its
    gradient is 0. Only the first derivative exists.
    """
    out: dict[str, Tensor] = {}
    value: Tensor = _TokenLoss.apply(hidden_NH, head.weight_VH, head.bias_V, head, task, loss, out)  # type: ignore[no-untyped-call]
    return value, out


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd takes arguments by position)
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: HeadWeights,
        task: Task,
        loss: TileLoss,
        out: dict[str, Tensor],
    ) -> Tensor:
        own = HeadWeights(weight_VH=weight_VH, bias_V=bias_V, scale=head.scale, softcap=head.softcap)
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        grads = _Gradients(
            hidden_NH=torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None,
            weight_VH=torch.zeros_like(weight_VH, dtype=wide) if ctx.needs_input_grad[1] else None,
            bias_V=torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and ctx.needs_input_grad[2] else None,
        )
        count = hidden_NH.shape[0]
        rows = task.tile or rows_of_a_tile(weight_VH.shape[0])
        total = hidden_NH.new_zeros((), dtype=wide)
        parts: dict[str, list[Tensor]] = {name: [] for name in task.wanted}
        for start in range(0, max(count, 1), rows):
            here = slice(start, min(start + rows, count))
            tile = _Tile(hidden_NH[here], head=own, task=task, here=here)
            value, by_number = _differentiate(loss, tile.values, here)
            total += value
            for name in task.wanted:
                parts[name].append(tile.values[name])
            grads.add(tile.pulled_back(by_number), hidden_nH=hidden_NH[here], head=own, here=here)
        out.update({name: torch.cat(columns) for name, columns in parts.items()})
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        grads: _Gradients | None = ctx.grads
        assert grads is not None, "a second backward pass: the first one used the gradients up"
        ctx.grads = None
        hidden, weight, bias = (  # in place: that of a head is as large as the head
            None if grad is None else grad.mul_(from_above).to(kept)
            for grad, kept in zip((grads.hidden_NH, grads.weight_VH, grads.bias_V), grads.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None, None, None


class _Gradients:
    """Gradients of the loss by hidden states and head, filled tile by tile; those of the head in 32 bits."""

    def __init__(self, *, hidden_NH: Tensor | None, weight_VH: Tensor | None, bias_V: Tensor | None) -> None:
        self.hidden_NH, self.weight_VH, self.bias_V = hidden_NH, weight_VH, bias_V
        self.dtypes: tuple[torch.dtype, ...] = ()

    def add(self, slope_nV: Tensor | None, *, hidden_nH: Tensor, head: HeadWeights, here: slice) -> None:
        """Takes in the derivatives of one tile's loss by its logits."""
        self.dtypes = (hidden_nH.dtype, head.weight_VH.dtype, head.weight_VH.dtype)
        if slope_nV is None:
            return
        narrow_nV = slope_nV.to(head.weight_VH.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[here] = narrow_nV @ head.weight_VH
        if self.weight_VH is not None:
            if self.weight_VH.dtype == narrow_nV.dtype:
                self.weight_VH.addmm_(narrow_nV.T, hidden_nH)
            else:
                self.weight_VH += narrow_nV.T @ hidden_nH
        if self.bias_V is not None:
            self.bias_V += slope_nV.sum(dim=0)


def _differentiate(loss: TileLoss, values: Mapping[str, Tensor], here: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """The tile's loss, and its derivative [n] by each number that it depends on."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        value = loss(leaves, here)
        if not value.requires_grad:
            return value.detach(), {}
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    slopes = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    return value.detach(), slopes


class _Tile:
    """Numbers of one tile's tokens, and the way back from derivatives by the numbers to derivatives by the logits."""

    def __init__(self, hidden_nH: Tensor, *, head: HeadWeights, task: Task, here: slice) -> None:
        self._head, self._task = head, task
        self._taken_n1 = task.taken_N[here][:, None]
        self._support_nV = (
            None if task.support_NC is None else unpack_support(task.support_NC[here], head.weight_VH.shape[0])
        )
        student_nV = head.logits(hidden_nH)
        self._capped_nV = student_nV.clone() if head.softcap is not None else None
        teacher_nV = None if task.teacher is None else task.teacher.head.logits(task.teacher.hidden_NH[here])
        self._graph: tuple[Tensor, dict[str, Tensor]] | None = None
        if _finite(student_nV) and (teacher_nV is None or _finite(teacher_nV)):
            self.values = self._by_formula(student_nV, teacher_nV)
        else:
            self.values = self._by_autograd(student_nV, teacher_nV)

    def _by_autograd(self, student_nV: Tensor, teacher_nV: Tensor | None) -> dict[str, Tensor]:
        """The rare case: a model that forbids a token by a logit of -inf, or a NaN, which must not be hidden."""
        with torch.enable_grad():
            leaf_nV = student_nV.requires_grad_()
            values = tile_statistics(
                leaf_nV, teacher_nV, taken_n=self._taken_n1[:, 0], temperature=self._task.temperature,
                support_nV=self._support_nV, wanted=self._task.wanted, jsd_beta=self._task.jsd_beta,
                skew=self._task.skew,
            )  # fmt: skip
        values = {name: values[name] for name in self._task.wanted}
        self._graph = (leaf_nV, values)
        return {name: value.detach() for name, value in values.items()}

    def _by_formula(self, student_nV: Tensor, teacher_nV: Tensor | None) -> dict[str, Tensor]:
        task = self._task
        self._logq_nV = self._log_softmax(student_nV)
        values = {"logq": self._logq_nV.gather(1, self._taken_n1)[:, 0]}
        if self._support_nV is not None:  # weight 0 and log-weight 0: such columns then drop out of every sum below
            self._q_nV = self._logq_nV.exp()
            self._logq_nV = self._logq_nV.masked_fill_(~self._support_nV, 0.0)
        else:
            self._q_nV = self._logq_nV.exp()
        if "entropy" in task.wanted:
            values["entropy"] = -_rowwise(self._q_nV, self._logq_nV)
        if teacher_nV is not None:
            self._logp_nV = self._log_softmax(teacher_nV)
            values["logp"] = self._logp_nV.gather(1, self._taken_n1)[:, 0]
            self._p_nV = self._logp_nV.exp() if {"forward_kl", "jsd", "skew_fkl", "skew_rkl"} & {*task.wanted} else None
            if self._support_nV is not None:
                self._logp_nV.masked_fill_(~self._support_nV, 0.0)
            self._found = {name: self._divergence(name) for name in task.wanted if name not in OF_ONE_MODEL}
            values |= {name: found[0] for name, found in self._found.items()}
        return {name: values[name] for name in task.wanted}

    def _log_softmax(self, logits_nV: Tensor) -> Tensor:
        tempered_nV = logits_nV if self._task.temperature == 1.0 else logits_nV.div_(self._task.temperature)
        return restrict(tempered_nV, self._support_nV).log_softmax(dim=-1)

    def _middle(self, teachers: float) -> Tensor:
        """log(teachers p + (1 - teachers) q), 0 off the support."""
        assert self._p_nV is not None
        middle_nV = torch.lerp(self._q_nV, self._p_nV, teachers)
        if self._support_nV is not None:
            middle_nV.masked_fill_(~self._support_nV, 1.0)
        return middle_nV.clamp_(min=torch.finfo(middle_nV.dtype).tiny).log_()

    def _divergence(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(value [n], f, extra): its derivative by a logit is q (f - E_q f) + extra; None stands for 0."""
        q, logq, p, logp = self._q_nV, self._logq_nV, self._p_nV, self._logp_nV
        if name == "reverse_kl":
            gap = logq - logp
            return _rowwise(q, gap), gap, None
        assert p is not None
        if name == "forward_kl":  # E_p log(p/q): by a logit, q - p
            return _rowwise(p, logp - logq), None, q - p
        if name == "jsd":
            beta = self._task.jsd_beta
            log_m = self._middle(beta)
            gap = (logq - log_m).mul_(1.0 - beta)
            return beta * _rowwise(p, logp - log_m) + _rowwise(q, gap), gap, None
        skew = self._task.skew
        if name == "skew_fkl":  # KL(p || a p + (1-a) q): by q, -(1-a) p/m
            log_m = self._middle(skew)
            return _rowwise(p, logp - log_m), -(1.0 - skew) * p * log_m.neg().exp(), None
        assert name == "skew_rkl", name  # KL(q || (1-a) p + a q): by q, log(q/m) + 1 - a q/m
        log_m = self._middle(1.0 - skew)
        gap = logq - log_m
        return _rowwise(q, gap), gap - skew * gap.exp(), None

    def pulled_back(self, slopes: Mapping[str, Tensor]) -> Tensor | None:
        """Derivative of the tile's loss by the head's linear outputs, [n, V]; ``None`` where it depends on none."""
        slopes = {name: slope for name, slope in slopes.items() if name != "logp"}
        if not slopes or not self._taken_n1.numel():
            return None
        slope_nV = self._pulled_by_autograd(slopes) if self._graph is not None else self._pulled_by_formula(slopes)
        if self._capped_nV is not None:
            assert self._head.softcap is not None
            slope_nV = slope_nV * (1.0 - (self._capped_nV / self._head.softcap).square_())
        return slope_nV if self._head.scale == 1.0 else slope_nV * self._head.scale

    def _pulled_by_autograd(self, slopes: Mapping[str, Tensor]) -> Tensor:
        assert self._graph is not None
        leaf_nV, values = self._graph
        (slope_nV,) = torch.autograd.grad([values[name] for name in slopes], leaf_nV, list(slopes.values()))
        return slope_nV

    def _pulled_by_formula(self, slopes: Mapping[str, Tensor]) -> Tensor:
        """q (F - E_q F) with F the slopes' sum of each number's f, and what is not of that form."""
        inner_nV: Tensor | None = None
        outer_nV: Tensor | None = None
        for name, slope_n in slopes.items():
            if name == "logq":
                continue
            f_nV, extra_nV = (-self._logq_nV, None) if name == "entropy" else self._found[name][1:]
            if f_nV is not None:
                inner_nV = _plus(inner_nV, f_nV.mul_(slope_n[:, None]))
            if extra_nV is not None:
                outer_nV = _plus(outer_nV, extra_nV.mul_(slope_n[:, None]))
        mean_n1 = torch.zeros_like(self._q_nV[:, :1]) if inner_nV is None else _rowwise(self._q_nV, inner_nV)[:, None]
        if "logq" in slopes:
            mean_n1 = mean_n1 + slopes["logq"][:, None]
        slope_nV = self._q_nV * (-mean_n1 if inner_nV is None else inner_nV.sub_(mean_n1))
        if outer_nV is not None:
            slope_nV += outer_nV
        if "logq" in slopes:
            slope_nV.scatter_add_(1, self._taken_n1, slopes["logq"][:, None])
        return slope_nV if self._task.temperature == 1.0 else slope_nV.div_(self._task.temperature)


def _plus(so_far: Tensor | None, more: Tensor) -> Tensor:
    return more if so_far is None else so_far.add_(more)


def _finite(logits_nV: Tensor) -> bool:
    """Whether no logit is -inf or NaN; an empty tile has none."""
    return logits_nV.numel() == 0 or bool(logits_nV.amin() > -torch.inf)


def _rowwise(weight_nV: Tensor, value_nV: Tensor) -> Tensor:
    """Sum over columns of weight times value, [n]."""
    total_n: Tensor = torch.linalg.vecdot(weight_nV, value_nV)
    return total_n

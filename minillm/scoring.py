"""From final hidden states to numbers per token: both heads applied tile by tile, nothing of size [tokens,
vocabulary] kept.

Legend: N kept tokens, n tokens of a tile or of a piece of it, V real vocabulary ids, H hidden width (each model its
own), C packed bytes of V. A *head* turns a hidden state into logits over the real ids; rows of a head beyond those are
cut off before the softmax, so both distributions are renormalised exactly and a padded row can neither be drawn nor
receive a gradient (design D2, D9).

Tokens are cut twice. Matrix products want many at a time, or a whole head is read from memory for a few: a *tile*. All
else is elementwise and wants what it works on in the processor's cache: a *piece* of a tile. So of a tile's size there
is one tensor for each model, and what softmax and divergences need besides is of a piece's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from minillm.by_definition import tile_statistics
from minillm.kept import Kept, kept_forward_kl_
from minillm.sampling import unpack_support
from minillm.scored_rows import require_finite, spread
from minillm.types import Rollout, Scored

WORKING_BYTES = {"cpu": 192 * 2**20, "cuda": 512 * 2**20}
"""Memory for all that a pass over tiles keeps beside its results: a tile of each model, and a piece's tensors."""

PIECE_BYTES = {"cpu": 4 * 2**20, "cuda": 16 * 2**20}
"""Size of one tensor of a piece: for each thread of a processor what its cache holds a few of; on a GPU enough for a
kernel to outlast its launch."""

STATISTICS = ("logq", "logp", "entropy", "reverse_kl", "forward_kl", "jsd", "skew_fkl", "skew_rkl", "cached_kl")
"""Numbers that there are for each token; see ``token_statistics``."""

OF_ONE_MODEL = {"logq", "logp", "entropy"}
"""Numbers that are no divergence between the two."""

OF_THE_CACHE = "cached_kl"
"""The forward KL from a teacher of whom a few ids of each token are ``kept``: no model of it is there."""

UNDER_THE_TEACHER = {"forward_kl", "jsd", "skew_fkl", "skew_rkl"}
"""Numbers for which the teacher's probabilities are needed, and not only their logarithms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWeights:
    """What a head multiplies by: rows of real ids only. ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``."""

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits of each hidden state, [N, V], in fp32 (float64 if the hidden states are), before any temperature."""
        logits_NV = torch.nn.functional.linear(hidden_NH, self.weight_VH, self.bias_V)
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def multiply(self, hidden_nH: Tensor, *, out_nV: Tensor) -> Tensor:
        """The first half of ``logits``, without gradient: product and bias, in the weights' precision."""
        if self.bias_V is None:
            return torch.mm(hidden_nH, self.weight_VH.T, out=out_nV)
        return torch.addmm(self.bias_V, hidden_nH, self.weight_VH.T, out=out_nV)

    def finish_(self, linear_nV: Tensor) -> Tensor:
        """The second half, without gradient and in place; what comes in is in 32 bits or 64."""
        if self.scale != 1.0:
            linear_nV.mul_(self.scale)
        if self.softcap is not None:
            linear_nV.div_(self.softcap).tanh_().mul_(self.softcap)
        return linear_nV


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """What the teacher says about N tokens, not yet multiplied out: its head and its final hidden states."""

    head: HeadWeights
    hidden_NH: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked about each of N tokens.

    ``wanted`` is chosen from ``STATISTICS``: log-probs of the taken token under student (``logq``) and teacher
    (``logp``), the student's ``entropy``, and the divergences of ``minillm.divergences``, all at ``temperature`` (of
    both models) and, with a support, over the kept ids only, both distributions renormalised. ``cached_kl`` is the
    forward KL from ``kept``, which is taken as it is: neither tempered nor put on a support. ``tile`` and ``piece`` are
    numbers of tokens; by default they follow from ``WORKING_BYTES``.
    """

    taken_N: Tensor
    wanted: Sequence[str]
    temperature: float = 1.0
    teacher: TeacherView | None = None
    kept: Kept | None = None
    support_NC: Tensor | None = None
    jsd_beta: float = 0.5
    skew: float = 0.1
    tile: int | None = None
    piece: int | None = None


def _needs_scratch(head: HeadWeights, task: Task) -> bool:
    """Whether ``Piece.scratch`` is asked for: by products, by logits that are changed first, and by a cap's slope."""
    products = {*task.wanted} - {"logq", "logp", OF_THE_CACHE}
    return bool(products) or task.temperature != 1.0 or task.support_NC is not None or head.softcap is not None


TENSORS_OF_KEPT = 5.25
"""How many tensors of kept ids live at once, each a share K/V of a piece's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How many tokens make a tile, and how many a piece of it."""

    tile: int
    piece: int


def cut_for(head: HeadWeights, task: Task) -> Cut:
    """The sizes that the task names, or those that stay within ``WORKING_BYTES``, but at least 16 tokens a tile."""
    weights = [head.weight_VH, *([] if task.teacher is None else [task.teacher.head.weight_VH])]
    vocabulary, kind = head.weight_VH.shape[0], "cpu" if head.weight_VH.device.type == "cpu" else "cuda"
    threads = torch.get_num_threads() if kind == "cpu" else 1
    wide = vocabulary * max(4, head.weight_VH.element_size())
    pieces = wide * tensors_of_a_piece(head, task)
    # Softmax is shared out by rows, as many to each thread; but a piece has at most half of the memory.
    fitting = threads * max(1, PIECE_BYTES[kind] // wide)
    piece = task.piece or max(1, min(fitting, WORKING_BYTES[kind] // (2 * pieces)))
    left = WORKING_BYTES[kind] - piece * pieces
    tile = task.tile or max(16, left // (vocabulary * sum(weight.element_size() for weight in weights)))
    return Cut(tile=tile, piece=min(piece, tile))


def tensors_of_a_piece(head: HeadWeights, task: Task) -> int:
    """How many tensors of a piece's size live at once; ``tests/unit/test_token_loss_memory.py`` counts them.

    MiniLLM's loss has five: log q, q, log p, the gap between the two, and a product.
    """
    found = 2 + _needs_scratch(head, task) + _is_narrow(head) + (task.support_NC is not None)
    if task.kept is not None and OF_THE_CACHE in task.wanted:
        share = TENSORS_OF_KEPT * task.kept.ids_NK.shape[1] / head.weight_VH.shape[0]
        found += 1 + math.ceil(share - 0.1)  # a tenth of a tensor is let pass
    if task.teacher is not None:
        found += 1 + _is_narrow(task.teacher.head) + bool(UNDER_THE_TEACHER & {*task.wanted})
        found += len({*task.wanted} - OF_ONE_MODEL - {OF_THE_CACHE})
    return found


def _is_narrow(head: HeadWeights) -> bool:
    """Whether logits have to be copied to be widened."""
    return head.weight_VH.element_size() < 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What both heads' products give for the tokens ``here`` of all N; ``HeadWeights.finish_`` is still to come."""

    here: slice
    student_nV: Tensor
    teacher_nV: Tensor | None

    def pieces(self, tokens: int) -> Iterator[Self]:
        """Views of ``tokens`` tokens each; an empty tile has one empty piece."""
        count = len(self.student_nV)
        for start in range(0, max(count, 1), tokens):
            part = slice(start, min(start + tokens, count))
            yield type(self)(
                here=slice(self.here.start + part.start, self.here.start + part.stop),
                student_nV=self.student_nV[part],
                teacher_nV=None if self.teacher_nV is None else self.teacher_nV[part],
            )


def tiles(hidden_NH: Tensor, *, head: HeadWeights, teacher: TeacherView | None, tokens: int) -> Iterator[Tile]:
    """All tokens in tiles, at least one, which may be empty; to be called without gradient.

    Each tile has the storage of the one before: a fresh one costs a page fault for every 4 KiB.
    """
    count, vocabulary = len(hidden_NH), head.weight_VH.shape[0]
    assert teacher is None or teacher.head.weight_VH.shape[0] == vocabulary, "the models' ids are not the same"
    student_rV = head.weight_VH.new_empty(min(tokens, count), vocabulary)
    teacher_rV = None if teacher is None else teacher.head.weight_VH.new_empty(student_rV.shape)
    for start in range(0, max(count, 1), tokens):
        here = slice(start, min(start + tokens, count))
        n = here.stop - here.start
        yield Tile(
            here=here,
            student_nV=head.multiply(hidden_NH[here], out_nV=student_rV[:n]),
            teacher_nV=None
            if teacher is None or teacher_rV is None
            else teacher.head.multiply(teacher.hidden_NH[here], out_nV=teacher_rV[:n]),
        )


class Workspace:
    """Storage of a piece's size, by name, kept over all pieces of a pass.

    Asked for anew for each piece, such blocks come from glibc's heap (all up to 32 MiB may), where the few bytes that
    outlive a piece leave holes in which the next piece's do not fit: memory grew by 1 MiB a piece.
    """

    def __init__(self, tokens: int, head: HeadWeights) -> None:
        self._shape = (tokens, head.weight_VH.shape[0])
        self._weight = head.weight_VH
        self.dtype = torch.promote_types(head.weight_VH.dtype, torch.float32)
        self._kept: dict[str, Tensor] = {}

    def take(self, name: str, like_nV: Tensor) -> Tensor:
        """What is stored under a name, for as many tokens as ``like_nV`` has; the first time it holds anything."""
        if name not in self._kept:
            self._kept[name] = self._weight.new_empty(self._shape, dtype=self.dtype)
        return self._kept[name][: len(like_nV)]

    def wide(self, name: str, narrow_nV: Tensor) -> Tensor:
        """The same in 32 bits (64 if it is): itself, or a copy."""
        return narrow_nV if narrow_nV.dtype == self.dtype else self.take(name, narrow_nV).copy_(narrow_nV)


@torch.no_grad()
def token_statistics(hidden_NH: Tensor, *, head: HeadWeights, **task: Any) -> dict[str, Tensor]:
    """The wanted numbers for each of N tokens, each [N], without gradient (``token_loss`` has one): see ``Task``, whose
    fields are the arguments."""
    return answers(hidden_NH, head=head, task=Task(**task))


@torch.no_grad()
def answers(hidden_NH: Tensor, *, head: HeadWeights, task: Task) -> dict[str, Tensor]:
    """``token_statistics`` of a question that is made already."""
    cut = cut_for(head, task)
    space = Workspace(min(cut.piece, len(hidden_NH)), head)
    numbers = empty_numbers(hidden_NH, task, space)
    for tile in tiles(hidden_NH, head=head, teacher=task.teacher, tokens=cut.tile):
        for part in tile.pieces(cut.piece):
            piece = Piece(part, head=head, task=task, space=space)
            values = piece.by_formula() if piece.is_finite else piece.by_definition(piece.student_nV)
            for name, into_N in numbers.items():
                into_N[part.here] = values[name]
    return numbers


def empty_numbers(hidden_NH: Tensor, task: Task, space: Workspace) -> dict[str, Tensor]:
    """Storage [N] for each wanted number."""
    return {name: hidden_NH.new_empty(len(hidden_NH), dtype=space.dtype) for name in task.wanted}


class Piece:
    """The numbers of one piece's tokens, and what their derivatives are made of, all in a workspace."""

    def __init__(self, part: Tile, *, head: HeadWeights, task: Task, space: Workspace) -> None:
        self._task, self._space = task, space
        self.taken_n1 = task.taken_N[part.here][:, None]
        packed_NC = task.support_NC
        self._support_nV = None if packed_NC is None else unpack_support(packed_NC[part.here], head.weight_VH.shape[0])
        self._off_nV = None if self._support_nV is None else ~self._support_nV
        self._kept = None if task.kept is None else task.kept.of(part.here)
        self.student_nV = head.finish_(space.wide("student", part.student_nV))
        """Logits; where nothing had to be widened, in the tile's own storage."""
        self._teacher_nV = None
        if task.teacher is not None and part.teacher_nV is not None:
            self._teacher_nV = task.teacher.head.finish_(space.wide("teacher", part.teacher_nV))
        self.q_nV = self.logq_nV = self._logp_nV = self._p_nV = self.student_nV  # until ``by_formula``
        self.derivatives: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        """By divergence (f, extra): its derivative by a tempered logit is q (f - E_q f) + extra; None stands for 0."""

    @property
    def is_finite(self) -> bool:
        """Whether formulas hold: no logit is -inf, by which a model may forbid a token, or NaN, not to be hidden."""
        teacher_nV, hottest = self._teacher_nV, min(1.0, self._task.temperature)
        return _finite(self.student_nV, hottest) and (teacher_nV is None or _finite(teacher_nV, hottest))

    def by_definition(self, student_nV: Tensor) -> dict[str, Tensor]:
        """The numbers by ``tile_statistics``, with a gradient to ``student_nV``."""
        task = self._task
        return tile_statistics(
            student_nV, self._teacher_nV, taken_n=self.taken_n1[:, 0], temperature=task.temperature,
            support_nV=self._support_nV, wanted=task.wanted, jsd_beta=task.jsd_beta, skew=task.skew, kept=self._kept,
        )  # fmt: skip

    def by_formula(self) -> dict[str, Tensor]:
        """The same numbers, and ``derivatives``."""
        wanted, take = self._task.wanted, self._space.take
        self.logq_nV = self._log_softmax(self.student_nV, "logq")
        values = {"logq": self.logq_nV.gather(1, self.taken_n1)[:, 0]}
        self.q_nV = torch.exp(self.logq_nV, out=take("q", self.logq_nV))
        if self._kept is not None and OF_THE_CACHE in wanted:
            values[OF_THE_CACHE], slope_nV = kept_forward_kl_(
                self._kept, logq_nV=self.logq_nV, q_nV=self.q_nV, out_nV=take(OF_THE_CACHE, self.q_nV)
            )
            self.derivatives[OF_THE_CACHE] = (None, slope_nV)
        self._forget(self.logq_nV)
        if "entropy" in wanted:
            values["entropy"] = -self.expected(self.q_nV, self.logq_nV)
        if self._teacher_nV is not None:
            self._logp_nV = self._log_softmax(self._teacher_nV, "logp")
            values["logp"] = self._logp_nV.gather(1, self.taken_n1)[:, 0]
            if UNDER_THE_TEACHER & {*wanted}:
                self._p_nV = torch.exp(self._logp_nV, out=take("p", self._logp_nV))
            self._forget(self._logp_nV)
            for name in wanted:
                if name not in OF_ONE_MODEL and name != OF_THE_CACHE:
                    values[name], *found = self._divergence(name)
                    self.derivatives[name] = (found[0], found[1])
        return {name: values[name] for name in wanted}

    def scratch(self) -> Tensor:
        """A tensor that holds anything and is anyone's, until ``expected`` is called."""
        return self._space.take("scratch", self.student_nV)

    def expected(self, weight_nV: Tensor, value_nV: Tensor) -> Tensor:
        """Sum over columns of weight times value, [n]."""
        return torch.mul(weight_nV, value_nV, out=self.scratch()).sum(dim=-1)

    def _log_softmax(self, logits_nV: Tensor, name: str) -> Tensor:
        """At the temperature, on the support; the logits stay as they are."""
        if self._task.temperature != 1.0 or self._off_nV is not None:
            logits_nV = torch.div(logits_nV, self._task.temperature, out=self.scratch())
        if self._off_nV is not None:
            logits_nV.masked_fill_(self._off_nV, -torch.inf)
        return torch.log_softmax(logits_nV, -1, out=self._space.take(name, logits_nV))

    def _forget(self, log_weight_nV: Tensor) -> None:
        """Columns off the support have weight 0; with log-weight 0 they drop out of every sum."""
        if self._off_nV is not None:
            log_weight_nV.masked_fill_(self._off_nV, 0.0)

    def _middle(self, teachers: float, out_nV: Tensor) -> Tensor:
        """log(teachers p + (1 - teachers) q), 0 off the support."""
        torch.lerp(self.q_nV, self._p_nV, teachers, out=out_nV)
        if self._off_nV is not None:
            out_nV.masked_fill_(self._off_nV, 1.0)
        return out_nV.clamp_(min=torch.finfo(out_nV.dtype).tiny).log_()

    def _divergence(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(value [n], f, extra), see ``derivatives``."""
        q, logq, p, logp = self.q_nV, self.logq_nV, self._p_nV, self._logp_nV
        out = self._space.take(name, q)
        if self._task.skew == 0.0:  # these they are then, and not only nearly, as with a middle that may not underflow
            name = {"skew_fkl": "forward_kl", "skew_rkl": "reverse_kl"}.get(name, name)
        if name == "reverse_kl":
            gap = torch.sub(logq, logp, out=out)
            return self.expected(q, gap), gap, None
        if name == "forward_kl":  # E_p log(p/q): by a logit, q - p
            value_n = self.expected(p, torch.sub(logp, logq, out=out))
            return value_n, None, torch.sub(q, p, out=out)
        if name == "jsd":
            beta = self._task.jsd_beta
            assert 0.0 < beta < 1.0, beta
            log_m = self._middle(beta, out)
            teachers_n = beta * self._gap_to(log_m)
            gap = torch.sub(logq, log_m, out=out).mul_(1.0 - beta)
            return teachers_n + self.expected(q, gap), gap, None
        skew = self._task.skew
        if name == "skew_fkl":  # KL(p || a p + (1-a) q): by q, -(1-a) p/m
            log_m = self._middle(skew, out)
            value_n = self._gap_to(log_m)
            return value_n, log_m.neg_().exp_().mul_(p).mul_(skew - 1.0), None
        assert name == "skew_rkl", name  # KL(q || (1-a) p + a q): by q, log(q/m) + 1 - a q/m
        gap = torch.sub(logq, self._middle(1.0 - skew, out), out=out)
        value_n = self.expected(q, gap)
        return value_n, gap.sub_(torch.exp(gap, out=self.scratch()), alpha=skew), None

    def _gap_to(self, log_m_nV: Tensor) -> Tensor:
        """KL(p || m), [n]."""
        return torch.sub(self._logp_nV, log_m_nV, out=self.scratch()).mul_(self._p_nV).sum(dim=-1)


def _finite(logits_nV: Tensor, temperature: float) -> bool:
    """Whether no logit over the temperature is -inf or NaN; an empty piece has none."""
    return logits_nV.numel() == 0 or bool(logits_nV.amin() / temperature > -torch.inf)


class StatisticsReader(Protocol):
    """A model whose head can be applied to hidden states."""

    def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
        """``token_statistics`` with the model's own head."""


@torch.no_grad()
def score(
    rollout: Rollout, *, student: StatisticsReader, teacher_head: HeadWeights, temperature: float,
    forward_kl: bool = False, infinite: bool = False,
) -> Scored:  # fmt: skip
    """What both models say about the sampled tokens, from the hidden states that the rollout kept: no further forward
    pass.

    ``forward_kl`` adds KL(teacher || student); infinite where the student forbids what the teacher allows.

    Raises ``NonFinite`` if a score of a sampled token is not a finite number: a teacher that forbids a token which the
    student drew has an infinite reverse KL, and a policy gradient from it would be meaningless. The error names the
    rows. ``infinite`` lets the teacher's infinities through, for those who only measure; NaN is refused always.
    """
    assert rollout.student_hidden_BTH is not None and rollout.teacher_hidden_BTH is not None, (
        "the rollout kept no states"
    )
    assert rollout.repetition_penalty == 1.0, "from states alone the logits of penalised ids cannot be made again"
    mask_BT = rollout.mask_BT
    values = student.statistics(
        rollout.student_hidden_BTH[mask_BT],
        taken_N=rollout.response_BT[mask_BT],
        wanted=("logq", "logp", "entropy", "reverse_kl", *(("forward_kl",) if forward_kl else ())),
        temperature=temperature,
        teacher=TeacherView(head=teacher_head, hidden_NH=rollout.teacher_hidden_BTH[mask_BT]),
        support_NC=None if rollout.support_BTC is None else rollout.support_BTC[mask_BT],
    )
    require_finite(values, rollout, may_be_infinite={"forward_kl", *(("logp", "reverse_kl") if infinite else ())})
    return Scored(
        rollout=rollout,
        logq_BT=spread(values["logq"], mask_BT),
        logp_BT=spread(values["logp"], mask_BT),
        reverse_kl_BT=spread(values["reverse_kl"], mask_BT),
        entropy_BT=spread(values["entropy"], mask_BT),
        forward_kl_BT=spread(values["forward_kl"], mask_BT) if forward_kl else None,
    )

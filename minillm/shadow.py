"""A moving average of a student's weights: what a stage holds its student to (WARP's anchor, arXiv 2406.16768).

It is whole on every rank and in 32 bits whatever the student computes in: a step of a hundredth of the way from 1.0 to
1.25 is no step at all in bf16. So it takes 4 bytes of each rank's memory for a weight, and where the student computes
in bf16, 2 more while it reads.

Legend: B rows, P prompt positions, T response positions, L = P + T, N kept tokens, H hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.models import CausalLM, ModelReader
from minillm.scored_rows import require_finite, spread
from minillm.scoring import HeadWeights, StatisticsReader, TeacherView
from minillm.state import State
from minillm.student_engine import Student
from minillm.twins import adopt, disown
from minillm.types import AnchorScores, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Weights that are there for a while: what reads rows with them, and their head."""

    reader: ModelReader
    head: HeadWeights


def moved_(shadow: Tensor, weights: Tensor, *, rate: float) -> Tensor:
    """The average after one more update, in place: (1 - rate) shadow + rate weights, in the shadow's precision."""
    return shadow.lerp_(weights.to(shadow.dtype), rate)


class Shadow:
    """The moving average of one student."""

    def __init__(self, *, rate: float) -> None:
        self._rate = rate
        self._weights: dict[str, Tensor] = {}
        """By the student's names; none before it begins."""
        self._twin: CausalLM | None = None
        self.drift = 0.0
        """How far the student was from it after the last update, as a share of its norm."""

    def begin(self, student: Student) -> None:
        """It is the student as it stands, unless there is one already. On all ranks."""
        if not self._weights:
            self._weights = {name: whole.to(torch.float32, copy=True) for name, whole in student.master_weights()}

    @torch.no_grad()
    def follow(self, student: Student) -> None:
        """One step towards the student, after an update of it. On all ranks."""
        squares = torch.zeros(2, dtype=torch.float64, device=student.ranks.device)
        for name, whole in student.master_weights():
            shadow = moved_(self._weights[name], whole, rate=self._rate)
            squares += torch.stack([torch.dist(shadow, whole), shadow.norm()]).double().square()
        apart, norm = squares.sqrt().tolist()
        self.drift = apart / norm if norm else 0.0

    @contextlib.contextmanager
    def reading(self, student: Student) -> Iterator[Held]:
        """The average in the student's precision, to be read by each rank for itself; gone after the block."""
        if self._twin is None:
            self._twin = student.stand_in()
        dtype = next(student.root.parameters()).dtype
        adopt(self._twin, student.root, weights={name: each.to(dtype) for name, each in self._weights.items()})
        try:
            reader = ModelReader(self._twin, device=student.ranks.device, lockstep=False)
            yield Held(reader=reader, head=self._twin.head.weights())
        finally:
            disown(self._twin)

    def state(self) -> State:
        """The average; the same on every rank."""
        return State({}, dict(self._weights))

    def restore(self, tensors: Mapping[str, Tensor], *, device: torch.device) -> None:
        """Takes it up."""
        self._weights = {name: each.to(device) for name, each in tensors.items()}


def anchor_scores(rollout: Rollout, *, anchor: Held, student: StatisticsReader, temperature: float) -> AnchorScores:
    """What the anchor says of a finished rollout, from one forward over its rows: to be called where ``score`` is, with
    its arguments. Raises ``NonFinite`` as that does."""
    assert rollout.student_hidden_BTH is not None, "the rollout kept no states"
    prompts, mask_BT = rollout.prompts, rollout.mask_BT
    first, width = prompts.ids_BP.shape[1] - 1, mask_BT.shape[1]
    hidden_NH = rollout.student_hidden_BTH[mask_BT]
    anchor_NH = hidden_NH
    if len(mask_BT):
        hidden_BLH = anchor.reader.read(
            torch.cat([prompts.ids_BP, rollout.response_BT], dim=1), torch.cat([prompts.mask_BP, mask_BT], dim=1)
        )
        anchor_NH = hidden_BLH[:, first : first + width][mask_BT]  # the state before a token predicts it
    values = student.statistics(
        hidden_NH,
        taken_N=rollout.response_BT[mask_BT],
        wanted=("logp", "reverse_kl"),
        temperature=temperature,
        teacher=TeacherView(head=anchor.head, hidden_NH=anchor_NH),
        support_NC=None if rollout.support_BTC is None else rollout.support_BTC[mask_BT],
    )
    named = {"anchor_logp": values["logp"], "anchor_kl": values["reverse_kl"]}
    require_finite(named, rollout, may_be_infinite=())
    return AnchorScores(logp_BT=spread(values["logp"], mask_BT), kl_BT=spread(values["reverse_kl"], mask_BT))

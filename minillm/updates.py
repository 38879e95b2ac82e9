"""What an objective hands to the loop: optimiser steps as lists of micro-batch losses, and sums over all ranks.

Legend: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from minillm.micro_batches import Limits, cut, cut_pairs
from minillm.packing import Reads
from minillm.ranks import Ranks
from minillm.stage_base import BaseStage
from minillm.state import State, States
from minillm.student_engine import Student
from minillm.types import Example

Loss = Callable[[], Tensor]


@dataclass(slots=True)
class Sums:
    """Sums over this rank's tokens or rows, added up over micro-batches and then over ranks."""

    values: dict[str, float] = field(default_factory=dict)

    def add(self, **more: float | Tensor) -> None:
        """Adds each named value to its sum."""
        for name, value in more.items():
            self.values[name] = self.values.get(name, 0.0) + float(value)

    def over_ranks(self, ranks: Ranks) -> dict[str, float]:
        """The sums of all ranks; each rank must have added the same names."""
        names = sorted(self.values)
        return dict(zip(names, ranks.sum([self.values[name] for name in names]).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Update:
    """One optimiser step: its micro-batch losses, and the figures that exist once they have run."""

    losses: Sequence[Loss]
    figures: Callable[[], dict[str, float]]
    largest: tuple[str, ...] = ()
    """Figures of which a step tells the largest of its updates; of all others the mean. The same in each of them."""
    follow: Callable[[], None] = lambda: None
    """What follows the optimiser step, before its figures are asked for and it may be saved."""


@dataclass(frozen=True, slots=True)
class News:
    """Something that came up, the same on every rank: a line of the log, and one for a person."""

    kind: str
    record: Mapping[str, Any]
    words: str


def over_updates(each: Sequence[Mapping[str, float]], *, largest: Collection[str]) -> dict[str, float]:
    """The figures of a step from those of its updates, which have the same names: the largest of those named, of the
    others the mean."""
    columns = {name: [figures[name] for figures in each] for name in (each[0] if each else ())}
    return {name: max(column) if name in largest else sum(column) / len(each) for name, column in columns.items()}


class Objective(Protocol):
    """What the loop needs of an objective."""

    def collect(self, step: int, student: Student) -> tuple[Any, dict[str, float]]:
        """Everything before learning, and figures for the log."""

    def learning(self, collected: Any, student: Student, *, made: int = 0) -> AbstractContextManager[Iterable[Update]]:
        """The optimiser steps of one loop step, in order, each asked for when the one before is made; what they share
        (a gathered head) lives as long as the block. The first ``made`` of them are passed over: they were made before,
        and did not end the step."""

    def hear(self, measured: Mapping[str, float]) -> None:
        """What validation found, for an objective that follows it."""

    def news(self) -> list[News]:
        """What came up since it was last asked."""

    def shown(self, collected: Any) -> State:
        """The rows that ``collect`` gave, for a person who looks for what is wrong with them: names and tokens."""

    def state(self) -> State:
        """What a step must know of those before it beside the student's weights; the same on every rank."""

    def restore(self, state: State) -> None:
        """Takes up what ``state`` gave, in an objective that was made in the same way."""

    def pack(self, collected: Any) -> States:
        """What ``collect`` gave, as far as ``learning`` reads it and the step's number does not say it."""

    def unpack(self, states: States, *, step: int) -> Any:
        """The same for ``learning`` again; nothing is sampled or scored for it."""


def shown_text(rows: Sequence[Example]) -> State:
    """Rows of text for a person to look at."""
    return State({"rows": [{"uid": r.uid, "ids": [*r.ids], "response_ids": [*r.response_ids]} for r in rows]})


def in_step(lengths: Sequence[int], *, limits: Limits, student: Student, ranks: Ranks) -> list[list[int]]:
    """This rank's rows, by index, in micro-batches: as many on every rank as the one with the most needs, since each
    forward and backward pass of a sharded model is made by all of them together; the last ones may be empty."""
    return _as_many(cut(lengths, limits=limits, reads=_reads(student)), ranks=ranks)


def pairs_in_step(
    lengths: Sequence[tuple[int, int]], *, limits: Limits, student: Student, ranks: Ranks
) -> list[list[int]]:
    """The same of pairs of rows, which stay together."""
    return _as_many(cut_pairs(lengths, limits=limits, reads=_reads(student)), ranks=ranks)


def _reads(student: Student) -> Reads | None:
    return None if student.root.packs == "no" else student.root.reads


def _as_many(cuts: list[list[int]], *, ranks: Ranks) -> list[list[int]]:
    return cuts + [[] for _ in range(ranks.most(len(cuts)) - len(cuts))]


def limits_of(stage: BaseStage) -> Limits:
    """How large a stage lets a micro-batch be."""
    return Limits(rows=stage.micro_batch, places=stage.micro_tokens)


def nobody(device: torch.device) -> dict[str, Tensor]:
    """Inputs of a forward over a dummy row of which no token is predicted: its loss is a 0 with a gradient of 0."""
    ids_BL = torch.zeros((1, 2), dtype=torch.long, device=device)
    return {"ids_BL": ids_BL, "mask_BL": ids_BL == 0, "predict_BL": ids_BL != 0}

"""Learning from pairs of responses, one of them preferred: DPO, TDPO and their relatives as an objective of the loop.

Legend: B pairs, N response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from minillm.errors import CheckpointError
from minillm.micro_batches import Limits, alike
from minillm.models import ModelReader
from minillm.order import GlobalOrder, share
from minillm.preference_reference import Known, Prepared
from minillm.preference_stage import PreferenceStage
from minillm.preferred_rows import Comparison, PairRows, lengths_of_pair, sides, told
from minillm.ranks import Ranks
from minillm.references import TeacherText
from minillm.scoring import TeacherView
from minillm.state import State, States
from minillm.student_engine import Student
from minillm.types import Ids
from minillm.updates import News, Sums, Update, limits_of, pairs_in_step, shown_text


class Preferences:
    """A pairwise loss, averaged over the pairs of the whole step; on request the cross-entropy of its chosen responses,
    averaged over their tokens, beside it."""

    def __init__(self, stage: PreferenceStage, *, known: Prepared, ids: Ids, ranks: Ranks, seed: int) -> None:
        self._stage, self._known, self._ids, self._ranks = stage, known, ids, ranks
        self._compare = Comparison.of(stage, known)
        self._order = GlobalOrder(len(known.learnt.pairs), seed, f"{stage.name}/rows")

    def collect(self, step: int, student: Student) -> tuple[list[int], dict[str, float]]:
        """The step's pairs by their indices, the same list on every rank."""
        picked = self._picked(step)
        rows = sides([self._known.learnt.pairs[place] for place in picked])
        learnt = sum(len(row.response_ids) for row in rows)
        tokens = learnt + sum(len(row.ids) for row in rows)
        return picked, {"tokens": float(tokens), "response_tokens": float(learnt)}

    @contextmanager
    def learning(self, collected: list[int], student: Student, *, made: int = 0) -> Iterator[list[Update]]:
        """One step on them."""
        assert made == 0, "a step is one update"
        live = self._known.live
        with ExitStack() as stack:
            reference = None
            if live is not None:
                reference = TeacherText(read=live.reader.read, head=stack.enter_context(live.head()))
            yield [self._update(collected, student, reference)]

    def _update(self, picked: Sequence[int], student: Student, reference: TeacherText | None) -> Update:
        pairs, ranks = self._known.learnt.pairs, self._ranks
        lengths = [lengths_of_pair(pairs[place]) for place in picked]
        longest = [max(both) for both in lengths]
        mine = share(range(len(picked)), lengths=longest, rank=ranks.rank, ranks=ranks.size)
        chosen_tokens = sum(len(pairs[place].chosen_ids) for place in picked)
        sums, weight = Sums(), self._stage.sft_weight

        def loss_of(cut: Sequence[int]) -> Tensor:
            rows = PairRows.of(
                self._known.learnt, [picked[mine[at]] for at in cut], pad_id=self._ids.pad, device=ranks.device
            )

            def loss(of: Mapping[str, Tensor], _: slice) -> Tensor:
                chosen_logq_B = rows.sides_of(rows.by_row(of["logq"]))[0]
                likelihood = weight * chosen_logq_B.sum() / chosen_tokens
                return self._compare.read(of, rows).loss_B.sum() / len(picked) - likelihood

            view = None if reference is None else reference.view(rows.inputs)
            value, numbers = student.loss(
                **rows.inputs, wanted=self._compare.wanted, teacher=view, loss=loss, coupled=True
            )
            sums.add(**self._compare.sums(numbers, rows))
            return value.float()

        cuts = pairs_in_step([lengths[at] for at in mine], limits=limits_of(self._stage), student=student, ranks=ranks)

        def figures() -> dict[str, float]:
            return told(sums.over_ranks(ranks), sft_weight=weight)

        return Update([lambda cut=cut: loss_of(cut) for cut in cuts], figures)  # type: ignore[misc]

    def hear(self, measured: Mapping[str, float]) -> None:
        """Validation changes nothing here."""

    def news(self) -> list[News]:
        """Nothing ever does."""
        return []

    def shown(self, collected: list[int]) -> State:
        """The step's rows, the chosen responses first."""
        return shown_text(sides([self._known.learnt.pairs[place] for place in collected]))

    def state(self) -> State:
        """Which reference the student is compared with; all else is a function of the step's number."""
        return State({"reference": self._known.version})

    def restore(self, state: State) -> None:
        """``CheckpointError`` where the stage was saved beside another reference."""
        before, now = state.record["reference"], self._known.version
        if before != now:
            cure = "put back the student that the stage before handed on"
            if before.rpartition("/")[0] == now.rpartition("/")[0]:  # the same weights in other numbers
                cure = "engine.precision was another then: set it back"
            raise CheckpointError(
                f"stage {self._stage.name} was saved beside the reference {before}, and starts from {now}\n"
                f"  {cure}, or start over with --fresh"
            )

    def pack(self, collected: list[int]) -> States:
        """Nothing: there is no moment inside a step of one update."""
        return States(State(), State())

    def unpack(self, states: States, *, step: int) -> list[int]:
        """The step's pairs."""
        return self._picked(step)

    def _picked(self, step: int) -> list[int]:
        return self._order.take(step * self._stage.batch, self._stage.batch)


@torch.no_grad()
def pair_measures(
    reader: ModelReader, stage: PreferenceStage, known: Prepared, *, ids: Ids, limits: Limits, ranks: Ranks
) -> dict[str, float]:
    """Loss, accuracy and margin of a student on the validation pairs; the same on every rank. The loss is that of the
    pairs alone, whatever the weight of the cross-entropy in training."""
    assert known.validation is not None, "nobody read validation pairs"
    compare, sums = Comparison.of(stage, known), Sums()
    with ExitStack() as stack:
        reference = None
        if known.live is not None:
            reference = TeacherText(read=known.live.reader.read, head=stack.enter_context(known.live.head()))
        for rows in _batches(known.validation, ids=ids, limits=limits, ranks=ranks, reader=reader):
            view = None if reference is None else reference.view(rows.inputs)
            sums.add(**compare.sums(_numbers(reader, rows, compare, view), rows))
    found = told(sums.over_ranks(ranks), sft_weight=0.0)
    return {f"preference_{name}": found[name] for name in ("loss", "accuracy", "margin")}


def _batches(known: Known, *, ids: Ids, limits: Limits, ranks: Ranks, reader: ModelReader) -> Iterator[PairRows]:
    """This rank's pairs, those of similar length together, as many batches on every rank."""
    lengths = [2 * max(lengths_of_pair(one)) for one in known.pairs]
    for cut in alike(lengths, limits=limits, ranks=ranks.size)[ranks.rank]:
        yield PairRows.of(known, cut, pad_id=ids.pad, device=reader.device)


def _numbers(
    reader: ModelReader, rows: PairRows, compare: Comparison, view: TeacherView | None
) -> Mapping[str, Tensor]:
    """Numbers per response token of the student as it stands, and of the reference beside it."""
    predict_BL = rows.inputs["predict_BL"]
    hidden_BLH = reader.read(rows.inputs["ids_BL"], rows.inputs["mask_BL"])
    with reader.scoring():
        return reader.statistics(
            hidden_BLH[predict_BL.roll(-1, dims=1)], taken_N=rows.inputs["ids_BL"][predict_BL], wanted=compare.wanted,
            teacher=view,
        )  # fmt: skip

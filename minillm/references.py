"""Learning from given text: fine-tuning on reference responses, and the language-model loss beside another objective.

Legend: B rows, L positions, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minillm.batches import ExampleBatch, example_batch
from minillm.kept import Kept
from minillm.micro_batches import Limits
from minillm.order import WindowedOrder, share
from minillm.prompt_table import lengths_of
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights, TeacherView
from minillm.state import State, States
from minillm.student_engine import Student
from minillm.teacher_cache import TeacherCache
from minillm.teacher_engine import Teacher
from minillm.text_stages import KdStage, ReferenceStage
from minillm.types import Example, Ids, Prompt
from minillm.updates import Loss, News, Sums, Update, in_step, limits_of, nobody, shown_text


class References:
    """A lesson on reference responses, averaged over the kept tokens of the whole step: fine-tuning, or word-level
    distillation."""

    def __init__(
        self, stage: ReferenceStage, *, prompts: Sequence[Prompt], ids: Ids, ranks: Ranks, seed: int,
        teacher: Teacher | None = None, cache: TeacherCache | None = None,
    ) -> None:  # fmt: skip
        """A ``KdStage`` with a share of the teacher has a ``teacher``, or what one once said, in a ``cache``."""
        self._stage, self._prompts, self._ids, self._ranks = stage, prompts, ids, ranks
        self._teacher, self._cache = teacher, cache
        self._teacher_share = stage.teacher_share if isinstance(stage, KdStage) else 0.0
        self._order = WindowedOrder(
            lengths_of(prompts), batch=stage.batch, window=stage.length_window, seed=seed, purpose=f"{stage.name}/rows"
        )

    def collect(self, step: int, student: Student) -> tuple[list[Prompt], dict[str, float]]:
        """The step's rows, the same list on every rank."""
        rows = self._rows(step)
        learnt = sum(len(row.response_ids) for row in rows)
        return rows, {"tokens": float(sum(len(row.ids) for row in rows) + learnt), "response_tokens": float(learnt)}

    @contextmanager
    def learning(self, collected: list[Prompt], student: Student, *, made: int = 0) -> Iterator[list[Update]]:
        """One step on them."""
        assert made == 0, "a step is one update"
        with ExitStack() as stack:
            lesson, share = likelihood(), self._teacher_share
            if share > 0 and self._cache is not None:
                lesson = cached_labels(self._cache, share=share, device=self._ranks.device)
            elif share > 0:
                assert self._teacher is not None, "the configuration refuses a kd stage without a teacher"
                head = stack.enter_context(self._teacher.head())
                lesson = soft_labels(TeacherText(read=self._teacher.reader.read, head=head), share=share)
            losses, sums = text_losses(
                collected, lesson, denominator=learnt_tokens(collected), student=student, ids=self._ids,
                ranks=self._ranks, limits=limits_of(self._stage),
            )  # fmt: skip
            yield [Update(losses, lambda: sums.over_ranks(self._ranks))]

    def hear(self, measured: Mapping[str, float]) -> None:
        """Validation changes nothing here."""

    def news(self) -> list[News]:
        """Nothing ever does."""
        return []

    def shown(self, collected: list[Prompt]) -> State:
        """The step's text."""
        return shown_text(collected)

    def state(self) -> State:
        """Nothing: a step is a function of its number and the student's weights."""
        return State()

    def restore(self, state: State) -> None:
        """Nothing to take up."""

    def pack(self, collected: list[Prompt]) -> States:
        """Nothing: there is no moment inside a step of one update."""
        return States(State(), State())

    def unpack(self, states: States, *, step: int) -> list[Prompt]:
        """The step's rows."""
        return self._rows(step)

    def _rows(self, step: int) -> list[Prompt]:
        return [self._prompts[index] for index in self._order.batch(step)]


@dataclass(frozen=True, slots=True)
class TeacherText:
    """A teacher that reads given text."""

    read: Callable[[Tensor, Tensor], Tensor]
    head: HeadWeights

    @torch.no_grad()
    def view(self, inputs: Mapping[str, Tensor]) -> TeacherView:
        """What it says about the tokens that are to be predicted."""
        hidden_BLH = self.read(inputs["ids_BL"], inputs["mask_BL"])
        return TeacherView(head=self.head, hidden_NH=hidden_BLH[inputs["predict_BL"].roll(-1, dims=1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What is learnt at each token of a text."""

    wanted: tuple[str, ...]
    """Numbers of ``scoring.STATISTICS``."""
    per_token: Callable[[Mapping[str, Tensor]], Tensor]
    """From those of some tokens, each [n], to their share of the loss before it is divided, [n]."""
    teacher: TeacherText | None = None
    kept: Callable[[Sequence[Example]], Kept] | None = None
    """In place of a teacher: what one said about the learnt tokens of some rows, row by row."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of ``scoring.Task``: temperature, jsd_beta, skew."""


def likelihood() -> Lesson:
    """Cross-entropy with the text's own tokens."""
    return Lesson(wanted=("logq",), per_token=lambda of: -of["logq"])


def soft_labels(teacher: TeacherText, *, share: float) -> Lesson:
    """Partly the forward KL from the teacher in its place (cross-entropy with the teacher's distribution less that
    one's entropy)."""

    def per_token(of: Mapping[str, Tensor]) -> Tensor:
        return share * of["forward_kl"] - (1.0 - share) * of["logq"]

    return Lesson(wanted=("logq", "forward_kl"), per_token=per_token, teacher=teacher)


def cached_labels(cache: TeacherCache, *, share: float, device: torch.device) -> Lesson:
    """``soft_labels`` of a teacher of whom a few ids are stored; what is not is one bucket."""

    def per_token(of: Mapping[str, Tensor]) -> Tensor:
        return share * of["cached_kl"] - (1.0 - share) * of["logq"]

    return Lesson(wanted=("logq", "cached_kl"), per_token=per_token, kept=lambda rows: cache.of(rows, device=device))


def learnt_tokens(rows: Sequence[Example]) -> float:
    """Tokens that are learnt, of all rows; 1 where there is none, since it divides."""
    return float(max(1, sum(len(row.response_ids) for row in rows)))


def text_losses(
    rows: Sequence[Example], lesson: Lesson, *, denominator: float, student: Student, ids: Ids, ranks: Ranks,
    limits: Limits, weight: float = 1.0, name: str = "loss", views: dict[int, TeacherView] | None = None,
) -> tuple[list[Loss], Sums]:  # fmt: skip
    """Micro-batch losses of this rank's share of ``rows``: the lesson's sum over *all* rows' tokens by ``denominator``,
    times ``weight``.

    The sums hold the unweighted loss under ``name``. ``views`` keeps what the teacher says for a later pass over the
    same rows.
    """
    lengths = [len(row.ids) + len(row.response_ids) for row in rows]
    mine = share(range(len(rows)), lengths=lengths, rank=ranks.rank, ranks=ranks.size)
    sums = Sums({name: 0.0})

    def loss_of(number: int, indices: Sequence[int]) -> Tensor:
        inputs, picked = nobody(ranks.device), [rows[i] for i in indices]
        if picked:
            inputs = _example_inputs(example_batch(picked, pad_id=ids.pad, device=ranks.device))
        view = None if views is None else views.get(number)
        if lesson.teacher is not None and view is None:
            view = lesson.teacher.view(inputs)
            if views is not None:
                views[number] = view
        loss, _ = student.loss(
            **inputs, wanted=lesson.wanted, teacher=view,
            kept=None if lesson.kept is None else lesson.kept(picked), **lesson.settings,
            loss=lambda of, _: lesson.per_token(of).sum() / denominator,
        )  # fmt: skip
        sums.add(**{name: loss.detach()})
        return weight * loss

    cuts = in_step([lengths[i] for i in mine], limits=limits, student=student, ranks=ranks)
    return [
        lambda number=number, picked=picked: loss_of(number, [mine[at] for at in picked])  # type: ignore[misc]
        for number, picked in enumerate(cuts)
    ], sums


def _example_inputs(batch: ExampleBatch) -> dict[str, Tensor]:
    return {"ids_BL": batch.ids_BL, "mask_BL": batch.mask_BL, "predict_BL": batch.target_BL}

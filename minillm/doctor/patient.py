"""What the checks look at, as far as it can be read: settings, cards, models, rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from minillm.cards import Card, Kind, load_card
from minillm.config import RunConfig
from minillm.doctor.findings import Finding, note, of_error, warning
from minillm.errors import MinillmError
from minillm.loading import ModelFacts, inspect
from minillm.model_files import in_short
from minillm.pairs import Pair
from minillm.preflight import AnySplit
from minillm.types import Ids
from minillm.vocabulary import eos_ids, real_ids

UNREADABLE = "the run ends with this before anything is loaded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A student or a teacher of which everything but the weights is known."""

    role: str
    card: Card
    facts: ModelFacts

    @property
    def words(self) -> str:
        """``teacher gpt2-xl``."""
        return f"{self.role} {self.card.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A run before its start. What could not be read is None, or not there."""

    config: RunConfig
    student: Model | None = None
    teacher: Model | None = None
    splits: Mapping[str, AnySplit] = field(default_factory=dict)
    """Rows of each source, or the first of them, with their true lengths: by ``train``, ``test NAME``, …"""
    ranks: int = 1
    """On all nodes."""

    @property
    def ranks_here(self) -> int:
        """Those on this node, as the launcher says it; all of them where it says nothing of so many ranks."""
        told = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not told.isdigit() or os.environ.get("WORLD_SIZE") != str(self.ranks):
            return self.ranks
        return min(max(1, int(told)), self.ranks)

    @property
    def models(self) -> tuple[Model, ...]:
        """Those that could be read."""
        return tuple(model for model in (self.student, self.teacher) if model is not None)

    @property
    def has(self) -> set[str]:
        """What checks may need and is there; a run without a teacher has all that a teacher's checks need."""
        found = {name for name in ("student", "teacher") if getattr(self, name) is not None}
        found |= ({"rows"} if self.splits else set()) | ({"a model"} if self.models else set())
        return found | ({"teacher"} if self.config.teacher is None else set())


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing to look at."""

    id: str
    run: Callable[[Patient], Iterable[Finding]]
    needs: tuple[str, ...] = ()
    """Of ``student``, ``teacher``, ``a model``, ``rows``: without one of them the check says that it was not made."""


def made(check: Check, patient: Patient) -> Iterator[Finding]:
    """What a check finds. Whatever goes wrong in it is a finding too: it hides none of the others."""
    if missing := [name for name in check.needs if name not in patient.has]:
        what = {"a model": "no model", "rows": "no row"}.get(missing[0], f"no {missing[0]}")
        yield left_out(check.id, f"{what} could be read")
        return
    try:
        yield from check.run(patient)
    except MinillmError as raised:
        yield of_error(check.id, raised, why=UNREADABLE)
    except Exception as raised:
        yield warning(
            check.id,
            f"this check broke off: {type(raised).__name__}: {in_short(raised)}",
            why="what it looks for may be there or not",
            mend="look at the files that it reads; if they are as they should be, the mistake is ours",
        )


def left_out(name: str, reason: str) -> Finding:
    """Says that a check could not be made."""
    return note(name, f"not looked at: {reason}", why="mend that first, and ask again")


def read_models(config: RunConfig) -> tuple[Patient, list[Finding]]:
    """The run with its models, and what keeps one of them from being read."""
    found: list[Finding] = []
    models: dict[str, Model] = {}
    wanted: tuple[tuple[str, str | None, Kind], ...] = (
        ("student", config.student, "students"),
        ("teacher", config.teacher, "teachers"),
    )
    for role, name, kind in wanted:
        if name is None:
            continue
        try:
            card = load_card(name, kind=kind)
            models[role] = Model(role=role, card=card, facts=inspect(card))
        except (MinillmError, OSError) as raised:
            found.append(of_error(role, raised, why=UNREADABLE))
    return Patient(config=config, student=models.get("student"), teacher=models.get("teacher")), found


def of_pair(config: RunConfig, pair: Pair, *, splits: Mapping[str, AnySplit], ranks: int) -> Patient:
    """The same of a run whose models are read already."""
    student = Model(role="student", card=pair.student_card, facts=pair.student)
    teacher = None
    if pair.teacher_card is not None and pair.teacher is not None:
        teacher = Model(role="teacher", card=pair.teacher_card, facts=pair.teacher)
    return Patient(config=config, student=student, teacher=teacher, splits=splits, ranks=ranks)


def student_alone(patient: Patient) -> Pair:
    """A pair of the student alone, to read rows with where the teacher does not fit; ``ModelError`` where no token ends
    its text."""
    assert patient.student is not None
    card, facts = patient.student.card, patient.student.facts
    eos, pad = eos_ids(facts.tokenizer, facts.generation), facts.tokenizer.pad_token_id
    return Pair(
        student_card=card, student=facts, teacher_card=None, teacher=None, real_ids=real_ids(facts.tokenizer),
        ids=Ids(eos=eos, pad=eos[0] if pad is None else pad),
    )  # fmt: skip


def with_splits(patient: Patient, splits: Mapping[str, AnySplit]) -> Patient:
    """The same with rows."""
    return dataclasses.replace(patient, splits=splits)

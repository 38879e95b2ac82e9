"""Stages over tiny models that are broken off at a moment and go on from bytes, in new objects, to the same bits.

The engine's own state is copied as it stands: its checkpoints have tests of their own.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load, save

from minillm.alarms import Alarms
from minillm.cards import Card
from minillm.config import MinillmStage, OptimiserConfig
from minillm.distillation import Distil
from minillm.loading import inspect
from minillm.loading import load as load_model
from minillm.loop import Keep, run_steps
from minillm.moments import Moment, Progressed
from minillm.objectives import Minillm
from minillm.prompts import prepare
from minillm.ranks import Ranks
from minillm.references import References
from minillm.rows import Row
from minillm.run_log import OF_THE_PROCESS
from minillm.stage_base import BaseStage
from minillm.state import State, States, from_json, to_json
from minillm.store import RunFolder
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.text_stages import DistilStage
from minillm.types import Decoding, Ids, Prompt
from minillm.updates import Objective
from tests import tiny

REAL, EOS = len(tiny.WORDS), tiny.WORDS.index(tiny.EOS)
IDS = Ids(eos=(EOS, 5, 11), pad=0)
"""Several ends of a response, so that some come early."""
DECODING = Decoding(max_new_tokens=8, temperature=0.9, top_k=24)
OPTIMISER: dict[str, Any] = {"lr": 2e-2, "schedule": "linear", "warmup_steps": 2}
UPDATES = 24
"""Of every stage's schedule here, so that stages can share an engine; none makes so many."""

Bytes = tuple[str, bytes]


def to_bytes(state: State) -> Bytes:
    """As it stands in a checkpoint: JSON, and a safetensors file."""
    return to_json(state.record), save(state.tensors)


def from_bytes(content: Bytes) -> State:
    """The same, read again."""
    return State(from_json(content[0]), load(content[1]))


@dataclass(frozen=True)
class Saved:
    """A moment as a checkpoint has it."""

    place: tuple[int, int, bool, bool]
    """Steps, updates, whether inside a step, whether the stage is over."""
    shared: Bytes
    own: Bytes
    engine: Any
    log: int

    def states(self, change: Callable[[States], object] = lambda states: None) -> States:
        """What to begin from; ``change`` may lose a part of it."""
        states = States(from_bytes(self.shared), from_bytes(self.own))
        change(states)
        return states


@dataclass
class Ran:
    """All that a run shows of itself."""

    trace: list[tuple[Any, ...]] = field(default_factory=list)
    """A line an update: where it is, hashes of weights and optimiser, and of the text learnt."""
    states: list[list[str]] = field(default_factory=list)
    """Of each update too: hashes of what is saved beside the engine."""
    saved: list[Saved] = field(default_factory=list)
    published: list[tuple[int, dict[str, float], str]] = field(default_factory=list)
    collected: list[int] = field(default_factory=list)
    """Steps whose text was made here."""
    log: bytes = b""
    done: Progressed = field(default_factory=Progressed)

    @property
    def outcome(self) -> dict[str, Any]:
        """What the run's status says of the stage, but for its seconds."""
        return {name: getattr(self.done, name) for name in Progressed.__slots__ if name != "seconds"}


class Watched:
    """An objective whose text is looked at as it is learnt, whether collected or taken up."""

    def __init__(self, objective: Objective, ran: Ran) -> None:
        self.objective, self.ran, self.text = objective, ran, ""
        self.hear, self.state, self.restore = objective.hear, objective.state, objective.restore
        self.pack, self.unpack = objective.pack, objective.unpack
        self.news, self.shown = objective.news, objective.shown

    def collect(self, step: int, student: Student) -> tuple[Any, dict[str, float]]:
        self.ran.collected.append(step)
        return self.objective.collect(step, student)

    def learning(self, collected: Any, student: Student, *, made: int = 0) -> AbstractContextManager[Any]:
        self.text = repr(text_of(collected))
        return self.objective.learning(collected, student, made=made)


def text_of(collected: Any) -> Any:
    """The tokens that a step learns from."""
    if isinstance(collected, list):
        return [(row.ids, row.response_ids) for row in collected]
    practice = collected.practice
    anchor = [(row.ids, row.response_ids) for row in collected.anchor]
    return [practice.prompts.ids_BP.tolist(), practice.response_BT.tolist(), practice.mask_BT.tolist(), anchor]


def sha(*parts: bytes | str) -> str:
    """Short name of some bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]


def tensor_bytes(value: torch.Tensor) -> bytes:
    """Bit by bit."""
    return value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def engine_of(student: Student) -> Any:
    """Weights, moments and updates done, at ZeRO 0."""
    return copy.deepcopy((student.root.state_dict(), student._engine.optimizer.state_dict(), student.updates_done))


def put_back(student: Student, engine: Any) -> None:
    """The same again, in an engine that had others."""
    weights, optimiser, updates = engine
    student._engine.optimizer.zero_grad()  # of an update that was refused
    student.root.load_state_dict(weights)
    student._engine.optimizer.load_state_dict(copy.deepcopy(optimiser))
    student.updates_done, student.learning_rate = updates, 0.0


def engine_hash(student: Student) -> str:
    """Of every bit of it."""
    weights, optimiser = student.root.state_dict(), student._engine.optimizer.state_dict()
    parts = [tensor_bytes(weights[name]) for name in sorted(weights)]
    for number in sorted(optimiser["state"]):
        parts += [tensor_bytes(value) for _, value in sorted(optimiser["state"][number].items())]
    return sha(*parts, str(student.updates_done))


def scramble() -> None:
    """Leaves the process's random generators where no run has left them."""
    noise = random.SystemRandom().getrandbits(32)
    random.seed(noise)
    numpy.random.seed(noise)
    torch.manual_seed(noise)


def save_models(folder: Path) -> Path:
    """A teacher and a student; by a process that is alone."""
    for seed, name in enumerate(("teacher", "student")):
        tiny.save_model(folder / name, "gpt2", seed=1 + seed)
    return folder


class Toy:
    """Tiny models and prompts, and two engines that all stages share: one with dropout, one without."""

    def __init__(self, folder: Path, *, models: Path) -> None:
        """``folder`` is this rank's own; ``models`` is where ``save_models`` put them."""
        self.folder, self.ranks, self.models = folder, Ranks(), models
        card = Card(name="teacher", model=str(models / "teacher"))
        self.teacher = Teacher(
            lambda: load_model(card, inspect(card), seed=0), ranks=self.ranks, placement="replicated",
            precision="fp32", real_ids=REAL,
        )  # fmt: skip
        self.prompts = prompts()
        self._students: dict[bool, tuple[Student, Any]] = {}
        self._runs = 0

    def student(self, *, dropout: bool) -> Student:
        """As it was made."""
        if dropout not in self._students:
            card = Card(name="student", model=str(self.models / "student"))
            made = Student(
                lambda: load_model(card, inspect(card), seed=0), ranks=self.ranks, settings="zero0", precision="fp32",
                optimiser=OptimiserConfig(**OPTIMISER), updates=UPDATES, real_ids=REAL, dropout=dropout, seed=3,
            )  # fmt: skip
            self._students[dropout] = made, engine_of(made)
        student, engine = self._students[dropout]
        put_back(student, engine)
        return student

    def objective(self, stage: BaseStage) -> Objective:
        """A new one."""
        common: dict[str, Any] = {"prompts": self.prompts, "ids": IDS, "ranks": self.ranks, "seed": 3}
        if isinstance(stage, MinillmStage):
            return Minillm(stage, decoding=DECODING, teacher=self.teacher, **common)
        if isinstance(stage, DistilStage):
            return Distil(stage, decoding=DECODING, teacher=self.teacher, **common)
        return References(stage, teacher=self.teacher, **common)  # type: ignore[arg-type]

    def run(
        self, stage: BaseStage, *, begin: Saved | None = None, log: bytes = b"",
        change: Callable[[States], object] = lambda states: None, until: int | None = None,
    ) -> Ran:  # fmt: skip
        """A stage from its beginning or from a moment, of whose run the log is there too; ended at update ``until``."""
        scramble()
        self._runs += 1
        ran, folder = Ran(), RunFolder(self.folder / f"run-{self._runs}", writes=self.ranks.first)
        folder.begin("")
        student = self.student(dropout=stage.drops_out)
        if begin is not None:
            put_back(student, begin.engine)
            if self.ranks.first:
                (folder.path / "metrics.jsonl").write_bytes(log + b'{"kind": "tra')
            folder.cut_log(begin.log)
        watched = Watched(self.objective(stage), ran)
        to_be_gone_on_from = begin is None or until is not None

        def boundary(moment: Moment) -> bool:
            states = moment.state()
            place = (moment.step, moment.update, moment.inside, moment.over)
            assert moment.update == student.updates_done and moment.stage == "toy"
            ran.trace.append((*place, engine_hash(student), sha(watched.text)))
            ran.states.append(hashed(states))
            if to_be_gone_on_from:
                shared, own = map(to_bytes, states)
                ran.saved.append(Saved(place, shared, own, engine_of(student), folder.log_length()))
            scramble()
            return moment.update == until

        def publish(scores: Mapping[str, float]) -> str:
            weights = engine_hash(student)
            ran.published.append((student.updates_done, dict(scores), weights))
            return weights

        ran.done = run_steps(
            watched, student, stage="toy", steps=stage.steps, ranks=self.ranks, folder=folder, headline=("loss",),
            validate=validate, validate_every=stage.validate_every,
            keep=Keep(metric=stage.keep.metric, highest=stage.keep.mode == "max"), patience=stage.patience,
            publish=publish, alarms=Alarms(stage.alarms) if isinstance(stage, MinillmStage) else None,
            begin=None if begin is None else begin.states(change), boundary=boundary,
        )  # fmt: skip
        written = folder.path / "metrics.jsonl"
        ran.log = written.read_bytes() if written.exists() else b""
        return ran


def hashed(states: States) -> list[str]:
    """Of the shared state and of this rank's, but for the seconds."""
    record = copy.deepcopy(states.shared.record)
    del record["progress"]["seconds"]
    found = []
    for plain, tensors in ((record, states.shared.tensors), (states.own.record, states.own.tensors)):
        found.append(
            sha(to_json(plain), *(part for name in sorted(tensors) for part in (name, tensor_bytes(tensors[name]))))
        )
    return found


def validate(student: Student) -> dict[str, float]:
    """A loss that rises, a figure in which every bit of every weight is, and one that is no number."""
    total = float(sum(p.detach().double().abs().sum() for p in student.root.parameters()))
    return {"loss": 1.0 + 0.2 * student.updates_done, "reverse_kl": total, "rouge_l": float("nan")}


def lines(log: bytes) -> list[dict[str, Any]]:
    """Of a log, without the seconds."""
    return [
        {name: value for name, value in json.loads(line).items() if name not in OF_THE_PROCESS}
        for line in log.splitlines()
    ]


def prompts() -> list[Prompt]:
    """Nine, of two to five letters, with responses."""
    rows = []
    for n in range(9):
        letters = [tiny.LETTERS[(n * 7 + step * 3) % 26] for step in range(2 + n % 4)]
        rows.append(Row(uid=f"row-{n}", prompt=" ".join(letters), responses=(" ".join(reversed(letters)),)))
    found, _ = prepare(
        rows, tokenizer=tiny.tokenizer(), template="plain", max_prompt_tokens=8, over_long="error",
        max_response_tokens=8, eos_id=EOS, need_response=True,
    )  # fmt: skip
    return found

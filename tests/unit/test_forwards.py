"""What one MiniLLM step runs, counted and held against the table "Forwards in a step" of docs/performance.md.

Counted where the work is done: at the backbones, at the engine's backward pass, and at the rows that a head multiplies.

Legend: T tokens of the longest response, N tokens of all responses, K inner epochs, M micro-batches, G coin groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from minillm import decode, objectives, reading, token_loss
from minillm.alarm_config import AlarmsConfig
from minillm.cards import Card
from minillm.config import MinillmStage, OptimiserConfig
from minillm.loading import inspect, load
from minillm.objectives import Minillm
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights, score
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.types import Decoding, DrawKey, Ids, Prompt, Purpose, Rollout
from tests import tiny
from tests.coins import heads_of, lives, wanted

ROWS, LONGEST, GROUPS, SEED = 7, 9, 2, 3
OPTIMISER = OptimiserConfig(lr=1e-3)
IDS = Ids(eos=tuple(range(1, len(tiny.WORDS), 4)), pad=0)
"""So many that rows end at different times."""
PROMPTS = [Prompt(uid=f"row-{n}", text="", ids=tuple(range(3 + n, 5 + n + n % 4))) for n in range(ROWS)]


@dataclass
class Counted:
    """Forwards of both backbones (the tokens that each read side by side), head rows, and backward passes."""

    student: list[int] = field(default_factory=list)
    teacher: list[int] = field(default_factory=list)
    student_head: int = 0
    teacher_head: int = 0
    backward: int = 0


@dataclass
class Models:
    """A student, a teacher, and what they were seen doing since the count was last set to nothing."""

    student: Student
    teacher: Teacher
    counted: Counted = field(default_factory=Counted)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Counts from now on."""
        for name, root in (("student", self.student.root), ("teacher", self.teacher.root)):
            root.backbone.register_forward_pre_hook(self._forward(name), with_kwargs=True)
        plain, tiled, backward = HeadWeights.logits, HeadWeights.multiply, self.student._engine.backward

        def count(head: HeadWeights, rows: int) -> None:
            own = head.weight_VH.data_ptr() == self.student.root.head.weight.data_ptr()
            assert own or head.weight_VH.data_ptr() == self.teacher.root.head.weight.data_ptr()
            name = "student_head" if own else "teacher_head"
            setattr(self.counted, name, getattr(self.counted, name) + rows)

        def logits(head: HeadWeights, hidden_NH: Tensor) -> Tensor:
            count(head, len(hidden_NH))
            return plain(head, hidden_NH)

        def multiply(head: HeadWeights, hidden_nH: Tensor, *, out_nV: Tensor) -> Tensor:
            count(head, len(hidden_nH))
            return tiled(head, hidden_nH, out_nV=out_nV)

        def count_backward(*arguments: Any, **options: Any) -> Any:
            self.counted.backward += 1
            return backward(*arguments, **options)

        patch.setattr(HeadWeights, "logits", logits)
        patch.setattr(HeadWeights, "multiply", multiply)
        patch.setattr(self.student._engine, "backward", count_backward)

    def _forward(self, name: str) -> Callable[..., None]:
        def seen(module: nn.Module, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> None:
            getattr(self.counted, name).append(inputs["input_ids"].shape[1])

        return seen

    def since(self) -> Counted:
        """What was counted, and counting begins anew."""
        found, self.counted = self.counted, Counted()
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("models")
    tiny.save_model(top / "teacher", "llama", seed=1)
    tiny.save_model(top / "student", "llama", seed=2)
    return top


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    ranks, cards = Ranks(), {name: Card(name=name, model=str(folder / name)) for name in ("student", "teacher")}
    student = Student(
        lambda: load(cards["student"], inspect(cards["student"]), seed=0), ranks=ranks, settings="zero0",
        precision="fp32", optimiser=OPTIMISER, updates=100,
    )  # fmt: skip
    teacher = Teacher(
        lambda: load(cards["teacher"], inspect(cards["teacher"]), seed=0), ranks=ranks, placement="replicated",
        precision="fp32",
    )  # fmt: skip
    models = Models(student, teacher)
    models.watch(monkeypatch)
    yield models
    student._engine.destroy()


@dataclass
class Step:
    """One step, and what it ran in each of its halves."""

    rollout: Rollout
    collecting: Counted
    learning: Counted


def run(models: Models, *, mix: float, inner_epochs: int, micro_batch: int, steps: int = 2) -> list[Step]:
    """Steps as the loop makes them."""
    stage = MinillmStage(
        steps=steps, prompts=ROWS, teacher_mix=mix, inner_epochs=inner_epochs, micro_batch=micro_batch,
        coin_groups=GROUPS, optimiser=OPTIMISER,
        alarms=AlarmsConfig(repetition=None),  # the teacher's own text, once a stage, is not counted here
    )  # fmt: skip
    objective = Minillm(
        stage, prompts=PROMPTS, decoding=Decoding(max_new_tokens=LONGEST), teacher=models.teacher, ids=IDS,
        ranks=models.student.ranks, seed=SEED,
    )  # fmt: skip
    models.since()
    done = []
    for step in range(steps):
        collected, _ = objective.collect(step, models.student)
        collecting = models.since()
        with objective.learning(collected, models.student) as updates:
            for update in updates:
                models.student.update(update.losses)
                update.figures()
        done.append(Step(collected.targets.scored.rollout, collecting, models.since()))
    return done


@dataclass
class Table:
    """The table's formulas for one step."""

    rollout: Rollout
    mix: float
    updates: int
    micro_batch: int
    step: int

    @property
    def longest(self) -> int:
        return int(self.rollout.length_B.max())

    @property
    def tokens(self) -> int:
        return int(self.rollout.length_B.sum())

    @property
    def micro_batches(self) -> int:
        return -(-ROWS // self.micro_batch) if self.micro_batch else 1

    def teacher_forwards(self) -> int:
        if self.mix == 0:
            return 1
        key = DrawKey(seed=SEED, stage="minillm", purpose=Purpose.TOKEN, rollout=self.step)
        heads_G = heads_of(key, mix=self.mix, groups=GROUPS, longest=LONGEST)
        life_G = lives(self.rollout, GROUPS)
        assert sum(map(wanted, heads_G, life_G)) <= sum(map(len, heads_G)) + GROUPS
        return sum(map(wanted, heads_G, life_G))

    def complaints(self, step: Step) -> list[str]:
        """The lines of the table that a step did not keep to."""
        made, learnt, passes = step.collecting, step.learning, self.updates * self.micro_batches
        prompt = self.rollout.prompts.ids_BP.shape[1]
        kept = {
            "student, decoding: the prompts, then token by token": made.student == [prompt] + [1] * (self.longest - 1),
            "teacher, reading": len(made.teacher) == self.rollout.teacher_forwards == self.teacher_forwards(),
            "teacher, reading nothing twice": sum(made.teacher) <= GROUPS * (prompt + self.longest),
            "student, learning": len(learnt.student) == passes,
            "backward passes": (made.backward, learnt.backward) == (0, passes),
            "teacher, not read again": learnt.teacher == [],
            "student's head: to draw, and once to score": made.student_head == 2 * self.tokens,
            "teacher's head: at heads, and once to score": made.teacher_head
            == self.tokens + int(self.rollout.teacher_drew_BT.sum()),
            "either head, once for value and gradient": learnt.student_head
            == learnt.teacher_head
            == self.updates * self.tokens,
        }
        return [line for line, held in kept.items() if not held]


def complaints(models: Models, *, mix: float, inner_epochs: int = 1, micro_batch: int = 0) -> list[list[str]]:
    """Of two steps."""
    done = run(models, mix=mix, inner_epochs=inner_epochs, micro_batch=micro_batch)
    return [
        Table(step.rollout, mix, inner_epochs, micro_batch, number).complaints(step) for number, step in enumerate(done)
    ]


@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("inner_epochs", [1, 2])
@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_a_step_runs_what_the_table_says(mix: float, inner_epochs: int, micro_batch: int, models: Models) -> None:
    assert complaints(models, mix=mix, inner_epochs=inner_epochs, micro_batch=micro_batch) == [[], []]


def test_the_case_is_hard_enough(models: Models) -> None:
    """Rows end at different times, and teacher and student both draw."""
    steps = run(models, mix=0.2, inner_epochs=2, micro_batch=2)
    assert all(len(set(step.rollout.length_B.tolist())) > 2 for step in steps)
    assert any(bool(step.rollout.teacher_drew_BT.any()) for step in steps)
    assert all(len(step.learning.student) == 8 and len(step.collecting.teacher) > 1 for step in steps)


def test_a_scoring_pass_of_the_student_is_seen(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: old log-probs from another forward, as they are found elsewhere."""

    def again(rollout: Rollout, *, student: Any, **options: Any) -> Any:
        inputs = objectives.rollout_inputs(rollout, range(ROWS))
        student.read(inputs["ids_BL"], inputs["mask_BL"])
        return score(rollout, student=student, **options)

    monkeypatch.setattr(objectives, "score", again)
    assert all("student, decoding: the prompts, then token by token" in lines for lines in complaints(models, mix=0.0))


def test_a_teacher_that_reads_at_each_update_is_seen(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: its hidden states are to serve all updates."""
    plain = Minillm._loss

    def again(self: Minillm, rows: Any, collected: Any, **options: Any) -> Tensor:
        inputs = objectives.rollout_inputs(collected.targets.scored.rollout, rows)
        models.teacher.reader.read(inputs["ids_BL"], inputs["mask_BL"])
        return plain(self, rows, collected, **options)

    monkeypatch.setattr(Minillm, "_loss", again)
    assert complaints(models, mix=0.2) == [["teacher, not read again"]] * 2


def test_a_teacher_that_runs_at_each_token_is_seen(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the line on mixing."""
    plain = decode._open_guides

    def eager(*args: Any, heads_GT: list[list[bool]], **more: Any) -> Any:
        return plain(*args, heads_GT=[[True] * len(heads) for heads in heads_GT], **more)

    monkeypatch.setattr(decode, "_open_guides", eager)
    assert all("teacher, reading" in lines for lines in complaints(models, mix=0.2))


def test_a_step_without_cache_is_seen(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a decode loop that reads the whole text at every token makes as many forwards, and longer."""
    plain = reading.Reading._extend

    def whole(self: Any, ids_RS: Tensor, mask_RL: Tensor) -> Tensor:
        self.cache = None
        ids_RL = self.page.ids_BL[self.rows_R, : mask_RL.shape[1]]
        return plain(self, ids_RL, mask_RL)[:, -ids_RS.shape[1] :]

    monkeypatch.setattr(reading.Reading, "_extend", whole)
    assert complaints(models, mix=0.0) == [["student, decoding: the prompts, then token by token"]] * 2


def test_logits_that_are_made_twice_are_seen(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a tile's logits made once for the value and again for the gradient."""
    plain = token_loss._Gradients.add

    def again(self: Any, tile: Any, *, hidden_nH: Tensor, head: HeadWeights) -> None:
        head.logits(hidden_nH)
        plain(self, tile, hidden_nH=hidden_nH, head=head)

    monkeypatch.setattr(token_loss._Gradients, "add", again)
    assert complaints(models, mix=0.0) == [["either head, once for value and gradient"]] * 2

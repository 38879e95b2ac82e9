"""A precision is what a model computes in, wherever its weights live; the optimiser keeps 32 bits.

Here on one process; tests/dist shares the weights over two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor

from minillm.cards import Card
from minillm.config import OptimiserConfig
from minillm.engine_state import layout_of
from minillm.loading import inspect, load
from minillm.ranks import Ranks
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_scatter_tensor.*:FutureWarning")  # DeepSpeed's own

REAL = len(tiny.WORDS)
RANKS = Ranks()
MANY = 128
STAGES = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
PRECISIONS = [("fp32", torch.float32), ("bf16", torch.bfloat16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), "llama", seed=2, rows=30)


@pytest.fixture
def student(folder: Path) -> Callable[..., Student]:
    card = Card(name="it", model=str(folder))

    def make(stage: str, precision: str, *, lr: float = 1e-2) -> Student:
        optimiser = OptimiserConfig(lr=lr, schedule="constant")
        return Student(
            lambda: load(card, inspect(card), seed=0), ranks=RANKS, settings=stage, precision=precision,
            optimiser=optimiser, updates=100, real_ids=REAL,
        )  # fmt: skip

    return make


def learn(student: Student, *, micro_batches: int = 1) -> tuple[float, float]:
    """One step on two rows of text, the same in each micro-batch; its loss and the gradient's norm."""
    ids_BL = torch.tensor([[3, 4, 5, 6, 7], [9, 2, 11, 4, 1]])
    mask_BL, predict_BL = ids_BL > 0, torch.arange(5).expand(2, 5) > 1

    def loss() -> Tensor:
        return student.loss(
            ids_BL=ids_BL, mask_BL=mask_BL, predict_BL=predict_BL, wanted=("logq",),
            loss=lambda numbers, _: -numbers["logq"].sum() / (6 * micro_batches),
        )[0]  # fmt: skip

    return student.update([loss] * micro_batches)


@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_student_computes_in_the_precision_of_its_engine_at_every_stage(
    stage: str, precision: str, dtype: torch.dtype, student: Callable[..., Student]
) -> None:
    it = student(stage, precision)
    with it.whole() as reader:
        ids_BS = torch.arange(2, 8)[None]
        hidden_BSH, _ = reader.extend(ids_BS, torch.ones_like(ids_BS), None)
        assert hidden_BSH.dtype == dtype
        assert reader.logits(hidden_BSH[0]).dtype == torch.float32
    assert {value.dtype for value in it.state().values()} == {dtype}
    it.close()


@pytest.mark.parametrize(("precision", "_"), PRECISIONS)
def test_every_stage_has_the_same_first_loss(precision: str, _: Any, student: Callable[..., Student]) -> None:
    losses = [learn(student(stage, precision))[0] for stage in STAGES]
    assert losses == [pytest.approx(losses[0], abs=1e-6)] * len(STAGES)


def test_sixteen_bits_are_another_loss(student: Callable[..., Student]) -> None:
    """Negative control: the comparison above would see a stage that passes over its precision."""
    (short, _), (whole, _) = (learn(student("zero2", precision)) for precision in ("bf16", "fp32"))
    assert short != pytest.approx(whole, abs=1e-6)


def norms(student: Callable[..., Student], stage: str) -> tuple[float, float]:
    """Of the gradient as one micro-batch and as the sum of many equal ones, each in 16 bits; each is one step."""
    found = []
    for micro_batches in (1, MANY):
        it = student(stage, "bf16")
        found.append(learn(it, micro_batches=micro_batches)[1])
        assert {piece.steps() for piece in layout_of(it._engine).pieces} == {1.0} and it.updates_done == 1
        it.close()
    return found[0], found[1]


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_add_up_in_32_bits_and_make_one_step(stage: str, student: Callable[..., Student]) -> None:
    whole, summed = norms(student, stage)
    assert summed == pytest.approx(whole, rel=1e-5)


def test_micro_batches_that_add_up_in_16_bits_are_seen(
    student: Callable[..., Student], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: an engine that adds them up as DeepSpeed does by itself."""
    initialize = deepspeed.initialize

    def short(config: dict[str, Any], **more: Any) -> Any:
        return initialize(config={key: value for key, value in config.items() if key != "data_types"}, **more)

    monkeypatch.setattr(deepspeed, "initialize", short)
    whole, summed = norms(student, "zero2-offload")
    assert summed != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_steps_too_small_for_sixteen_bits_add_up(stage: str, student: Callable[..., Student]) -> None:
    """Of weights near 1 (the norms) a step of 1e-4 is lost in bf16; forty of them are not, where 32 bits are kept."""
    it = student(stage, "bf16", lr=1e-4)
    name = "backbone.norm.weight"
    before = it.state()[name]
    assert bool((before == 1).all()) and torch.equal(before - 1e-4, before), "the control: one by one they vanish"
    for _ in range(40):
        learn(it)
    assert bool((it.state()[name] != before).any())
    it.close()


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
@pytest.mark.parametrize("placement", ["replicated", "zero3", "offload"])
def test_a_teacher_is_kept_in_the_dtype_of_its_card_wherever_it_is_placed(
    placement: str, dtype: Any, width: int, folder: Path
) -> None:
    card = Card(name="it", model=str(folder), dtype=dtype)
    precision = "bf16" if dtype == "bfloat16" else "fp32"
    teacher = Teacher(
        lambda: load(card, inspect(card), seed=0), ranks=RANKS, placement=placement, precision=precision, real_ids=REAL
    )
    assert teacher.whole_bytes == width * teacher.parameters
    assert teacher.check_share() == [teacher.resident_bytes()]
    assert teacher.resident_bytes().bytes <= teacher.whole_bytes + 8 * 20
    ids_BS = torch.arange(2, 8)[None]
    hidden_BSH, _ = teacher.reader.extend(ids_BS, torch.ones_like(ids_BS), None)
    assert hidden_BSH.dtype == getattr(torch, dtype)

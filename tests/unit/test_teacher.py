"""The teacher is frozen by type, and rows of its head that mean nothing have no influence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import api, distill
from minillm.cards import SHARDED, Card
from minillm.errors import ModelError
from minillm.loading import inspect, load
from minillm.ranks import Ranks
from minillm.run_log import OF_THE_PROCESS
from minillm.scoring import HeadWeights
from minillm.teacher_engine import Kept, Teacher
from tests import tiny

REAL, ROWS = len(tiny.WORDS), 32
RANKS = Ranks()
PLACEMENTS = ("replicated", *SHARDED)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for tied in (True, False):
        tiny.save_model(folder / f"teacher-{tied}", "gpt2", seed=1, tied=tied, rows=ROWS)
    tiny.save_model(folder / "student", "gpt2", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    return folder


def make_teacher(folder: Path, *, placement: str = "replicated") -> Teacher:
    card = Card(name="teacher", model=str(folder))
    return Teacher(
        lambda: load(card, inspect(card), seed=0), ranks=RANKS, placement=placement, precision="fp32", real_ids=REAL
    )


RUN: dict[str, Any] = {
    "inner_epochs": 2,
    "teacher_mix": 0.4,
    "validate_every": 1,
    "lm_coefficient": 0.5,
    "lm_batch": 4,
}


def config(inputs: Path, out: Path, *, teacher: Path | None = None) -> Any:
    prompts = str(inputs / "prompts.jsonl")
    return tiny.minillm_config(
        out,
        teacher=teacher or inputs / "teacher-True",
        student=inputs / "student",
        prompts=inputs / "prompts.jsonl",
        run_data={"train": prompts, "validation": prompts, "validation_limit": 4, "max_prompt_tokens": 8},
        **RUN,
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_teacher_has_no_gradient_no_dropout_and_no_optimiser(placement: str, inputs: Path) -> None:
    teacher = make_teacher(inputs / "teacher-True", placement=placement)
    assert not any(parameter.requires_grad for parameter in teacher.root.parameters())
    assert not any(module.training for module in teacher.root.modules())
    engine: Any = teacher.reader._root
    if placement in SHARDED:
        assert engine.module is teacher.root and engine.basic_optimizer is None
    else:
        assert engine is teacher.root
    ids_BS = torch.arange(2, 8)[None]
    hidden_BSH, _ = teacher.reader.extend(ids_BS, torch.ones_like(ids_BS), None)
    assert not hidden_BSH.requires_grad and not teacher.reader.logits(hidden_BSH[0]).requires_grad
    with teacher.head() as head:
        assert isinstance(head, HeadWeights) and head.weight_VH.shape[0] == REAL and not head.weight_VH.requires_grad


def test_a_frozen_model_is_what_the_assertions_above_tell_from_an_ordinary_one(inputs: Path) -> None:
    """Negative control."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "teacher-True")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(module.training for module in model.train().modules())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_teacher_is_bitwise_the_same_after_a_run(
    placement: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Teacher] = []

    def remember(*_: Any, **__: Any) -> Teacher:
        seen.append(make_teacher(inputs / "teacher-True", placement=placement))
        return seen[0]

    monkeypatch.setattr(api, "load_teacher", remember)
    monkeypatch.setattr(Teacher, "close", lambda _: None)  # to look at it after the run
    run = distill(config(inputs, tmp_path))
    (teacher,) = seen
    stored = AutoModelForCausalLM.from_pretrained(inputs / "teacher-True").base_model
    for name, want in stored.named_parameters():
        got = teacher.root.backbone.get_parameter(name)
        kept = getattr(got, "ds_tensor", got)  # with one rank the only shard is everything
        assert torch.equal(kept.flatten()[: want.numel()], want.flatten()), name
        assert got.grad is None
    # Negative control: the student of this very run did change.
    begun = AutoModelForCausalLM.from_pretrained(inputs / "student").state_dict()
    ended = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    assert all(not torch.equal(ended[name], begun[name]) for name in begun)


def figures(settings: Any) -> list[dict[str, Any]]:
    """Every logged number of a run but its clock's."""
    run = distill(settings)
    lines = tiny.logged(run) + tiny.logged(run, "validation")
    return [{name: value for name, value in line.items() if name not in OF_THE_PROCESS} for line in lines]


def spoilt(source: Path, target: Path, *, first: int, garbage: float) -> Path:
    """The teacher with ``garbage`` in all rows of its head from ``first`` on (of its embedding too, if tied)."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.get_output_embeddings().weight[first:] = garbage
    model.save_pretrained(target)
    tiny.tokenizer(pad=tiny.EOS).save_pretrained(target)
    return target


@pytest.mark.parametrize("tied", [True, False])
def test_garbage_in_the_padded_rows_of_the_teacher_changes_nothing(tied: bool, inputs: Path, tmp_path: Path) -> None:
    """Not one bit of one figure, whatever stands there (design D9); one row earlier it would."""
    source = inputs / f"teacher-{tied}"
    want = figures(config(inputs, tmp_path / "clean", teacher=source))
    for garbage in (float("nan"), 1e30):
        bad = spoilt(source, tmp_path / f"{garbage}", first=REAL, garbage=garbage)
        assert figures(config(inputs, tmp_path / f"run-{garbage}", teacher=bad)) == want
    worse = spoilt(source, tmp_path / "worse", first=REAL - 1, garbage=3.0)
    assert figures(config(inputs, tmp_path / "other", teacher=worse)) != want, "the control: the last real row counts"


@pytest.mark.parametrize("placement", SHARDED)
def test_only_an_offloaded_teacher_is_fetched_by_a_single_process(placement: str, inputs: Path) -> None:
    """Its whole weights, from the host, in each forward; sharded over one rank, all of it is there."""
    teacher = make_teacher(inputs / "teacher-True", placement=placement)
    teacher.traffic()
    ids_BS = torch.arange(2, 8)[None]
    found = []
    for _ in range(2):
        teacher.reader.read(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool))
        found.append(teacher.traffic())
    away = placement == "offload"
    for one in found:
        assert (one["teacher_gathers"] > 0) == away
        assert one["teacher_gathered_bytes"] == (teacher.whole_bytes if away else 0)
    assert set(teacher.traffic().values()) == {0.0}, "the control: nothing ran in between"


def test_a_whole_teacher_gathers_nothing_and_says_nothing_of_it(inputs: Path) -> None:
    assert make_teacher(inputs / "teacher-True").traffic() == {}


def test_an_offloaded_teacher_keeps_nothing_on_the_device(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: where everything is kept whole, and where shards are on the device, it is refused."""
    teacher = make_teacher(inputs / "teacher-True", placement="offload")
    (kept,) = teacher.check_share()
    assert kept.host == teacher.whole_bytes and kept.device <= 8 * len(list(teacher.root.parameters()))
    whole = make_teacher(inputs / "teacher-True")
    assert whole.check_share() == [Kept(device=whole.whole_bytes, host=0)]
    whole.placement = "offload"
    with pytest.raises(ModelError, match=r"keeps [\d,]+ of [\d,]+ bytes on a device; wanted none"):
        whole.check_share()
    monkeypatch.setattr(teacher, "whole_bytes", teacher.whole_bytes // 2)
    with pytest.raises(ModelError, match=r"stage3_param_persistence_threshold"):
        teacher.check_share()


def test_a_run_tells_what_its_teacher_keeps_and_what_it_gathers(inputs: Path, tmp_path: Path) -> None:
    card = tmp_path / "there.yaml"
    card.write_text(f"{{model: {inputs / 'teacher-True'}, placement: offload}}\n", encoding="utf-8")
    for teacher, away in ((card, True), (inputs / "teacher-True", False)):
        run = distill(config(inputs, tmp_path / str(away), teacher=teacher))
        told = json.loads((run / "run.json").read_text(encoding="utf-8"))["teacher_bytes"]
        (kept,) = told["ranks"].values()
        assert kept["host" if away else "device"] == told["whole"] > 0
        assert kept["device" if away else "host"] < 0.02 * told["whole"]
        for line in tiny.logged(run):
            # Each reading of rows takes the backbone or more; the first of a step reads with both parts.
            assert (line.get("teacher_gathered_bytes", 0) >= told["whole"]) == away
            assert ("teacher_gathers" in line) == away
        assert not any("teacher_gathers" in line for line in tiny.logged(run, "validation"))

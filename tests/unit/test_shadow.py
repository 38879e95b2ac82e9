"""The moving average of a student: whole, in 32 bits, after each update, under every engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minillm import distill, shadow
from minillm.ranks import Ranks
from minillm.shadow import Shadow
from minillm.student_engine import Student
from tests import tiny
from tests.resume import engine_worker
from tests.resume.engine_worker import CELLS, learn

RANKS = Ranks()
RATE = 0.01


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shadow")
    engine_worker.write_inputs(folder)
    tiny.save_model(folder / "teacher", "llama", seed=1)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    return folder


@contextlib.contextmanager
def engine(folder: Path, cell: str) -> Iterator[Student]:
    it = engine_worker.student(folder, CELLS[cell], RANKS)
    try:
        yield it
    finally:
        it.close()


def copied(it: Student) -> dict[str, Tensor]:
    return {name: whole.to(torch.float64, copy=True) for name, whole in it.master_weights()}


@pytest.mark.parametrize("cell", ["zero0", "zero0-muon", "zero2", "zero2-robin", "zero3", "zero2-offload"])
def test_master_weights_are_the_weights(folder: Path, cell: str) -> None:
    with engine(folder, cell) as it:
        learn(it, 0)
        own = it.state()
        for name, whole in it.master_weights():
            assert torch.equal(whole, own[name]), name
        assert {name for name, _ in it.master_weights()} <= own.keys()


@pytest.mark.parametrize("cell", ["zero0", "zero1-bf16", "zero2-bf16", "zero3-bf16", "zero3-groups", "zero3-param"])
def test_it_follows_the_optimisers_weights_in_32_bits(folder: Path, cell: str) -> None:
    """By definition, in 64 bits, over three updates."""
    with engine(folder, cell) as it:
        held = Shadow(rate=RATE)
        held.begin(it)
        want = copied(it)
        for update in range(3):
            learn(it, update)
            held.follow(it)
            now = copied(it)
            want = {name: (1 - RATE) * mean + RATE * now[name] for name, mean in want.items()}
        found = held.state().tensors
        moved = 0.0
        for name, mean in want.items():
            assert found[name].dtype == torch.float32
            assert float((found[name] - mean).abs().max()) < 1e-6, name
            moved = max(moved, float((now[name] - mean).abs().max()))
        assert moved > 1e-3, "a control: the student itself is somewhere else"
        apart = sum(float((now[name] - mean).square().sum()) for name, mean in want.items()) ** 0.5
        norm = sum(float(mean.square().sum()) for mean in want.values()) ** 0.5
        assert held.drift == pytest.approx(apart / norm, rel=1e-4)


def test_from_what_bf16_computes_with_it_would_be_another(folder: Path) -> None:
    """A control: the model's own weights, rounded to 16 bits, are not the optimiser's."""
    with engine(folder, "zero1-bf16") as it:
        learn(it, 0)
        rounded = dict(it.root.named_parameters())
        assert any(not torch.equal(rounded[name].float(), whole) for name, whole in it.master_weights())


def lines(folder: Path, name: str, *, rate: float, steps: int = 3) -> list[dict[str, float]]:
    config = tiny.minillm_config(
        folder / "runs", teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl",
        name=name, steps=steps, teacher_mix=0.0, anchor={"weight": 0.5, "rate": rate}, run_checkpoints=None,
    )  # fmt: skip
    return tiny.logged(distill(config))


def test_an_anchor_begins_as_the_student_and_falls_behind(folder: Path) -> None:
    """At rate 1 it is the student that samples, again and again; at 0 it stays where the stage began."""
    follows, lags, stays = (lines(folder, f"rate-{rate:g}", rate=rate) for rate in (1.0, 0.5, 0.0))
    for run in (follows, lags, stays):
        assert abs(run[0]["anchor_kl"]) < 1e-5
    assert all(abs(line["anchor_kl"]) < 1e-5 and line["anchor_drift"] == 0 for line in follows)
    assert stays[2]["anchor_kl"] > lags[2]["anchor_kl"] > 1e-3
    assert stays[2]["anchor_drift"] > lags[2]["anchor_drift"] > 0


def test_a_shadow_that_does_not_follow_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "moved_", lambda mean, weights, *, rate: mean)
    assert lines(folder, "broken", rate=1.0)[2]["anchor_kl"] > 1e-3


def test_a_heavier_anchor_holds_the_student_nearer(folder: Path) -> None:
    def drift(weight: float) -> float:
        config = tiny.minillm_config(
            folder / "runs", teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl",
            name=f"weight-{weight:g}", steps=20, teacher_mix=0.0,
            anchor={"weight": weight, "rate": 0.0}, optimiser={"lr": 3e-3}, run_checkpoints=None,
        )  # fmt: skip
        return float(tiny.logged(distill(config))[-1]["anchor_kl"])

    assert drift(20.0) < 0.5 * drift(0.01)

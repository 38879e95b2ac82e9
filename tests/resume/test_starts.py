"""Stages that do not start from the one before them: what they start from, what differs between them, and what is
needed of those behind when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm import run_training
from minillm.api import distill
from minillm.config import RunConfig, Stage
from minillm.errors import CheckpointError
from minillm.order import GlobalOrder
from minillm.publish import weights_sha256
from minillm.stages import Start
from minillm.student_engine import Student
from tests import tiny
from tests.resume.test_going_on import log, made, stopped


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("starts"))


def stage(name: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "sft", "name": name, "steps": 2, "batch": 4, "optimiser": {"lr": 1e-2, "schedule": "constant"}, **more
    }  # fmt: skip


def config(place: Path, name: str, *stages: dict[str, Any], **changes: Any) -> RunConfig:
    run: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"), "threads": 1,
        "data": {"train": str(place / "prompts.jsonl"), "max_prompt_tokens": 8},
        "decoding": {"max_new_tokens": 10}, "engine": {"student": "zero0"},
        "checkpoints": {"every_minutes": 0, "every_steps": 1}, "stages": stages,
    }  # fmt: skip
    return RunConfig(**{**run, **changes})


BRANCHES = (stage("base"), stage("one"), stage("two", start="base"), stage("raw", start="student"))


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    return distill(config(place, "unbroken", *BRANCHES))


def begun(settings: RunConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that each stage's engine begins with."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    real = Student.__init__

    def init(self: Student, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        found[kwargs["name"]] = self.state()

    with monkeypatch.context() as patch:
        patch.setattr(Student, "__init__", init)
        distill(settings)
    return found


def test_a_stage_starts_where_it_says(place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begun(config(place, "begun", *BRANCHES), monkeypatch)
    base = load_file(unbroken / "stages/base/student/model.safetensors")
    own = load_file(place / "student/model.safetensors")
    for name, wanted in {"one": base, "two": base, "base": own, "raw": own}.items():
        weights = {key.replace("backbone.", "model."): value for key, value in first[name].items()}
        assert all(torch.equal(weights[key], value) for key, value in wanted.items() if key in weights), name
    assert not all(torch.equal(base[key], own[key]) for key in own), "a control"


def test_runs_from_one_start_differ_in_the_order_of_prompts_and_in_draws_only(
    place: Path, unbroken: Path, tmp_path: Path
) -> None:
    """By their names alone: two stages with equal settings and an equal start do not end alike; one again does."""
    ends = {name: weights_sha256(unbroken / f"stages/{name}/student") for name in ("base", "one", "two")}
    assert len(set(ends.values())) == 3
    again = distill(config(place, "again", stage("base"), stage("two"), stage("one", start="base"), stage("last")))
    assert {name: weights_sha256(again / f"stages/{name}/student") for name in ends} == ends
    taken = {name: GlobalOrder(24, 10, f"{name}/rows").take(0, 24) for name in ("one", "two")}
    assert sorted(taken["one"]) == sorted(taken["two"]) and taken["one"] != taken["two"]


def test_rollouts_from_one_start_draw_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt at the same rollout, from equal weights, has other draws in a stage of another name."""
    from minillm import objectives

    place = made(tmp_path)
    tiny.save_model(place / "teacher", "llama", seed=1)
    drawn: dict[str, dict[str, list[int]]] = {}
    real = objectives.roll_out

    def roll_out(prompts: Any, **arguments: Any) -> Any:
        found = real(prompts, **arguments)
        rows = zip(prompts.uid_B, found.response_BT.tolist(), strict=True)
        drawn.setdefault(arguments["key"].stage, {}).update(rows)
        return found

    monkeypatch.setattr(objectives, "roll_out", roll_out)
    own: dict[str, Any] = {"kind": "minillm", "steps": 1, "prompts": 24, "optimiser": {"lr": 1e-2}}
    names = ("one", "two")
    stages = [{**own, "name": name, "start": "student"} for name in names]
    distill(config(place, "draws", *stages, teacher=str(place / "teacher")))
    assert drawn["one"].keys() == drawn["two"].keys() and len(drawn["one"]) == 24
    same = sum(drawn["one"][uid] == drawn["two"][uid] for uid in drawn["one"])
    assert same < 6, f"{same} of 24 responses are alike"


@pytest.mark.parametrize("after", [2, 3, 4, 5, 7])
def test_branches_go_on_to_the_same_bits(
    after: int, place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, f"after-{after}", *BRANCHES)
    folder = stopped(settings, monkeypatch, after=after)
    distill(settings)
    assert log(folder) == log(unbroken)
    for part in ("student", "stages/base/student", "stages/one/student", "stages/two/student"):
        assert weights_sha256(folder / part) == weights_sha256(unbroken / part), part


def test_a_start_that_is_not_followed_is_noticed(place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the test before: every stage from the one before it."""
    real = run_training.start_of

    def start_of(run: Any, each: Stage, **more: Any) -> Start:
        at = run.config.stages.index(each)
        return real(run, each if not at else each.model_copy(update={"start": None}), **more)

    monkeypatch.setattr(run_training, "start_of", start_of)
    monkeypatch.setattr(
        RunConfig, "source", lambda self, each: next((b for b, e in zip(self.stages, self.stages[1:], strict=False)
                                                      if e.name == each.name), None)
    )  # fmt: skip
    folder = distill(config(place, "control", *BRANCHES))
    assert weights_sha256(folder / "stages/two/student") != weights_sha256(unbroken / "stages/two/student")


def test_only_students_that_are_still_needed_must_stand_as_they_were(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, "needed", *BRANCHES)
    folder = stopped(settings, monkeypatch, after=5)  # inside stage two
    (folder / "stages/one/student/model.safetensors").unlink()  # nothing starts from it
    distill(settings)
    assert weights_sha256(folder / "student") == weights_sha256(unbroken / "student")

    folder = stopped(config(place, "missed", *BRANCHES[:3], stage("late", start="base")), monkeypatch, after=5)
    (folder / "stages/base/student/model.safetensors").unlink()
    trained: list[str] = []
    monkeypatch.setattr(run_training, "run_stage", lambda *args, **kwargs: trained.append("one"))
    with pytest.raises(CheckpointError, match="not the student that stage base handed on"):
        distill(config(place, "missed", *BRANCHES[:3], stage("late", start="base")))
    assert not trained, "found out before anything is trained"

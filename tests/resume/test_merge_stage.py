"""A run with stages that merge: what they make, what starts from it, what is logged, and that a run which is broken off
before or after them ends with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minillm import stage_merging
from minillm.api import distill
from minillm.config import RunConfig
from minillm.errors import CheckpointError, ModelError, RunExists
from minillm.merge_models import merge_folders
from minillm.publish import weights_sha256
from minillm.saving import Behind
from tests.resume.test_going_on import log, made, state, steps, stopped
from tests.resume.test_starts import begun, config, stage
from tests.tiny import logged

MERGED: tuple[dict[str, Any], ...] = (
    stage("base"), stage("one"), stage("two", start="base"),
    {"kind": "merge", "name": "both", "of": ["one", "two"], "start": "base"},
    stage("after"),
)  # fmt: skip
STUDENTS = ("stages/base/student", "stages/one/student", "stages/two/student", "stages/both/student", "student")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    return distill(config(place, "unbroken", *MERGED))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_a_start_that_training_left_nothing_of_is_known_and_merged(place: Path) -> None:
    """Its rate times its weight decay is 1: after an update matrices have nothing of what they were."""
    decay = {"optimiser": {"lr": 0.1, "schedule": "constant", "weight_decay": 10.0}}
    run = distill(
        config(place, "decayed", stage("base"), stage("one", **decay), stage("two", start="base", **decay), MERGED[3])
    )
    base, one, two = (run / f"stages/{name}/student" for name in ("base", "one", "two"))
    assert all(abs(each) < 0.1 for each in json.loads((run / "student/merge.json").read_text())["cosines_with_start"])
    with pytest.raises(ModelError, match="trained from another start"):  # the control: by hand nobody knows
        merge_folders(base, [one, two], into=place / "by-hand", method="slerp")


def students(folder: Path) -> list[str]:
    return [weights_sha256(folder / part) for part in STUDENTS]


def test_a_merge_is_what_its_formula_says(unbroken: Path) -> None:
    """SLERP of two task vectors at one half, layer by layer; then 0.3 of the way from the start."""
    base, one, two, both = (weights(unbroken / f"stages/{name}/student") for name in ("base", "one", "two", "both"))
    layer = [name for name in base if name.startswith("model.layers.0.")]
    first, second = (torch.cat([(at[name] - base[name]).flatten() for name in layer]) for at in (one, two))
    omega = torch.arccos(first @ second / first.norm() / second.norm())
    share = torch.sin(omega / 2) / torch.sin(omega)
    assert 0.1 < float(omega) < 3.0
    for name in layer:
        want = base[name] + 0.3 * share * (one[name] - base[name] + two[name] - base[name])
        torch.testing.assert_close(both[name], want, rtol=0, atol=1e-7)
    (line,) = logged(unbroken, "merge")
    assert line["stage"] == "both" and line["angles"]["model.layers.0"] == [pytest.approx(float(omega.rad2deg()))]
    assert "one" in (unbroken / "stages/both/student/README.md").read_text(encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(unbroken / "stages/both/student")


def test_the_next_stage_starts_from_the_merged_student(place: Path, unbroken: Path, monkeypatch: Any) -> None:
    first = begun(config(place, "begun", *MERGED), monkeypatch)["after"]
    both = load_file(unbroken / "stages/both/student/model.safetensors")
    named = {key.replace("backbone.", "model."): value for key, value in first.items()}
    assert all(torch.equal(named[key], value) for key, value in both.items() if key in named)


@pytest.mark.parametrize("after", [1, 4, 5, 6, 7])
def test_a_run_stopped_around_a_merge_ends_as_the_unbroken_one(
    after: int, place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, f"after-{after}", *MERGED)
    folder = stopped(settings, monkeypatch, after=after)
    distill(settings)
    assert log(folder) == log(unbroken)
    assert [weights_sha256(folder / part) for part in STUDENTS] == [
        weights_sha256(unbroken / part) for part in STUDENTS
    ]
    assert [*state(folder)["stages"]] == ["base", "one", "two", "both", "after"]


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_dies_in_a_merge_or_right_after_it_makes_it_again(
    late: bool, place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, f"died-{late}", *MERGED)
    real = stage_merging.merge_folders

    def dies(*arguments: Any, **options: Any) -> Any:
        if late:
            real(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage_merging, "merge_folders", dies)
        with pytest.raises(KeyboardInterrupt):
            distill(settings)
    folder = Path(settings.out) / settings.name
    assert steps(folder)[-1] == "step-00000006", "that of the last stage before it"
    assert (folder / "stages/both/student").exists() == late
    distill(settings)
    assert log(folder) == log(unbroken)
    assert [weights_sha256(folder / part) for part in STUDENTS] == [
        weights_sha256(unbroken / part) for part in STUDENTS
    ]


def test_a_merge_that_was_changed_behind_the_run_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(place, "changed", *MERGED)
    folder = stopped(settings, monkeypatch, after=7)
    (folder / "stages/one/student/model.safetensors").unlink()  # merged already
    (folder / "stages/both/student/model.safetensors").write_bytes(b"another")
    with pytest.raises(CheckpointError, match="not the student that stage both handed on"):
        distill(settings)


def test_a_lost_part_of_a_merge_that_is_to_come_is_found_before_anything_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, "lost", *MERGED)
    folder = stopped(settings, monkeypatch, after=5)
    (folder / "stages/one/student/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not the student that stage one handed on"):
        distill(settings)


def test_without_a_look_at_it_another_student_would_be_merged(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control of the two before."""
    settings = config(place, "unlooked", *MERGED)
    folder = stopped(settings, monkeypatch, after=5)
    (folder / "stages/one/student/model.safetensors").write_bytes(
        (folder / "stages/base/student/model.safetensors").read_bytes()
    )
    monkeypatch.setattr(Behind, "require_student", lambda *_: None)
    distill(settings)
    assert weights_sha256(folder / "stages/both/student") != weights_sha256(unbroken / "stages/both/student")


def test_a_merge_may_be_last_and_another_eta_is_another_merge(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge = {"kind": "merge", "name": "last", "of": ["one", "two"], "start": "student", "method": "lerp", "eta": 1.0}
    stages = (stage("one"), stage("two", start="student"))
    test = {"data": {"train": str(place / "prompts.jsonl"), "test": str(place / "prompts.jsonl"), "test_limit": 3,
                     "max_prompt_tokens": 8}, "evaluation": {"seeds": (1,), "bootstrap": 10}}  # fmt: skip
    folder = distill(config(place, "last", *stages, merge, **test))
    own, one, two = (
        weights(at) for at in (place / "student", folder / "stages/one/student", folder / "stages/two/student")
    )
    for name, value in weights(folder / "student").items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-7)
        assert not torch.equal(value, own[name])
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))

    settings = config(place, "eta", *stages, merge)
    stopped(settings, monkeypatch, after=3)
    with pytest.raises(RunExists, match=r"--accept-change stages\.2\.eta"):
        distill(config(place, "eta", *stages, {**merge, "eta": 0.5}))
    distill(config(place, "eta", *stages, {**merge, "eta": 0.5}), accept_changes=["stages.2.eta"])
    assert weights_sha256(place / "runs/eta/student") != weights_sha256(folder / "student")


def test_the_runs_own_student_may_be_built(place: Path) -> None:
    """It stands in no folder: so it is written as one, in the form in which stages hand theirs on."""
    run = RunConfig(
        name="built", out=str(place / "runs"), student="students/micro-world-24x2", threads=1, seed=3,
        data={"train": "world:train", "train_limit": 64, "max_prompt_tokens": 24}, decoding={"max_new_tokens": 40},
        engine={"student": "zero0"}, checkpoints=None,
        stages=(
            stage("one"), stage("two", start="student"),
            {"kind": "merge", "of": ["one", "two"], "start": "student", "eta": 1.0, "method": "lerp"},
        ),
    )  # fmt: skip
    folder = distill(run)
    own, one, two = (weights(folder / f"stages/{name}/student") for name in ("student", "one", "two"))
    for name, value in weights(folder / "student").items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, rtol=0, atol=1e-7)
        assert own[name].shape == value.shape

"""A run that goes on looks into the files that its configuration names: cards, engine settings, prompts."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm import results, resuming
from minillm.api import distill
from minillm.config import RunConfig
from minillm.engine_settings import QUANTISED
from minillm.errors import CheckpointError, RunExists, UnsupportedCombination
from tests import tiny
from tests.resume.test_going_on import Out, change_manifest, config, made, stopped

ENGINE = {"zero_optimization": {"stage": 0}, "steps_per_print": 1000}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("changed_files"))


def run(place: Path, folder: Path, *, engine: dict[str, Any] = ENGINE, dtype: str = "float32") -> RunConfig:
    """One whose teacher's card and engine file stand in a folder, and say this now."""
    (folder / "engine.json").write_text(json.dumps(engine), encoding="utf-8")
    (folder / "teacher.yaml").write_text(f"model: {place / 'student'}\ndtype: {dtype}\n", encoding="utf-8")
    files = {"engine": {"student": str(folder / "engine.json")}, "teacher": str(folder / "teacher.yaml")}
    return config(place, "files", out=str(folder / "runs"), **files)


def test_an_engine_file_of_another_content_is_told_by_what_it_does(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    stopped(run(place, tmp_path), monkeypatch, after=2)
    other = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    path = "engine.student.data_types.grad_accum_dtype"
    with pytest.raises(RunExists, match=rf"other settings: {path} was None, is 'fp32'; nothing was touched"):
        distill(run(place, tmp_path, engine=other))
    capfd.readouterr()
    stopped(run(place, tmp_path, engine=other), monkeypatch, after=1, accept_changes=[path])
    told = capfd.readouterr().out
    assert f"changed, as accepted: {path}" in told
    assert "changed: engine.student.zero_optimization.stage was 0, is 1; from here on the last bits" in told
    assert "trains nothing else: engine.student.steps_per_print was 1000, is None" in told


def test_a_card_that_says_another_dtype_wants_the_users_word(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    stopped(run(place, tmp_path), monkeypatch, after=2)
    changed = run(place, tmp_path, dtype="bfloat16")
    with pytest.raises(
        RunExists, match=r"teacher.dtype was 'float32', is 'bfloat16'.*\n.*--accept-change teacher.dtype"
    ):
        distill(changed)
    distill(changed, accept_changes=["teacher.dtype"])
    assert "teacher.dtype was 'float32', is 'bfloat16'; this is no longer" in capfd.readouterr().out


def test_a_sharded_teacher_s_engine_file_in_the_working_folder_is_compared(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    """It stands before the library's own of that name, and nothing in the run's configuration names it."""
    mine = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds_configs").mkdir()
    file = tmp_path / "ds_configs" / "teacher-zero3.json"
    file.write_text(json.dumps(mine), encoding="utf-8")

    def sharded() -> RunConfig:
        settings = run(place, tmp_path)
        with (tmp_path / "teacher.yaml").open("a", encoding="utf-8") as card:
            card.write("placement: zero3\n")
        return settings

    stopped(sharded(), monkeypatch, after=1)
    mine["zero_optimization"]["stage3_prefetch_bucket_size"] = 1000
    file.write_text(json.dumps(mine), encoding="utf-8")
    capfd.readouterr()
    stopped(sharded(), monkeypatch, after=1)
    told = "changed: engine.teacher.zero_optimization.stage3_prefetch_bucket_size was None, is 1000; from here on"
    assert told in capfd.readouterr().out
    for name in QUANTISED:
        rounded = {"zero_optimization": {**mine["zero_optimization"], name: True}}
        file.write_text(json.dumps(rounded), encoding="utf-8")
        with pytest.raises(UnsupportedCombination, match=rf"teacher-zero3.json: zero_optimization.{name}: the teacher"):
            distill(sharded())
    file.write_text(json.dumps({"zero_optimization": {**mine["zero_optimization"], name: False}}), encoding="utf-8")
    stopped(sharded(), monkeypatch, after=1)


def test_control_without_the_look_into_files_nothing_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    stopped(run(place, tmp_path), monkeypatch, after=2)
    monkeypatch.setattr(resuming, "changes_in_files", lambda before, now, named: [])
    distill(run(place, tmp_path, engine={"zero_optimization": {"stage": 0}}, dtype="bfloat16"))
    assert "changed" not in capfd.readouterr().out


def test_a_checkpoint_that_says_nothing_of_files_is_taken_and_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    folder = stopped(run(place, tmp_path), monkeypatch, after=2)
    for at in (folder / "checkpoints").iterdir():
        change_manifest(at, lambda record: record["fingerprints"].pop("files"))
    distill(run(place, tmp_path))
    assert "did not look into cards and engine files" in capfd.readouterr().out


@pytest.mark.parametrize("files", [{"rewards.scale": 1}, [["x"]], 7])
def test_a_checkpoint_that_says_what_no_file_says_is_refused(
    files: object, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(run(place, tmp_path), monkeypatch, after=1)
    for at in (folder / "checkpoints").iterdir():
        change_manifest(at, lambda record: record["fingerprints"].update(files=files))
    with pytest.raises(CheckpointError, match="not the checkpoint of a run that this version can go on with"):
        distill(run(place, tmp_path))


def limited(place: Path, prompts: Path, tokens: int) -> RunConfig:
    """Responses have 3 to 6 tokens; those that are longer than ``tokens`` are left out."""
    data = {"train": str(prompts), "max_prompt_tokens": 8, "over_long": "drop"}
    stages = [stage.model_copy(update={"validate_every": 0}) for stage in config(place, "x").stages]
    out = str(prompts.parent / "runs")
    return config(place, "limited", out=out, data=data, stages=stages, decoding={"max_new_tokens": tokens})


@pytest.mark.parametrize("limits", [(10, 5), (5, 10)])
def test_an_accepted_limit_of_responses_is_no_other_data(
    limits: tuple[int, int], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    before, now = limits
    prompts = tiny.save_prompts(tmp_path / "own.jsonl", rows=24)
    stopped(limited(place, prompts, before), monkeypatch, after=2)
    with pytest.raises(RunExists, match=r"--accept-change decoding.max_new_tokens"):
        distill(limited(place, prompts, now))
    distill(limited(place, prompts, now), accept_changes=["decoding.max_new_tokens"])
    told = capfd.readouterr().out
    assert f"decoding.max_new_tokens was {before}, is {now}; this is no longer" in told


def test_control_other_rows_under_an_accepted_limit_are_other_data(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tiny.save_prompts(tmp_path / "own.jsonl", rows=24)
    stopped(limited(place, prompts, 10), monkeypatch, after=2)
    tiny.save_prompts(prompts, rows=23)
    with pytest.raises(RunExists, match=r"was made from another train prompts; nothing was touched"):
        distill(limited(place, prompts, 5), accept_changes=["decoding.max_new_tokens"])


def test_other_threads_are_told_once(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out, request: pytest.FixtureRequest
) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    stopped(config(place, "busy"), monkeypatch, after=2)
    capfd.readouterr()
    distill(config(place, "busy", threads=2))
    assert [line for line in capfd.readouterr().out.splitlines() if "threads" in line] == [
        "note: changed: threads was 1, is 2; from here on the last bits may differ from those of the unbroken run"
    ]


def test_another_version_of_what_a_run_computes_with_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    """Of peft where there is an adapter; the control is a run without one, of which it says nothing."""
    for name, lora, packages in (("adapted", {"rank": 2}, {"peft"}), ("whole", None, set())):
        taught = config(place, name, lora=lora)
        folder = stopped(taught, monkeypatch, after=2)
        status = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert set(status["versions"]) - set(results.SHOWN_PACKAGES) == packages
        with monkeypatch.context() as patch:
            patch.setattr(results, "version", lambda package: "0.0" if package == "peft" else metadata.version(package))
            capfd.readouterr()
            distill(taught)
        assert ("note: peft 0.0, was " in capfd.readouterr().out) is (lora is not None)


def test_control_another_number_of_cores_is_told_too(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out) -> None:
    stopped(config(place, "cores"), monkeypatch, after=2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    capfd.readouterr()
    distill(config(place, "cores"))
    assert "note: threads 7, was 1: sums may differ" in capfd.readouterr().out

"""A run that was stopped, in one process: what it says, refuses and keeps, and what a full disk does to it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm import exits
from minillm.api import distill
from minillm.checkpoint_manifest import MANIFEST, Manifest, manifest_text, read_manifest
from minillm.checkpoints import Checkpoints
from minillm.config import RunConfig
from minillm.disk import RealDisk
from minillm.errors import CheckpointError, ConfigError, NonFinite, RunExists, RunInUse, SaveFailed, Stopped
from minillm.publish import weights_sha256
from minillm.run_listing import describe
from minillm.run_log import OF_THE_PROCESS
from minillm.stops import SIGNALS, Stops
from minillm.student_engine import Student
from minillm.updates import Sums
from tests import tiny
from tests.unit.test_runs import HOLDER

Out = pytest.CaptureFixture[str]
KEEP = {"every_minutes": 0, "every_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("going_on"))


def made(folder: Path) -> Path:
    """With what ``config`` names."""
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl", rows=24)
    return folder


def config(place: Path, name: str, **changes: Any) -> RunConfig:
    """Six steps of fine-tuning in two stages, validated after every second, saved after each."""
    prompts = str(place / "prompts.jsonl")
    stage = {
        "kind": "sft", "steps": 3, "batch": 4, "validate_every": 2,
        "optimiser": {"lr": 1e-2, "schedule": "constant"},
    }  # fmt: skip
    run: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"), "threads": 1,
        "data": {"train": prompts, "validation": prompts, "max_prompt_tokens": 8},
        "decoding": {"max_new_tokens": 10}, "engine": {"student": "zero0"}, "checkpoints": KEEP,
        "stages": ({**stage, "name": "one"}, {**stage, "name": "two"}),
    }  # fmt: skip
    return RunConfig(**{**run, **changes})


def stopped(settings: RunConfig, monkeypatch: pytest.MonkeyPatch, *, after: int, **options: Any) -> Path:
    """The folder of a run that a signal stopped after so many updates."""
    asked = [0]

    def agreed(self: Stops, ranks: Any) -> str:
        asked[0] += 1
        return "SIGTERM" if asked[0] == after else ""

    with monkeypatch.context() as patch:
        patch.setattr(Stops, "agreed", agreed)
        with pytest.raises(Stopped, match="the same command goes on"):
            distill(settings, **options)
    return Path(settings.out) / settings.name


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in OF_THE_PROCESS} for line in lines]


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    return distill(config(place, "unbroken"))


@pytest.mark.parametrize("after", range(1, 7))
def test_a_run_stopped_after_any_update_goes_on_by_the_same_command(
    after: int, place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    settings = config(place, f"after-{after}")
    folder = stopped(settings, monkeypatch, after=after)
    assert state(folder)["state"] == "stopped" and "SIGTERM: saved at step" in state(folder)["reason"]
    capfd.readouterr()
    distill(settings)
    assert f"goes on from step {(after - 1) % 3 + 1} of stage {'one' if after < 4 else 'two'}" in capfd.readouterr().out
    assert log(folder) == log(unbroken)
    assert weights_sha256(folder / "student") == weights_sha256(unbroken / "student")
    assert weights_sha256(folder / "stages/one/student") == weights_sha256(unbroken / "stages/one/student")
    assert state(folder)["state"] == "done" and state(folder)["reason"] is None
    assert not (folder / "checkpoints").exists(), "a run that is done needs none"


def test_a_run_killed_after_its_end_leaves_no_checkpoints(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(place, "ended")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "remove", lambda self: None)
        folder = distill(settings)
    assert steps(folder) == ["step-00000005", "step-00000006"]
    distill(settings)
    assert not (folder / "checkpoints").exists()


def test_where_there_is_nothing_to_go_on_from(place: Path, tmp_path: Path) -> None:
    settings = config(place, "nothing")
    with pytest.raises(CheckpointError, match=r"no checkpoint, wanted one to resume from"):
        distill(settings, resume=True)
    with pytest.raises(CheckpointError, match=r"wanted a checkpoint of this run"):
        distill(settings, resume=tmp_path / "step-00000001")
    with pytest.raises(ConfigError, match=r"nothing to go on from, so nothing has changed"):
        distill(settings, accept_changes=["stages.0.steps"])
    assert not (Path(settings.out) / "nothing/metrics.jsonl").exists()


def test_a_run_goes_back_to_an_older_checkpoint(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    settings = config(place, "back")
    folder = stopped(settings, monkeypatch, after=5)
    assert steps(folder) == ["step-00000004", "step-00000005"]
    stopped(settings, monkeypatch, after=1, resume=folder / "checkpoints/step-00000004")
    assert "step-00000005 is set aside as aside-step-00000005-" in capfd.readouterr().out
    distill(settings)
    assert log(folder) == log(unbroken)


def test_a_better_student_published_after_the_last_save_is_taken_back(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    """Killed between publishing and saving; with other ranks the run that goes on might not publish it again."""
    settings = config(place, "published")
    folder = stopped(settings, monkeypatch, after=2)
    student = folder / "stages/one/student"
    before = {path.name: path.read_bytes() for path in student.iterdir()}
    (student / "model.safetensors").write_bytes((place / "student/model.safetensors").read_bytes())
    (student / "README.md").unlink()
    seen, update = list[dict[str, bytes]](), Student.update

    def looking(self: Student, losses: Any) -> Any:
        seen.append({path.name: path.read_bytes() for path in student.iterdir()})
        return update(self, losses)

    monkeypatch.setattr(Student, "update", looking)
    capfd.readouterr()
    distill(settings)
    assert seen[0] == before and "stages/one/student is put back as it was at step 2" in capfd.readouterr().out


def test_a_student_of_a_stage_that_is_over_must_be_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(place, "handed-on")
    folder = stopped(settings, monkeypatch, after=5)
    file = folder / "stages/one/student/model.safetensors"
    file.write_bytes((place / "student/model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="not the student that stage one handed on"):
        distill(settings)
    assert state(folder)["state"] == "failed"


def test_changed_settings_are_told_refused_or_accepted(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    stages = config(place, "x").stages
    longer = (stages[0].model_copy(update={"steps": 4}), stages[1])
    folder = stopped(config(place, "changed"), monkeypatch, after=2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(
        RunExists, match=r"stages.0.steps was 3, is 4; nothing was touched.\n.*--accept-change stages.0"
    ):
        distill(config(place, "changed", stages=longer))
    with pytest.raises(RunExists, match=r"another run: seed was 10, is 11"):
        distill(config(place, "changed", seed=11), accept_changes=["seed"])
    assert {path: path.read_bytes() for path in before} == before
    capfd.readouterr()
    distill(config(place, "changed", stages=longer, checkpoints={**KEEP, "keep": 3}), accept_changes=["stages.0.steps"])
    told = capfd.readouterr().out
    assert "stages.0.steps was 3, is 4; this is no longer the unbroken run" in told and "checkpoints.keep was 2" in told
    assert [line["step"] for line in log(folder) if line["kind"] == "train"] == [1, 2, 3, 4, 1, 2, 3]


def test_changes_that_would_do_nothing_or_never_end_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = config(place, "x").stages
    stopped(config(place, "idle"), monkeypatch, after=5)
    longer = config(place, "idle", stages=(one.model_copy(update={"steps": 9}), two))
    with pytest.raises(RunExists, match=r"stages.0.steps was 3, is 9, but stage one is over: it would change nothing"):
        distill(longer, accept_changes=["stages.0.steps"])
    shorter = config(place, "idle", stages=(one, two.model_copy(update={"steps": 2, "validate_every": 1})))
    with pytest.raises(RunExists, match=r"is 2, but 2 steps of two are done"):
        distill(shorter, accept_changes=["stages.1.steps", "stages.1.validate_every"])
    other = config(place, "idle", stages=(one, two.model_copy(update={"name": "three"})))
    with pytest.raises(RunExists, match=r"another run: stages.1.name was 'two'"):
        distill(other, accept_changes=["stages.1.name"])
    more = config(place, "idle", stages=(one, two, two.model_copy(update={"name": "three"})))
    distill(more, accept_changes=["stages"])
    trained = [line["stage"] for line in log(place / "runs/idle") if line["kind"] == "train"]
    assert trained == ["one"] * 3 + ["two"] * 3 + ["three"] * 3


def test_a_run_that_no_longer_saves_goes_on_all_the_same(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(config(place, "unsaving"), monkeypatch, after=2)
    distill(config(place, "unsaving", checkpoints=None))
    assert log(folder) == log(unbroken)


def test_where_no_checkpoint_is_whole_nothing_is_thrown_away(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(place, "broken")
    folder = stopped(settings, monkeypatch, after=2)
    for file in (folder / "checkpoints").glob("*/run.json"):
        file.write_bytes(file.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints can be used.*\n.*--fresh"):
        distill(settings)
    assert {path: path.read_bytes() for path in before} == before
    distill(settings, fresh=True)


def test_runs_counts_what_checkpoints_take(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped(config(place, "counted"), monkeypatch, after=2)
    saved = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    assert describe(folder, root=folder).bytes > saved > 0


@pytest.mark.parametrize("name", ["../outside.md", "/tmp/outside.md", "..", "a/b"])
def test_a_checkpoint_writes_nothing_outside_its_student(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made the folder made its hashes too."""
    settings = config(place, "hostile")
    folder = stopped(settings, monkeypatch, after=2, fresh=True)
    shutil.rmtree(folder / "stages/one/student")  # so that it is put back
    for at in (folder / "checkpoints").iterdir():
        change_run(at, lambda record: record["others"].update({name: "bWluZQ=="}))
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(CheckpointError, match="names '"):
        distill(settings)
    assert sorted(folder.parent.rglob("*")) == before


def test_control_an_honest_file_is_put_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(place, "honest")
    folder = stopped(settings, monkeypatch, after=2)
    shutil.rmtree(folder / "stages/one/student")
    for at in (folder / "checkpoints").iterdir():
        change_run(at, lambda record: record["others"].update({"NOTES.md": "bWluZQ=="}))

    def never(self: Student, losses: Any) -> Any:
        raise NonFinite("before a better student takes the folder's place")

    monkeypatch.setattr(Student, "update", never)
    with pytest.raises(NonFinite):
        distill(settings)
    assert (folder / "stages/one/student/NOTES.md").read_text(encoding="utf-8") == "mine"


def change_run(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another run.json, with hashes that fit."""
    file = checkpoint / "run.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    change(record)
    file.write_text(json.dumps(record), encoding="utf-8")
    entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    change_manifest(checkpoint, lambda manifest: manifest["files"].update({"run.json": entry}))


def change_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Another manifest, with the hash that fits."""
    record = read_manifest(checkpoint).model_dump()
    change(record)
    (checkpoint / MANIFEST).write_text(manifest_text(Manifest(**record)), encoding="utf-8")


def test_what_is_no_way_to_resume_is_told(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"wanted 'auto', True or the pathlib.Path"):
        distill(config(place, "odd"), resume="runs/odd/checkpoints/step-00000001")  # type: ignore[arg-type]


def test_other_data_is_another_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tiny.save_prompts(tmp_path / "own.jsonl", rows=24)
    data = {"train": str(prompts), "max_prompt_tokens": 8}
    stages = [stage.model_copy(update={"validate_every": 0}) for stage in config(place, "x").stages]
    settings = config(place, "data", data=data, stages=stages)
    stopped(settings, monkeypatch, after=2)
    tiny.save_prompts(prompts, rows=23)
    with pytest.raises(RunExists, match=r"was made from another train prompts; nothing was touched"):
        distill(settings)


def test_two_processes_do_not_work_in_one_run(place: Path) -> None:
    settings = config(place, "twice")
    folder = Path(settings.out) / "twice"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=f"process {other.pid}"):
            distill(settings)
        other.kill()
    distill(settings)


def full(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """The disk is full in the saves whose numbers ``fails`` is true of."""
    save, write, number = Checkpoints.save, RealDisk.write, [0]

    def counted(self: Checkpoints, **options: Any) -> Any:
        number[0] += 1
        return save(self, **options)

    def refusing(self: RealDisk, file: int, content: memoryview) -> None:
        if fails(number[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, file, content)

    monkeypatch.setattr(Checkpoints, "save", counted)
    monkeypatch.setattr(RealDisk, "write", refusing)
    return number


def test_training_goes_on_through_some_failed_saves(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    full(monkeypatch, lambda number: number in {2, 3, 5})
    folder = distill(config(place, "full"))
    told = capfd.readouterr().out
    assert told.count("the run goes on") == 3 and "save 2 of 3 that may fail" in told and "No space left" in told
    assert log(folder) == log(unbroken)


def test_too_many_failed_saves_end_the_run_and_the_last_good_one_stands(
    place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(place, "fuller", checkpoints={**KEEP, "max_failed": 1})
    with monkeypatch.context() as patch:
        full(patch, lambda number: number > 2)
        with pytest.raises(SaveFailed, match="No space left"):
            distill(settings)
    folder = Path(settings.out) / "fuller"
    assert steps(folder) == ["step-00000001", "step-00000002"] and state(folder)["state"] == "failed"
    distill(settings)
    assert log(folder) == log(unbroken)


def test_a_stop_whose_save_fails_is_no_stop(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(place, "unsaved")
    monkeypatch.setattr(Stops, "agreed", lambda self, ranks: "SIGTERM")
    full(monkeypatch, lambda number: True)
    with pytest.raises(SaveFailed) as found:
        distill(settings)
    assert found.value.exit_code == exits.SAVE_FAILED


def test_a_disk_with_less_room_than_the_last_save_took_is_not_begun_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out
) -> None:
    usage, asked = shutil.disk_usage(place), [0]

    def little(path: Path) -> Any:
        asked[0] += 1  # the first is the doctor, at the start
        return usage if asked[0] != 3 else usage._replace(free=100)

    monkeypatch.setattr(shutil, "disk_usage", little)
    distill(config(place, "no-room"))
    told = capfd.readouterr().out
    assert "100 bytes are free, wanted the" in told and told.count("that may fail") == 1


def test_a_run_that_failed_goes_on_where_it_can(place: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, calls, over_ranks = config(place, "failed"), [0], Sums.over_ranks

    def failing(self: Sums, ranks: Any) -> dict[str, float]:
        calls[0] += 1
        if calls[0] == 4:
            raise NonFinite("loss is nan at update 3; no update was made from it")
        return over_ranks(self, ranks)

    with monkeypatch.context() as patch:
        patch.setattr(Sums, "over_ranks", failing)
        with pytest.raises(NonFinite):
            distill(settings)
    folder = Path(settings.out) / "failed"
    assert state(folder)["state"] == "failed" and state(folder)["reason"].startswith("NonFinite: loss is nan")
    distill(settings)
    assert log(folder) == log(unbroken)


def test_without_checkpoints_nothing_is_saved(place: Path, unbroken: Path) -> None:
    folder = distill(config(place, "none", checkpoints=None))
    assert not (folder / "checkpoints").exists() and log(folder) == log(unbroken)


def test_fresh_starts_over(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: Out) -> None:
    settings = config(place, "fresh")
    folder = stopped(settings, monkeypatch, after=3)
    capfd.readouterr()
    stopped(settings, monkeypatch, after=1, fresh=True)
    assert "goes on" not in capfd.readouterr().out and steps(folder) == ["step-00000001"]


def test_the_command_line_ends_with_its_code_and_takes_the_options(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillm import cli
    from minillm.config import dump_config

    recipe = tmp_path / "run.yaml"
    recipe.write_text(dump_config(config(place, "command")), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(Stops, "agreed", lambda self, ranks: "SIGTERM")
        patch.setattr(sys, "argv", ["minillm", "distill", "--config", str(recipe)])
        before = [signal.getsignal(number) for number in SIGNALS]
        assert cli._guarded(cli.app) == exits.STOPPED
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS), "it is saved, whatever comes"
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    changed = ["distill", "--config", str(recipe), "stages.0.optimiser.lr=0.5"]
    with pytest.raises(RunExists):
        CliRunner().invoke(cli.app, changed, catch_exceptions=False)
    with pytest.raises(ConfigError, match="--fresh starts over"):
        CliRunner().invoke(cli.app, [*changed, "--fresh", "--resume", "true"], catch_exceptions=False)
    result = CliRunner().invoke(
        cli.app, [*changed, "--resume", "true", "--accept-change", "stages.0.optimiser.lr"], catch_exceptions=False
    )
    assert result.exit_code == 0 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

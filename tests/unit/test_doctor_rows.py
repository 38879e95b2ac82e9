"""What the doctor finds in rows and in the machine: each fault, and the run in which the check is silent."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from minillm.adaptation import adaptation_of
from minillm.config import load_config
from minillm.doctor import machine, memory
from minillm.doctor.patient import Patient, read_models
from minillm.lora import Lora
from minillm.lora_config import LoraConfig
from minillm.run_lock import run_lock
from minillm.store import RunFolder
from tests.patients import healthy, levels, looked_at, of

SFT = "stages=[{kind: sft, steps: 1, batch: 4, optimiser: {lr: 1e-3}}]"
GIB = 2**30


class Usage(NamedTuple):
    """As shutil gives it."""

    total: int
    used: int
    free: int


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("well")
    healthy(folder)
    return folder


def rows(file: Path, *lines: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("policy", "most", "level"),
    [("error", 3, "error"), ("drop", 3, "warning"), ("keep_right", 3, "warning"), ("error", 5, "ok")],
)
def test_prompts_over_the_limit_are_told_by_policy(policy: str, most: int, level: str, well: Path) -> None:
    words = [f"data.over_long={policy}", f"data.max_prompt_tokens={most}"]
    found = of(looked_at(healthy(well), words), "lengths")
    assert [finding.level for finding in found] == [level]
    assert level == "ok" or ("12 of 24 prompts (50.0%)" in found[0].found and "has 5" in found[0].mend)


def test_a_source_that_is_missing_or_broken_leaves_the_others(well: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    words = [f"data.validation={broken}", f"data.test={tmp_path / 'absent.jsonl'}"]
    report = looked_at(healthy(well), words)
    found = of(report, "data")
    assert [finding.level for finding in found] == ["ok", "error", "error"]
    assert "broken.jsonl" in found[1].found and "absent.jsonl" in found[2].found
    assert levels(report, "lengths") == {"ok"} and "error" in levels(report, "held-out")


def test_responses_are_looked_at_where_a_stage_learns_from_them(well: Path, tmp_path: Path) -> None:
    file = healthy(well)
    assert levels(looked_at(file, [SFT]), "responses") == {"ok"} and not of(looked_at(file), "responses")
    bare = rows(tmp_path / "bare.jsonl", {"prompt": "a b"}, {"prompt": "c d"})
    assert levels(looked_at(file, [SFT, f"data.train={bare}"]), "responses") == {"error"}
    some = rows(tmp_path / "some.jsonl", {"prompt": "a b"}, {"prompt": "c d", "response": "a"})
    found = of(looked_at(file, [SFT, f"data.train={some}"]), "responses")
    assert [finding.level for finding in found] == ["note", "ok"] and "1 of 2 rows have no response" in found[0].found
    ended = rows(tmp_path / "ended.jsonl", {"prompt": "c d", "response": "a <|endoftext|> b"})
    found = of(looked_at(file, [SFT, f"data.train={ended}"]), "responses")
    assert [finding.level for finding in found] == ["warning"] and "end-of-text token" in found[0].found


@pytest.mark.parametrize(("policy", "level"), [("error", "error"), ("drop", "warning")])
def test_responses_over_the_limit_are_told_by_policy(policy: str, level: str, well: Path) -> None:
    words = [SFT, "decoding.max_new_tokens=4", f"data.over_long={policy}"]
    assert levels(looked_at(healthy(well), words), "responses") == {level}


def test_held_out_prompts_that_stand_in_train_are_counted(well: Path, tmp_path: Path) -> None:
    first = json.loads((well / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])["prompt"]
    other = rows(tmp_path / "other.jsonl", {"prompt": "z z z"}, {"prompt": first}, {"prompt": "y y"})
    found = of(looked_at(healthy(well), [f"data.test={other}"]), "held-out")
    assert [finding.level for finding in found] == ["warning"] and "1 of 3 prompts (33.3%)" in found[0].found
    apart = rows(tmp_path / "apart.jsonl", {"prompt": "z z z"}, {"prompt": "y y"})
    assert levels(looked_at(healthy(well), [f"data.test={apart}"]), "held-out") == {"ok"}


def test_pairs_are_held_against_the_stages_that_learn_from_them(well: Path, tmp_path: Path) -> None:
    file = rows(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    words = ["teacher=null", f"data.preferences={{a: {file}}}"]

    def found(**settings: str) -> list[tuple[str, str]]:
        own = "".join(f", {name}: {value}" for name, value in settings.items())
        stage = f"stages=[{{kind: preference, steps: 1, batch: 1, optimiser: {{lr: 1e-3}}{own}}}]"
        return [(one.level, one.found) for one in of(looked_at(healthy(well), [*words, stage]), "preferences")]

    assert found() == [("ok", "stage preference: its pairs are there, and what its target needs")]
    ((level, said),) = found(sources="[b]")
    assert level == "error" and "no pair is of source 'b'" in said
    ((level, said),) = found(target="soft")
    assert level == "error" and "1 of 1 pairs of data.preferences come without" in said
    assert not of(looked_at(healthy(well)), "preferences"), "nobody learns from pairs"


@pytest.mark.parametrize(("prompts", "level"), [(1, "error"), (3, "note"), (4, "ok")])
def test_rows_of_a_step_are_held_against_the_ranks(
    prompts: int, level: str, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.doctor.smoke.collectives", lambda ranks: ())
    assert levels(looked_at(healthy(well), [f"stages.0.prompts={prompts}"], ranks=2), "rows-per-step") == {level}


@pytest.mark.parametrize(
    ("ranks", "each", "cores", "level"), [(2, 4, 4, "warning"), (2, 2, 4, "ok"), (1, 1, 8, "note"), (4, 1, 2, "ok")]
)
def test_threads_are_held_against_cores(
    ranks: int, each: int, cores: int, *, level: str, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillm.doctor.smoke.collectives", lambda ranks: ())
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert levels(looked_at(healthy(well), [f"threads={each}"], ranks=ranks), "threads") == {level}


def test_ranks_of_other_nodes_take_nothing_of_this_one(well: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of four ranks: four threads on four cores, shared memory for four, a node of four to plan with."""
    patient = Patient(config=load_config(healthy(well), ["threads=1"]), ranks=8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 4 * machine.SHARED_BYTES_A_RANK))

    def told() -> list[str]:
        return [each.found for check in (machine.threads, machine.shared_memory) for each in check(patient)]

    monkeypatch.setenv("WORLD_SIZE", "8")
    for ranks in (4, 8):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        threads, shared = told()
        assert patient.ranks_here == ranks
        assert threads.startswith(f"{ranks} ranks of 1 thread") and f"for {ranks} ranks" in shared
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert patient.ranks_here == 8, "of another launch"


def test_memory_is_that_of_one_node(well: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, _ = read_models(load_config(healthy(well)))
    patient = dataclasses.replace(read, ranks=8)
    assert "on 8 ranks" in next(memory.memory(patient)).found
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "on 4 ranks" in next(memory.memory(patient)).found


@pytest.mark.parametrize(("limit", "level"), [(256, "warning"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")])
def test_a_low_limit_of_open_files_is_a_warning(limit: int, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert [finding.level for finding in machine.open_files()] == [level]


@pytest.mark.parametrize(("free", "level"), [(64 * 2**20, "warning"), (GIB, "ok")])
def test_shared_memory_is_held_against_the_ranks(free: int, level: str) -> None:
    assert machine.shared_memory_for(8, free=free).level == level


@pytest.mark.parametrize(("free", "level"), [(10, "error"), (100_000, "warning"), (GIB, "ok")])
def test_free_disk_is_held_against_what_a_run_writes(
    free: int, level: str, well: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(GIB, 0, free))
    assert levels(looked_at(healthy(well)), "disk") == {level}
    if level == "warning":
        assert levels(looked_at(healthy(well), ["checkpoints=null"]), "disk") == {"ok"}


def test_of_a_frozen_base_no_moments_are_kept(well: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate against the files of a checkpoint: with lora a weight is there once, as the best student."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(well / "student")
    weights = machine.parameters_of(config)
    adapter = adaptation_of(LoraConfig(rank=2)).parameters(config)
    real = opened_adapter(well / "student", rank=2)
    assert adapter == real and 0 < 2 * adapter < weights
    assert machine.room(weights, trained=weights, stages=1, kept=2) == (8 * weights, 3 * 16 * weights)
    seen: list[dict[str, int]] = []
    room = machine.room
    monkeypatch.setattr(machine, "room", lambda held, **more: seen.append({"held": held, **more}) or room(held, **more))
    looked_at(healthy(well), ["lora={rank: 2}"])
    looked_at(healthy(well))
    assert [(one["held"], one["trained"]) for one in seen] == [(weights + adapter, adapter), (weights, weights)]


def opened_adapter(folder: Path, *, rank: int) -> int:
    """Weights of the adapter that a run would train."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    Lora(settings=LoraConfig(rank=rank), seed=0, base="").put_on(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_weights_are_counted_without_being_made(well: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(well / "student").num_parameters()
    assert machine.parameters_of(AutoConfig.from_pretrained(well / "student")) == real


def test_packages_are_held_against_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    assert {finding.level for finding in machine.packages()} == {"ok"}

    def other(name: str) -> str:
        if name == "datasets":
            raise metadata.PackageNotFoundError
        return {"deepspeed": "0.20.1", "accelerate": "9.9.9"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", other)
    found = list(machine.packages())
    assert [(finding.level, finding.found.split()[0]) for finding in found] == [
        ("error", "datasets"),
        ("warning", "deepspeed"),
        ("note", "other"),
    ]
    assert "datasets is not installed; wanted datasets>=4" in found[0].found and "accelerate 9.9.9" in found[2].found


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, well: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    file = healthy(well)
    assert levels(looked_at(file, [f"out={tmp_path / 'file' / 'runs'}"]), "out-folder") == {"error"}
    assert levels(looked_at(file, [f"out={tmp_path / 'runs'}"]), "out-folder") == {"ok"}
    assert not (tmp_path / "runs").exists()


def test_what_stands_in_the_folder_is_told(tmp_path: Path, well: Path) -> None:
    file = healthy(well)
    words = [f"out={tmp_path}"]
    config = load_config(file, words)
    assert levels(looked_at(file, words), "existing-run") == {"ok"}
    folder = RunFolder(tmp_path / config.name, writes=True)
    from minillm.config import dump_config

    folder.begin(dump_config(config))
    folder.set_status(state="failed")
    found = of(looked_at(file, words), "existing-run")
    assert [finding.level for finding in found] == ["note"] and "not finished" in found[0].found
    folder.set_status(state="done")
    assert "done" in of(looked_at(file, words), "existing-run")[0].found
    (folder.path / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    assert levels(looked_at(file, [*words, "seed=99"]), "existing-run") == {"error"}
    with run_lock(folder.path):
        found = of(looked_at(file, words), "existing-run")
    assert [finding.level for finding in found] == ["error"] and "works there now" in found[0].found

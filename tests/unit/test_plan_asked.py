"""Promises of what `minillm plan` is asked:

1. numbers that are none, and questions that no run could be, are refused by their names, before a plan is made;
2. a run's file is planned as the same options are, its hungriest stage;
3. advice is in the words of a run's file, with the peak that results and a command that can be pasted;
4. tables break inside no word at 80 columns, and small sizes are numbers too.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from minillm import cli
from tests.patients import healthy

PAIR = ("plan", "--teacher", "gpt2-xl", "--student", "gpt2")
ASKED = (*PAIR, "--gpus", "2", "--gpu-memory", "80")


def run(*words: str) -> int:
    return cli._guarded(lambda **options: cli.app(list(words), **options))


def planned(file: Path, *words: str) -> dict[str, Any]:
    assert run(*words, "--json", str(file)) in {0, 1}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("option", ["--gpu-memory", "--host-memory", "--flops", "--bandwidth"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_a_number_that_is_none_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, option, value) == 2
    told = capsys.readouterr().err
    assert option in told and ("wanted a number" in told if value == "inf" else "Invalid value" in told)


def test_a_memory_beyond_all_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, "--gpu-memory", "1e308") == 2
    assert "wanted GiB" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*ASKED, "--json", str(tmp_path / "no" / "x.json")) == 2
    told = capsys.readouterr()
    assert "there is no folder" in told.err and not told.out
    other = tmp_path / "other.json"
    other.write_text("{}", encoding="utf-8")
    assert run(*ASKED, "--json", str(other)) == 2
    assert other.read_text(encoding="utf-8") == "{}"
    planned(tmp_path / "own.json", *ASKED)
    assert planned(tmp_path / "own.json", *ASKED, "--batch", "8")["settings"]["rows"] == 8  # its own is replaced


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lengths", "1024,1"), "PositionsExceeded: teacher gpt2-xl has 1024 positions"),
        (("--lora", "769"), "smallest matrix of gpt2 has a side of 768"),
        (("--gpus", "3", "--gpus-per-node", "2"), "3 GPUs, 2 on each node: wanted whole nodes"),
        (("seed=3",), "name it with --config FILE"),
    ],
)
def test_what_no_run_could_be_is_refused(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, *words) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--lengths", "1023,1"), ("--lora", "768"), ("--gpus", "4", "--gpus-per-node", "2")])
def test_what_just_could_be_is_planned(words: tuple[str, ...]) -> None:
    assert run(*ASKED, *words) in {0, 1}


def test_a_model_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--teacher", "gpt2-xl", "--gpus", "2", "--gpu-memory", "80") == 2
    told = capsys.readouterr().err
    assert "--student is missing" in told and "--config FILE" in told


def test_vocabularies_that_differ_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--teacher", "qwen2.5-7b", "--student", "qwen2.5-0.5b", "--gpus", "8", "--gpu-memory", "80") == 0
    assert "note: vocabularies of 152,064 (teacher) and 151,936 rows (student): fine where" in capsys.readouterr().out
    assert run("plan", "--teacher", "llama-13b", "--student", "gpt2", "--gpus", "8", "--gpu-memory", "80") in {0, 1}
    assert "a run refuses models of different tokens" in capsys.readouterr().out
    assert run(*ASKED) == 0
    assert "note:" not in capsys.readouterr().out


def settings(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found["settings"].items() if name not in {"at", "samples_per_prompt"}}


def test_a_runs_anchor_is_planned(tmp_path: Path) -> None:
    file = healthy(tmp_path)
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    where = ("plan", "--config", str(file), "--gpus", "2", "--gpu-memory", "1")
    assert "moving average" not in planned(tmp_path / "a.json", *where)["standing"]
    values["stages"][0].update(anchor={"weight": 0.1})
    file.write_text(json.dumps(values), encoding="utf-8")
    found = planned(tmp_path / "b.json", *where)
    assert found["standing"]["moving average"] == 4 * found["settings"]["student"]["parameters"]


@pytest.mark.parametrize(("section", "setting"), [("lora", "rank"), ("bottleneck", "size")])
def test_a_runs_file_is_planned_as_the_same_options(tmp_path: Path, section: str, setting: str) -> None:
    file = healthy(tmp_path)
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values["engine"].update(student="zero3", precision="bf16", activation_checkpointing=True, gather="forward")
    values[section] = {setting: 2}
    values["data"]["max_prompt_tokens"], values["decoding"]["max_new_tokens"] = 7, 5
    values["stages"][0].update(prompts=8, samples_per_prompt=2, micro_batch=2, inner_epochs=3, teacher_mix=0.5)
    values["stages"][0].update(baseline="none", inner_batches=1)
    file.write_text(json.dumps(values), encoding="utf-8")
    where = ("--gpus", "2", "--gpu-memory", "1")
    by_file = planned(tmp_path / "a.json", "plan", "--config", str(file), *where)
    models = ("--teacher", str(tmp_path / "teacher"), "--student", str(tmp_path / "student"))
    same = (
        *("--stage", "zero3", "--precision", "bf16", "--activation-checkpointing", "--gather", "forward"),
        *(
            f"--{section}",
            "2",
            "--lengths",
            "7,5",
            "--batch",
            "16",
            "--micro-batch",
            "2",
            "--updates",
            "3",
            "--alpha",
            "0.5",
        ),
    )
    by_options = planned(tmp_path / "b.json", "plan", *models, *where, *same)
    assert settings(by_file) == settings(by_options)
    assert by_file["phases"] == by_options["phases"] and by_file["seconds"] == by_options["seconds"]
    other = planned(tmp_path / "c.json", "plan", "--config", str(file), *where, "stages.0.prompts=16")
    assert other["settings"]["rows"] == 32 and other["phases"] != by_file["phases"]
    offloaded = planned(tmp_path / "d.json", "plan", "--config", str(file), *where, "--placement", "offload")
    assert offloaded["settings"]["placement"] == "offload"


@pytest.mark.parametrize(
    ("rows", "places", "at_once"), [(0, 0, 0), (2, 0, 2), (0, 36, 3), (2, 36, 2), (4, 36, 3), (0, 5, 1)]
)
def test_places_of_a_micro_batch_are_planned_as_rows_of_full_length(
    rows: int, places: int, at_once: int, tmp_path: Path
) -> None:
    """36 places are three rows of 7 + 5 tokens; and a row that is longer than the limit goes alone."""
    file = healthy(tmp_path)
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    values["data"]["max_prompt_tokens"], values["decoding"]["max_new_tokens"] = 7, 5
    values["stages"][0].update(prompts=8, micro_batch=rows, micro_tokens=places)
    file.write_text(json.dumps(values), encoding="utf-8")
    found = planned(tmp_path / "a.json", "plan", "--config", str(file), "--gpus", "1", "--gpu-memory", "1")
    assert found["settings"]["micro_batch"] == at_once


def test_the_hungriest_stage_of_a_run_is_planned(tmp_path: Path) -> None:
    file = healthy(tmp_path)
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    first = values["stages"][0]
    values["stages"] = [{**first, "name": f"s{n}", "prompts": n * first["prompts"]} for n in (1, 16, 2)]
    file.write_text(json.dumps(values), encoding="utf-8")
    found = planned(tmp_path / "a.json", "plan", "--config", str(file), "--gpus", "1", "--gpu-memory", "1")
    assert found["settings"]["at"] == 1


@pytest.mark.parametrize(
    "word", [("--teacher", "gpt2"), ("--stage", "zero2"), ("--bottleneck", "2"), ("--lora", "0"), ("--alpha", "0.2")]
)
def test_options_of_a_stage_are_refused_beside_a_file(
    word: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "--config", str(healthy(tmp_path)), "--gpus", "2", "--gpu-memory", "1", *word) == 2
    assert f"{word[0]} with --config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("engine.student=mine.json", "your own file"),
        ("stages=[{kind: sft, steps: 1, batch: 2, optimiser: {lr: 1}}]", "minillm stage"),
    ],
)
def test_a_run_that_cannot_be_planned_is_told(
    change: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("plan", "--config", str(healthy(tmp_path)), "--gpus", "2", "--gpu-memory", "1", change) == 2
    assert told in capsys.readouterr().err


def test_advice_is_a_command_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("plan", "--teacher", "llama-13b", "--student", "llama-7b", "--gpus", "8", "--gpu-memory", "24")
    found = planned(tmp_path / "a.json", *words, "--batch", "4096", "--micro-batch", "0", "--flops", "1.25e14")
    told = capsys.readouterr().out
    assert not found["fits"] and "placement: offload in the teacher's card" in found["change"]
    assert "prompts: 64" in found["change"] and "prompts: 128" not in found["change"]
    peak = f"{found['changed_peak'] / 2**30:.2f} GiB"
    assert f"cheapest change that makes it fit: {' and '.join(found['change'])}; then {peak}\n" in told
    assert f"\n  {found['command']}\n" in told
    command = shlex.split(found["command"])
    assert command[:2] == ["minillm", "plan"] and "--json" not in command and "--measure" not in command
    again = planned(tmp_path / "b.json", *command[1:])
    assert again["fits"] and max(again["peaks"].values()) == found["changed_peak"]
    assert again["rates"]["flops"] == 1.25e14


def test_advice_for_a_file_is_settings_of_it(tmp_path: Path) -> None:
    file = healthy(tmp_path)
    models = ("teacher=llama-13b", "student=llama-7b", "engine.precision=bf16", "engine.student=zero1")
    lengths = ("data.max_prompt_tokens=256", "decoding.max_new_tokens=256", "stages.0.prompts=256", "threads=1")
    words = ("plan", "--config", str(file), "--gpus", "8", "--gpu-memory", "30")
    found = planned(tmp_path / "a.json", *words, *models, *lengths)
    assert not found["fits"]
    assert "engine.student=zero2-offload" in found["command"] and "--placement" in found["command"]
    assert "--stage" not in found["command"]
    again = planned(tmp_path / "b.json", *shlex.split(found["command"])[1:])
    assert again["fits"] and max(again["peaks"].values()) == found["changed_peak"]


def test_tables_break_inside_no_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = ("plan", "--teacher", "llama-13b", "--student", "llama-7b", "--gpus", "8", "--gpu-memory", "24")
    run(*words, "--batch", "4096", "--micro-batch", "0", "--stage", "zero3")
    told = capsys.readouterr().out
    assert re.search(r"together( +[\d,.]+){5} *$", told, re.M)
    assert re.search(r"all-gather of the student in updates +[\d,.]+ GiB +[\d,]+ +[\d.,]+ (s|ms) *$", told, re.M)
    assert run("cards") == 0
    told = capsys.readouterr().out
    assert re.search(r"^ +parameters +layers +hidden +template +placement *$", told, re.M)  # terms are left out
    monkeypatch.setenv("COLUMNS", "120")
    assert run("cards") == 0
    assert re.search(r"placement +terms *$", capsys.readouterr().out, re.M)


def test_small_plans_say_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "--config", str(healthy(tmp_path)), "--gpus", "1", "--gpu-memory", "1") == 0
    told = capsys.readouterr().out
    assert "on 1 GPU, " in told and "1 GPUs" not in told and "MiB of each GPU" in told
    assert re.search(r"fits: [1-9]?\d?\.?\d+ MiB in the phase", told) and "fits: 0.00" not in told
    assert re.search(r"a step takes about \d+ (µs|ms) ", told)

"""``--dry-run`` ends with code 2 where the run would, before a row is read and without a file being fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.patients import healthy, run
from tests.tiny import WORDS, save_model


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("well")
    healthy(folder)
    return folder


def test_a_run_that_would_start_is_printed_and_nothing_is_written(
    well: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", "--dry-run", "--config", str(healthy(well))) == 0
    assert "not looked at" not in capsys.readouterr().out and not (well / "runs").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["engine.student=zero0", "engine.precision=bf16"], "engine.precision bf16"),
        (["teacher=/nowhere/x/y"], "/nowhere/x/y"),
        (["data.train=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["data.test={a: nowhere.jsonl}"], "nowhere.jsonl does not exist"),
        (
            ["data.corpus=nowhere.jsonl", "stages.0.lm_batch=4", "stages.0.lm_coefficient=1"],
            "nowhere.jsonl does not exist",
        ),
        (["decoding.max_new_tokens=100"], "has 48 positions"),
        (["engine.student=none"], "none"),
    ],
)
def test_what_a_run_is_refused_for_is_told(
    words: list[str], told: str, well: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("distill", "--dry-run", "--config", str(healthy(well)), *words) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("# trains into") and told in printed.err and "Traceback" not in printed.err


STAGE = "{{kind: preference, steps: 2, batch: 2, validate_every: {every}, sources: {sources}, optimiser: {{lr: 1e-3}}}}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"preferences": "{a: nowhere.jsonl}"}, "nowhere.jsonl does not exist"),
        ({"preferences": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"preferences_validation": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"preferences_validation": "nowhere.jsonl", "every": "0"}, ""),
        ({"sources": "[b]"}, "stage preference: no pair is of source 'b'"),
        ({"sources": "[a]"}, ""),
    ],
)
def test_files_of_pairs_are_looked_for_where_a_stage_reads_them(
    changes: dict[str, str], told: str, well: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = well / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    asked = {"preferences": f"{{a: {file}}}", "preferences_validation": str(file), "every": "1", "sources": "null"}
    asked |= changes
    stage = STAGE.format(every=asked.pop("every"), sources=asked.pop("sources"))
    words = [*(f"data.{name}={value}" for name, value in asked.items()), f"stages=[{stage}]"]
    assert run("distill", "--dry-run", "--config", str(healthy(well)), *words) == (2 if told else 0)
    assert told in capsys.readouterr().err


def test_models_that_do_not_fit_are_told(well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_model(tmp_path / "other", "llama", seed=0, words=[*WORDS[:2], "b", "a", *WORDS[4:]])
    file = str(healthy(well))
    assert run("distill", "--dry-run", "--config", file, f"teacher={other}") == 2
    assert "VocabularyMismatch" in capsys.readouterr().err
    out = str(tmp_path / "out")
    words = [
        "--dry-run",
        "--config",
        file,
        "--out",
        out,
        f"data.test={well / 'train.jsonl'}",
        "data.train=nowhere.jsonl",
    ]
    assert run("evaluate", str(well / "student"), *words) == 0, "of a measured model only test rows are read"
    assert run("evaluate", "/nowhere/x/y", *words) == 2 and "/nowhere/x/y" in capsys.readouterr().err


def test_a_hub_model_that_is_not_here_is_not_fetched(well: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("distill", "--dry-run", "--config", str(healthy(well)), "teacher=nobody/nothing") == 0
    assert "# not looked at, since not on this machine: teacher nobody/nothing" in capsys.readouterr().out
    words = ["teacher=nobody/nothing", "student=/nowhere/x/y"]
    assert run("distill", "--dry-run", "--config", str(healthy(well)), *words) == 2, "control: the other is looked at"


def test_a_study_is_looked_at_arm_by_arm(well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        f"name: s\nrecipe: {healthy(well)}\nresults: {tmp_path}/cells\nseeds: [1]\ncompare_with: a\n"
        f"settings: {{data.test: {well / 'train.jsonl'}}}\n"
        "arms: {a: {}, b: {student: /nowhere/x/y}}\n",
        encoding="utf-8",
    )
    assert run("study", "--dry-run", "--config", str(file)) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("# makes 2 arms x 1 seeds") and "/nowhere/x/y" in printed.err
    assert run("study", "--dry-run", "--config", str(file), "arms={a: {}}") == 0, "control"


def test_pairs_that_a_study_makes_need_not_be_there(
    well: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    stage = STAGE.format(every=0, sources="null")
    file.write_text(
        f"name: s\nrecipe: {healthy(well)}\nresults: {tmp_path}/cells\nseeds: [1]\ncompare_with: a\n"
        f"paired: {{rows: 2}}\nsettings: {{data.test: {well / 'train.jsonl'}}}\n"
        f"arms: {{a: {{data.preferences: runs/studies/s/pairs.jsonl, stages: [{stage}]}}}}\n",
        encoding="utf-8",
    )
    assert run("study", "--dry-run", "--config", str(file)) == 0, capsys.readouterr().err
    words = [f"arms={{a: {{data.preferences: runs/other.jsonl, stages: [{stage}]}}}}"]
    assert run("study", "--dry-run", "--config", str(file), *words) == 2
    assert "runs/other.jsonl does not exist" in capsys.readouterr().err

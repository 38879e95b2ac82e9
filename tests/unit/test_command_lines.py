"""What is given on a command line is taken at its word: an empty list is no list of all, a file that is there is not
replaced unasked, and a help text names every default."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minillm import cli

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "docs" / "results" / "long-horizon.yaml"
RECIPE = ROOT / "recipes" / "quickstart" / "minillm.yaml"


def run(*words: str) -> int:
    return cli._guarded(lambda **options: cli.app(list(words), **options))


@pytest.mark.parametrize("option", ["--arms", "--seeds", "--compare-with", "--reproduce"])
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_value_of_a_study_is_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    show = () if option == "--reproduce" else ("--show",)
    assert run("study", "--config", str(STUDY), *show, option, value) == 2
    assert f"{option}" in capsys.readouterr().err


def test_an_empty_list_of_estimators_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diagnose", "--config", str(RECIPE), "--estimators", "") == 2
    assert "nothing is called ''" in capsys.readouterr().err


@pytest.mark.parametrize("held", ['{"stage": {}}', "my notes", ""])
def test_a_diagnosis_replaces_no_file_unasked(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "d.json"
    file.write_text(held, encoding="utf-8")
    measured: list[bool] = []

    def measure(*_: object, **__: object) -> None:
        measured.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr("minillm.diagnose.command.diagnose", measure)
    words = ("diagnose", "--config", str(RECIPE), "--json", str(file))
    assert run(*words) == 2
    told = capsys.readouterr().err
    assert "is there already" in told and "--fresh" in told and not measured
    assert file.read_text(encoding="utf-8") == held
    assert run(*words, "--fresh") == 130 and measured


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("loss", {"--hidden": "256, 512"}),
        ("coins", {"--batch": "16, 64, 256", "--groups": "1, 4"}),
        ("scale", {"--lengths": "64, 128, 256, 512", "--vocabularies": "8192, 65536"}),
    ],
)
def test_the_help_of_a_benchmark_names_the_default_of_what_may_be_repeated(
    command: str, defaults: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bench", command, "--help") == 0
    told = " ".join(capsys.readouterr().out.split())
    for option, default in defaults.items():
        found = re.search(rf"{option} <.*?\[default: \(?([\d, ]+)\)?", told)
        assert found and found[1] == default, told

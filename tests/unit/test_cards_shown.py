"""Promises of `minillm cards`:

1. a name is looked up among students and teachers; an unknown one is told the nearest, or where they are listed;
2. sizes of a card without figures are those of its folder's config.json, in the table too; nothing empty is shown.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm import cli
from tests.tiny import save_model


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "teachers").mkdir()
    return tmp_path


def run(*words: str) -> int:
    return cli._guarded(lambda **options: cli.app(["cards", *words], **options))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("mine", "'mine': no card of that name in students/ or teachers/\n  minillm cards lists them\n"),
        ("teachers/mine", "'teachers/mine': no card of that name in teachers/\n  minillm cards lists them\n"),
        ("lama-13b", "in students/ or teachers/; did you mean 'llama-13b'?\n  minillm cards lists them\n"),
    ],
)
def test_an_unknown_name_is_told_in_few_words(name: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name) == 2
    assert capsys.readouterr().err.endswith(told)


def test_a_name_of_either_kind_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama-13b") == 0  # a teacher
    assert "placement: zero3" in capsys.readouterr().out
    assert run("gemma-3-1b") == 0  # of both: the student's
    student = capsys.readouterr().out
    assert run("teachers/gemma-3-1b") == 0
    assert capsys.readouterr().out != student


def test_sizes_come_from_the_folder_where_the_card_has_none(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(working_folder / "made", "llama", seed=0)
    for name, text in {"mine": "model: ./made\n", "gone": "model: ./nowhere\n"}.items():
        (working_folder / f"teachers/{name}.yaml").write_text(text, encoding="utf-8")
    assert run("teachers/mine") == 0
    told = capsys.readouterr().out
    assert "figures:  # of ./made/config.json\n  layers: 2\n" in told and "  parameters: " in told
    assert "notes:" not in told and "licence:" not in told
    assert run("teachers/gone") == 0
    assert "figures:" not in capsys.readouterr().out
    assert run() == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["mine"][2:4] == ["M", "2"] and lines["gone"] == ["gone", "replicated"]

"""What follows ``minillm launch``: its own options first, then a command, whose words are its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm.cli import app, launching
from minillm.errors import ConfigError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """What the ranks would have run."""
    found = list[Sequence[str]]()

    class Ranks:
        def __init__(self, words: Sequence[str], place: Any, **options: Any) -> None:
            found.append(words)

        def run(self) -> int:
            return 0

    monkeypatch.setattr(launching, "Supervisor", Ranks)
    return found


def launch(*words: str) -> None:
    result = CliRunner().invoke(app, ["launch", *words])
    if isinstance(result.exception, ConfigError):
        raise result.exception
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("words", "mended"),
    [
        (["sft", "--ranks", "2", "--config", "a b.yaml"], "minillm launch --ranks 2 sft --config 'a b.yaml'"),
        (["distill", "--config", "a.yaml", "--master-port=29500"],
         "minillm launch --master-port=29500 distill --config a.yaml"),
        (["evaluate", "m", "--limit", "5"], "minillm launch --limit 5 evaluate m"),
    ],
)  # fmt: skip
def test_an_option_of_launch_behind_the_command_is_told(
    words: list[str], mended: str, started: list[Sequence[str]]
) -> None:
    with pytest.raises(ConfigError, match=r"behind the command .*which has no such option") as caught:
        launch(*words)
    assert str(caught.value).endswith(mended) and not started


def test_launch_does_not_launch_itself(started: list[Sequence[str]]) -> None:
    with pytest.raises(ConfigError, match="name launch once"):
        launch("--ranks", "2", "launch", "--ranks", "2", "sft")
    assert not started


@pytest.mark.parametrize(
    "words",
    [
        ["judge", "runs/a", "--limit", "5"],  # of judge
        ["train.py", "--ranks", "2"], ["env", "--limit", "3"], ["./launch", "--nodes", "2"],
        ["sft", "--config", "a.yaml", "name=--ranks"],
    ],
)  # fmt: skip
def test_control_words_of_the_command_are_left_to_it(words: list[str], started: list[Sequence[str]]) -> None:
    launch("--ranks", "2", *words)
    assert list(started[0])[-len(words) :] == words and (started[0][0] == sys.executable) == (
        words[0] in {"judge", "sft", "train.py"}
    )


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("distil", r"distil: no command of minillm, no \.py file and no program of this name; did you mean 'distill'"),
        ("--rank", r"--rank: no option of launch of this name; did you mean '--ranks'"),
        ("nosuch-anything", r"nosuch-anything: no command of minillm"),
    ],
)
def test_a_slip_in_the_command_is_told_before_ranks_start(word: str, words: str, started: list[Sequence[str]]) -> None:
    with pytest.raises(ConfigError, match=words):
        launch("--ranks", "2", word, "2")
    launch("--ranks", "2", "echo", "2")  # control: a program
    launch("--ranks", "2", "x.py")
    assert started[0] == ["echo", "2"] and started[1][-1] == "x.py" and len(started) == 2


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ImportError('libcudart.so.12: no such file')", "ImportError: libcudart.so.12: no such file"),
        ("import os; os._exit(7)", "exit code 7"),
        ("print('a banner')", "exit code 0"),
    ],
)
def test_a_broken_torch_is_told_without_a_traceback(
    code: str, told: str, started: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_COUNT", code)
    with pytest.raises(ConfigError, match="how many GPUs are here") as caught:
        launch("echo", "1")
    assert told in str(caught.value) and len(str(caught.value).splitlines()) == 2 and not started
    launch("--ranks", "2", "echo", "1")  # control: it is not asked
    monkeypatch.setattr(launching, "_COUNT", "print(0)")
    launch("echo", "1")
    assert len(started) == 2

"""A12: a token in the environment or in a configuration stands in no file that a command leaves, and on no terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minillm.store import RunFolder
from tests.attacks.hostile import Place, Run, held, refused

SECRET = "hf_PlantedTokenThatMustNotBeSeen"  # the names below are those under which such things stand
NAMES = (
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MINILLM_JUDGE_KEY", "GITHUB_TOKEN"),
    *("AWS_SECRET_ACCESS_KEY", "DATABASE_URL", "MY_PASSWORD"),
)


def showing(folder: Path) -> list[str]:
    """The files below a folder in which the token stands."""
    return sorted(name for name, content in held(folder).items() if SECRET.encode() in content)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The token in the environment, and trackers that note what they are given."""
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)
    given: list[Any] = []

    def init(**options: Any) -> Any:
        given.append(options)
        return SimpleNamespace(log=lambda *a, **o: given.append((a, o)), finish=lambda: None)

    for name in ("wandb", "trackio"):
        package: Any = ModuleType(name)
        package.init = init
        monkeypatch.setitem(sys.modules, name, package)
    return given


def test_no_file_of_a_run_holds_a_token_of_the_environment(planted: list[Any], place: Place, run: Run) -> None:
    out = place.top / "made"
    outcomes = [
        run("distill", "--config", place.config, "trackers=[wandb, trackio]", f"out={out}"),
        run("evaluate", place.student, "--config", place.config, "--out", out / "e"),
        run("generate", place.student, "--config", place.config, "--out", out / "g.jsonl", "--keep-cut"),
        run("cache", place.top / "teacher", "--config", place.config, "--out", out / "k", "--top-k", 2,
            "data.over_long=drop"),
        run("report", out / "e", "--out", out / "r"),
    ]  # fmt: skip
    assert [outcome.code for outcome in outcomes] == [0] * len(outcomes), outcomes
    names = held(out)
    for name in ("run/config.yaml", "run/run.json", "run/metrics.jsonl", "run/report.html", "run/student/README.md"):
        assert name in names
    assert showing(out) == []
    assert not any(SECRET in outcome.out + outcome.err for outcome in outcomes)
    assert planted and SECRET not in repr(planted)


def test_control_a_run_that_kept_its_environment_would_be_seen(planted: list[Any], place: Place) -> None:
    folder = RunFolder(place.top / "made", writes=True)
    folder.begin("seed: 1\n")
    folder.set_status(environment=dict(os.environ))
    assert showing(place.top / "made") == ["run.json"]


@pytest.mark.parametrize("setting", ["token", "data.token", "engine.hf_token", "stages.0.api_key"])
def test_a_token_in_a_configuration_is_refused_and_not_repeated(setting: str, place: Place, run: Run) -> None:
    outcome = run("distill", "--config", place.config, f"{setting}={SECRET}")
    refused(outcome, "ConfigError", setting.rpartition(".")[2])
    # The heading repeats what the command line was; the problem itself does not.
    file = place.top / "token.yaml"
    file.write_text(place.config.read_text() + f"{setting.replace('.', '_')}: {SECRET}\n")
    told = run("distill", "--config", file)
    refused(told, "ConfigError", "no setting of this name")
    assert SECRET not in told.err + told.out and not (place.top / "out").exists()

"""A model at each of several etas, each evaluated as any other, and the front that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from minillm import api, liti_front, merge_folders, merge_front
from minillm.cli import app, merging
from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError
from minillm.liti_front import _axes
from minillm.measures import MEASURES
from minillm.merge_models import merge_at
from minillm.merge_report import eta_words
from minillm.plots import PNG
from minillm.publish import weights_sha256
from minillm.yaml_reader import write_yaml
from tests import tiny
from tests.unit.test_merge_models import trained

ETAS = (1.0, 0.0, 0.5)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    start = tiny.save_model(folder / "start", "llama", seed=1)
    for number in range(2):
        trained(start, folder / f"model-{number}", seed=number, spread=0.2)
    tiny.save_model(folder / "teacher", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl", rows=6)
    return folder


def config(home: Path, test: Any = None) -> RunConfig:
    return tiny.minillm_config(
        home / "runs", teacher=home / "teacher", student=home / "start", prompts=home / "prompts.jsonl",
        run_data={"train": str(home / "prompts.jsonl"), "test": test or str(home / "prompts.jsonl"),
                  "max_prompt_tokens": 8},
        run_evaluation={"seeds": (1, 2), "temperatures": (1.0,), "bootstrap": 100},
    )  # fmt: skip


@pytest.fixture(scope="module")
def front(home: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """(Folder, what came back, what was said)."""
    said: list[str] = []
    found = merge_front(
        home / "start", [home / "model-0", home / "model-1"], config(home), into=home / "front", method="slerp",
        etas=ETAS, say=said.append,
    )  # fmt: skip
    return home / "front", found, said


def test_each_eta_is_a_model_with_an_evaluation_of_its_own(
    home: Path, tmp_path: Path, front: tuple[Path, dict[str, Any], list[str]]
) -> None:
    folder, found, said = front
    stored = json.loads((folder / "front.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(found))
    assert [(point["eta"], point["folder"]) for point in stored["points"]] == [
        (0.0, "eta-0"), (0.5, "eta-0.5"), (1.0, "eta-1"),
    ]  # fmt: skip
    assert (stored["x"], stored["y"], stored["method"]) == ("reverse_kl", "rouge_l", "slerp")
    assert (folder / "front.png").read_bytes().startswith(PNG)
    assert any(line.startswith("angles of task vectors") for line in said)
    # At 0 it is the start, and what an evaluation of the start says; at 1 what `merge` writes.
    assert weights_sha256(folder / "eta-0" / "student") == weights_sha256(home / "start")
    alone = api.evaluate(home / "start", config(home), out=tmp_path / "alone")
    for name in ("rouge_l", "reverse_kl", "mean_length"):
        assert stored["points"][0]["measures"][name]["mean"] == pytest.approx(alone["measures"][name]["mean"])
        assert stored["points"][2]["measures"][name] != stored["points"][0]["measures"][name], "the control"
    merged = merge_folders(
        home / "start", [home / "model-0", home / "model-1"], into=tmp_path / "it", method="slerp", say=said.append
    )
    assert weights_sha256(folder / "eta-1" / "student") == merged.weights_sha256
    assert (folder / "eta-0.5" / "results.json").is_file()


def test_again_it_makes_nothing_anew_and_other_models_are_refused(
    home: Path, front: tuple[Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found, _ = front
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr("minillm.evaluation_sets.evaluate_into", lambda *given, **options: pytest.fail("evaluated"))
    models = [home / "model-0", home / "model-1"]
    again = merge_front(
        home / "start", models, config(home), into=folder, method="slerp", etas=ETAS, say=lambda line: None,
        x="mean_length", y="distinct_4",
    )  # fmt: skip
    assert again["points"] == found["points"] and (again["x"], again["y"]) == ("mean_length", "distinct_4")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after[path]} == {"front.json", "front.png"}
    with pytest.raises(DataError, match="differs in: models, weights"):
        merge_front(
            home / "start", models[::-1], config(home), into=folder, method="slerp", weights=(0.9, 0.1), etas=ETAS,
            say=lambda line: None,
        )  # fmt: skip


def test_what_is_drawn_is_named_found_or_refused() -> None:
    one = {name: {"mean": 0.5} for name in ("rouge_l", "reverse_kl", "mean_length")}
    assert _axes(one, None, None) == ("reverse_kl", "rouge_l")
    assert _axes({**one, "validity": {"mean": 1.0}}, None, None) == ("reverse_kl", "validity")
    assert _axes(one, "mean_length", None) == ("mean_length", "rouge_l")
    two = {"new:validity": {"mean": 0.1}, "new:rouge_l": {"mean": 0.1}, "old:rouge_l": {"mean": 0.1}}
    assert _axes(two, None, None) == ("old:rouge_l", "new:validity")
    with pytest.raises(ConfigError, match=r"--x: nothing to draw by itself, wanted a measure that .* have: rouge_l"):
        _axes({"rouge_l": {"mean": 0.1}}, None, None)
    with pytest.raises(ConfigError, match=r"--y: got 'validity', wanted .*"):
        _axes({**one, "validity": {"mean": None}}, None, "validity")


def test_several_sets_give_a_front_over_two_of_them(home: Path, tmp_path: Path) -> None:
    other = tiny.save_prompts(tmp_path / "other.jsonl", rows=5)
    sets = {"near": str(home / "prompts.jsonl"), "far": str(other)}
    found = merge_front(
        home / "start", [home / "model-0"], config(home, sets), into=tmp_path / "front", method="lerp", etas=(0.3,),
        say=lambda line: None,
    )  # fmt: skip
    assert (found["x"], found["y"]) == ("far:rouge_l", "near:rouge_l")
    assert (tmp_path / "front" / "eta-0.3" / "far" / "results.json").is_file()
    assert not (tmp_path / "front" / "eta-0.3" / "student" / "angles.png").exists(), "one model makes no angle"


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--method", "karcher"], "--method 'karcher': wanted one of lerp, slerp, nlerp"),
        (["--eta", "0,x"], "--eta '0,x': wanted numbers"),
        (["--eta", "1.5"], "eta: got 1.5"),
        (["--eta", "0.5,1.5"], "eta: got 1.5"),
        (["--eta", "0,0.5,0.50"], "eta: got 0.5 more than once"),
        (["--eta", "0.5,0.5"], "eta: got 0.5 more than once"),
        (["--evaluate", "RUN", "--eta", "1,1"], "eta: got 1 more than once"),
        (["--eta", "nan"], "eta: got nan"),
        (["--weights", "1;2"], "--weights '1;2': wanted numbers"),
        (["--x", "validity"], "add --evaluate"),
        (["--evaluate", "RUN", "--x", "validty"], "did you mean 'validity'"),
    ],
)
def test_what_the_command_cannot_use_is_told(home: Path, tmp_path: Path, words: list[str], match: str) -> None:
    if "RUN" in words:
        (tmp_path / "run.yaml").write_text(write_yaml(config(home).model_dump(mode="json")), encoding="utf-8")
        words = [str(tmp_path / "run.yaml") if word == "RUN" else word for word in words]
    models = [str(home / name) for name in ("start", "model-0", "model-1")]
    found = CliRunner().invoke(app, ["merge", *models, "--out", str(tmp_path / "out"), *words])
    assert isinstance(found.exception, ConfigError) and match in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_one_folder_or_one_for_each_eta(home: Path, tmp_path: Path) -> None:
    models = [str(home / name) for name in ("start", "model-0", "model-1")]
    ran = CliRunner().invoke(app, ["merge", *models, "--out", str(tmp_path / "one"), "--method", "nlerp"])
    assert ran.exit_code == 0 and "angles of task vectors: median" in ran.output
    merge_folders(*_of(home), into=tmp_path / "same", method="nlerp", say=lambda line: None)
    assert weights_sha256(tmp_path / "one") == weights_sha256(tmp_path / "same")
    ran = CliRunner().invoke(app, ["merge", *models, "--out", str(tmp_path / "two"), "--eta", "0,0.25"])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["eta-0", "eta-0.25"]
    refused = CliRunner().invoke(app, ["merge", *models, "--out", str(tmp_path / "two")])
    assert isinstance(refused.exception, DataError) and "holds models at several etas" in str(refused.exception)


def test_etas_that_agree_in_six_digits_are_models_of_their_own(home: Path, tmp_path: Path) -> None:
    near = (0.12345671, 0.12345672)
    found = merge_at(*_of(home), into=tmp_path / "it", method="lerp", etas=(*near, 0.25), say=lambda line: None)
    assert len(found["models"]) == 2
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == ["eta-0.12345671", "eta-0.12345672", "eta-0.25"]
    for eta in near:
        record = json.loads((tmp_path / "it" / f"eta-{eta}" / "student" / "merge.json").read_text(encoding="utf-8"))
        assert record["eta"] == eta
    assert [eta_words(eta) for eta in (0, 1.0, 0.5, 1e-5, 1 / 3)] == ["0", "1", "0.5", "1e-05", "0.3333333333333333"]


@pytest.mark.parametrize("lacking", [{}, {"reverse_kl": {"mean": None, "ci95": None}}])
def test_an_eta_without_a_measure_of_the_picture_is_named_and_the_others_are_drawn(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    lacking: dict[str, Any],
) -> None:  # fmt: skip
    """A measure that is infinite at one eta is left out of that evaluation."""

    def evaluated(student: Path, config: RunConfig, *, out: Path, fresh: bool) -> dict[str, Any]:
        both = {name: {"mean": 0.5, "ci95": [0.4, 0.6]} for name in ("rouge_l", "reverse_kl")}
        return {"measures": {"rouge_l": both["rouge_l"], **lacking} if out.name == "eta-0.5" else both}

    drawn, said = [], list[str]()
    monkeypatch.setattr(api, "evaluate", evaluated)
    monkeypatch.setattr(liti_front, "front_png", lambda points, **words: drawn.extend(points) or PNG)
    found = merge_front(*_of(home), config(home), into=tmp_path / "it", method="lerp", etas=ETAS, say=said.append)
    assert [eta for eta, *_ in drawn] == [0.0, 1.0] and len(found["points"]) == 3
    assert [line for line in said if "not drawn" in line] == [
        f"eta 0.5 is not drawn: it has no {MEASURES['reverse_kl'].label} (infinite where a model forbids a token)"
    ]
    assert "0.5" in capsys.readouterr().out, "it has its row in the table"


def test_names_of_folders_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    merging._say("\x1b[2Jmerged")
    assert capsys.readouterr().out == "\\x1b[2Jmerged\n"


def _of(home: Path) -> tuple[Path, list[Path]]:
    return home / "start", [home / "model-0", home / "model-1"]


def test_labels_say_set_and_measure() -> None:
    assert liti_front._label("far:rouge_l") == f"{MEASURES['rouge_l'].label}, far"
    assert liti_front._label("validity") == "validity"

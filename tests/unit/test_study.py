"""Promises: a study's cells are made once, seed by seed, made again where what they are made from changed, and its
table says what the cells hold."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from minillm import cli
from minillm.config import RunConfig, dump_config
from minillm.errors import ConfigError, DataError
from minillm.measures import reference_bucket
from minillm.ranks import Ranks
from minillm.study import cells as cells_module
from minillm.study import run as run_module
from minillm.study.cells import asked, differs, read_cell
from minillm.study.config import StudyConfig, load_study
from minillm.study.curves import draw_curves
from minillm.study.paired import paired
from minillm.study.run import run_study
from minillm.study.table import _temperatures, read_cells, summary
from minillm.yaml_reader import write_yaml
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
ARMS: dict[str, dict[str, Any]] = {"plain": {}, "short": {"stages.0.gamma": 0}}
WRECKED = {"stages.0.optimiser": {"lr": 1e30, "clip_grad": 0}, "stages.0.inner_epochs": 2}
"""Wrecked within its first step, before the log has a line."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, prompts, and the recipes of short runs over them."""
    made = tmp_path_factory.mktemp("study")
    tiny.save_model(made / "teacher", "gpt2", seed=1)
    tiny.save_model(made / "student", "gpt2", seed=2)
    prompts = str(tiny.save_prompts(made / "prompts.jsonl"))
    common: dict[str, Any] = {
        "name": "recipe", "out": str(made / "runs"), "student": str(made / "student"),
        "decoding": {"max_new_tokens": 6}, "engine": {"student": "zero0"},
    }  # fmt: skip
    data = {"train": prompts, "test": prompts, "max_prompt_tokens": 8, "test_limit": 4}
    distil = RunConfig(
        **common, teacher=str(made / "teacher"), data=data,
        evaluation={"seeds": (1,), "bootstrap": 1, "temperatures": (1.0, 0.5)},
        stages=({"kind": "minillm", "steps": 2, "prompts": 8, "optimiser": {"lr": 1e-2}},),
    )  # fmt: skip
    tune = RunConfig(
        **common, data={"train": prompts, "max_prompt_tokens": 8},
        stages=({"kind": "sft", "steps": 2, "batch": 8, "optimiser": {"lr": 1e-2}},),
    )  # fmt: skip
    (made / "distil.yaml").write_text(dump_config(distil), encoding="utf-8")
    (made / "tune.yaml").write_text(dump_config(tune), encoding="utf-8")
    return made


def study_file(place: Path, *, name: str = "two", **changes: Any) -> Path:
    """A study of two arms and two seeds below ``place``."""
    values = {
        "name": name, "recipe": str(place / "distil.yaml"), "student": str(place / "tune.yaml"), "seeds": [1, 2],
        "arms": ARMS, "compare_with": "short", "results": str(place / name), **changes,
    }  # fmt: skip
    file = place / f"{name}.yaml"
    file.write_text(write_yaml(values), encoding="utf-8")
    return file


def make(study: StudyConfig, *, seeds: list[int] | None = None, again: bool = False) -> list[str]:
    """Makes what is lacking; what was said."""
    said: list[str] = []
    run_study(study, arms=list(study.arms), seeds=seeds or list(study.seeds), again=again, say=said.append)
    return said


@pytest.fixture(scope="module")
def finished(place: Path) -> StudyConfig:
    study = load_study(study_file(place))
    first = make(study, seeds=[1])
    assert first[0] == "study two: 2 cells to make, 0 there already"
    second = make(study)
    assert second[0] == "study two: 2 cells to make, 2 there already"
    assert [line.split(":")[0] for line in second[1:]] == ["1/2  plain seed 2", "2/2  short seed 2"]
    return study


def test_a_cell_is_small_and_says_what_was_run(finished: StudyConfig) -> None:
    file = finished.cell_file("short", 2)
    cell = read_cell(file)
    assert cell is not None and file.stat().st_size < 20_000
    assert cell["state"] == "done" and cell["config"]["stages"][0]["gamma"] == 0
    assert set(cell["made_from"]) == {"train data", "test data", "engine", "student", "teacher"}
    assert cell["training"]["steps"] == 2 and cell["training"]["tokens"] > 0 and cell["training"]["cpu_seconds"] > 0
    assert list(cell["temperatures"]) == ["1.0", "0.5"]
    by_length = cell["temperatures"]["1.0"]["by_length"]
    assert sum(bucket["prompts"] for bucket in by_length.values()) == 4


def test_each_seed_has_a_student_of_its_own_that_all_arms_start_from(finished: StudyConfig) -> None:
    cells = {(arm, seed): read_cell(finished.cell_file(arm, seed)) for arm in ARMS for seed in (1, 2)}
    digest = {key: cell["made_from"]["student"] for key, cell in cells.items() if cell is not None}
    assert digest["plain", 1] == digest["short", 1] != digest["plain", 2] == digest["short", 2]
    assert finished.cell_config("plain", 2).student.endswith("studies/two/student/2/student")


def test_what_is_there_is_not_made_again(finished: StudyConfig) -> None:
    stamps = [finished.cell_file(arm, seed).stat().st_mtime_ns for arm in ARMS for seed in (1, 2)]
    assert make(finished) == ["study two: 0 cells to make, 4 there already"]
    assert stamps == [finished.cell_file(arm, seed).stat().st_mtime_ns for arm in ARMS for seed in (1, 2)]


def test_what_changed_is_named(place: Path, finished: StudyConfig) -> None:
    """A setting, data, a model's recipe; and not where cells or runs are kept, nor a setting that is new."""
    cell = read_cell(finished.cell_file("plain", 1))
    assert cell is not None

    def now(name: str, **changes: Any) -> list[str]:
        other = load_study(study_file(place, name=name, **changes))
        return differs(cell, asked(other, "plain", 1))

    assert now("elsewhere") == []
    assert now("longer", settings={"stages.0.steps": 3}) == ["stages.0.steps"]
    assert now("listed", settings={"evaluation.temperatures": [1.0]}) == ["evaluation.temperatures.1"]
    assert now("budget", settings={"evaluation.batch_tokens": 99}) == [], "memory only"
    more = str(tiny.save_prompts(place / "more.jsonl", rows=25))
    assert now("data", settings={"data.train": more}) == ["data.train", "train data"]
    text = (place / "tune.yaml").read_text(encoding="utf-8").replace("steps: 2", "steps: 3")
    (place / "tune3.yaml").write_text(text, encoding="utf-8")
    assert now("start", student=str(place / "tune3.yaml")) == ["student"]
    text = (place / "tune.yaml").read_text(encoding="utf-8").replace("batch_tokens: 65536", "batch_tokens: 99")
    (place / "tune4.yaml").write_text(text, encoding="utf-8")
    assert "batch_tokens: 99" in text and now("memory", student=str(place / "tune4.yaml")) == []
    assert now("given", student=None) == ["student"]
    older = {**cell, "config": {**cell["config"], "stages": [dict(cell["config"]["stages"][0])]}}
    del older["config"]["stages"][0]["dual_clip"]  # made before there was such a setting
    assert differs(older, asked(finished, "plain", 1)) == []
    older["config"]["stages"][0]["gone"] = 1
    assert differs(older, asked(finished, "plain", 1)) == ["settings that no longer exist"]


def test_what_a_cell_is_made_from_includes_what_names_stand_for(place: Path, finished: StudyConfig) -> None:
    """Engine settings by their content, the corpus of a made student, and an arm's own models."""
    cell = read_cell(finished.cell_file("plain", 1))
    assert cell is not None
    engine = place / "engine.json"
    engine.write_text(json.dumps({"zero_optimization": {"stage": 0}}), encoding="utf-8")
    wanted = asked(load_study(study_file(place, name="engine", settings={"engine.student": str(engine)})), "plain", 1)
    engine.write_text(json.dumps({"zero_optimization": {"stage": 1}}), encoding="utf-8")
    later = asked(load_study(study_file(place, name="engine", settings={"engine.student": str(engine)})), "plain", 1)
    assert wanted.config == later.config and wanted.made_from["engine"] != later.made_from["engine"]
    own = {"plain": {"student": str(place / "teacher")}, "short": {}}
    arm = asked(load_study(study_file(place, name="own", arms=own)), "plain", 1)
    assert arm.student is None and arm.run.student == str(place / "teacher")
    without = {"config": cell["config"], "made_from": {**cell["made_from"], "gone": "x"}}
    assert differs(without, asked(finished, "plain", 1)) == ["gone"]


def test_a_recipe_that_changes_while_a_cell_is_made_spoils_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(study_file(place, name="spoilt", student=None, seeds=[1], arms={"short": {}}))
    recipe, made = place / "distil.yaml", run_module.make
    text = recipe.read_text(encoding="utf-8")

    def meanwhile(config: RunConfig, *, ranks: Ranks) -> dict[str, Any]:
        recipe.write_text(text.replace("steps: 2", "steps: 4"), encoding="utf-8")
        return made(config, ranks=ranks)

    monkeypatch.setattr(run_module, "make", meanwhile)
    try:
        with pytest.raises(DataError, match="changed while it was made"):
            make(study)
    finally:
        recipe.write_text(text, encoding="utf-8")
    assert not study.cell_file("short", 1).exists()


def test_measures_that_some_cells_lack_are_left_out() -> None:
    """A temperature, a bucket or a measure that only one of two arms has: no difference, and no error."""

    def cell(**temperatures: Any) -> dict[str, Any]:
        return {"temperatures": {key.replace("_", "."): value for key, value in temperatures.items()}, "state": "done"}

    own = cell(t1_0={"validity": 0.5, "by_length": {"0-5": {"validity": 0.4}}}, t0_5={"validity": 0.6, "by_length": {}})
    other = cell(t1_0={"rouge_l": 0.5, "by_length": {}})
    found = _temperatures({1: own}, {1: other})
    assert found["t1.0"]["validity"]["mean"] == 0.5 and found["t1.0"]["validity"]["difference"]["mean"] is None
    assert found["t1.0"]["by_length"]["0-5"]["validity"]["mean"] == 0.4
    assert found["t0.5"]["validity"]["difference"]["mean"] is None


def test_other_code_is_told_and_a_changed_cell_made_again(place: Path, finished: StudyConfig) -> None:
    copy = place / "copied"
    shutil.copytree(finished.results, copy)
    study = load_study(study_file(place, name="copied"))
    file = study.cell_file("plain", 1)
    file.write_text(file.read_text(encoding="utf-8").replace('"code": "', '"code": "0'), encoding="utf-8")
    said = make(study)
    assert said[-1].startswith("note: 1 of them were made by another version of the code")
    assert "1 cells were made by another version of the code" in read_cells(study)[1]
    altered = load_study(study_file(place, name="copied", arms={**ARMS, "plain": {"stages.0.gamma": 0.5}}))
    found, notes = read_cells(altered)
    assert found["plain"] == {} and any("differs in stages.0.gamma" in note for note in notes)
    said = make(altered, seeds=[1])
    assert "made again, since it differs in stages.0.gamma" in said[0] and said[1].endswith("1 there already")


def test_a_failed_cell_is_kept_and_told(place: Path) -> None:
    study = load_study(study_file(place, name="wrecked", arms={"wrecked": WRECKED, "short": {}}, seeds=[1]))
    said = make(study)
    assert "failed: NonFinite" in said[1] or "failed: Alarmed" in said[1], said
    assert make(study)[0].endswith("2 there already")
    found = summary(study, read_cells(study)[0])
    assert list(found["arms"]["wrecked"]["failed"]) == [1] and found["arms"]["wrecked"]["done"] == []
    assert found["arms"]["wrecked"]["temperatures"] == {}


def test_a_study_of_failures_alone_says_so(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study_file(place, name="lost", arms={"wrecked": WRECKED}, compare_with="wrecked", seeds=[1], student=None)
    out = place / "lost.out.json"
    for options in ((), ("--show", "--json", str(out), "--plot", str(place / "lost.png"))):
        argv = ["minillm", "study", "--config", str(place / "lost.yaml"), *options]
        monkeypatch.setattr("sys.argv", argv)
        assert cli._guarded(cli.app) == 0
        told = capsys.readouterr().out
        assert "is done" in told and "failed: wrecked, seed 1: NonFinite" in told
    assert "not written" in told and list(json.loads(out.read_text(encoding="utf-8"))["arms"]["wrecked"]["failed"]) == [
        "1"
    ]


def test_where_cells_cannot_be_kept_nothing_is_made(place: Path) -> None:
    (place / "taken").write_text("", encoding="utf-8")
    study = load_study(study_file(place, name="nowhere", results=str(place / "taken")))
    with pytest.raises(ConfigError, match="cannot be used as a folder"):
        make(study)
    assert not (place / "runs" / "studies" / "nowhere").exists()


def test_the_summary_is_the_cells(finished: StudyConfig) -> None:
    cells, notes = read_cells(finished)
    assert notes == []
    found = summary(finished, cells)["arms"]
    kl = [cells["plain"][seed]["temperatures"]["1.0"]["reverse_kl"] for seed in (1, 2)]
    base = [cells["short"][seed]["temperatures"]["1.0"]["reverse_kl"] for seed in (1, 2)]
    at = found["plain"]["temperatures"]["1.0"]["reverse_kl"]
    assert at["per_seed"] == kl and at["mean"] == pytest.approx(sum(kl) / 2)
    assert at["difference"]["mean"] == pytest.approx((kl[0] - base[0] + kl[1] - base[1]) / 2)
    assert found["short"]["temperatures"]["1.0"]["reverse_kl"]["difference"]["mean"] == 0
    # Of two seeds, the interval reaches 12.7062 halves of the distance between the two differences.
    ends = at["difference"]["ci95"]
    assert ends[1] - ends[0] == pytest.approx(12.7062 * abs((kl[0] - base[0]) - (kl[1] - base[1])), rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "long-horizon",
        "world-160k",
        "world",
        "world-tenth",
        "world-seconds",
        "preferences",
        "preferences-fast",
        "sdpo",
        "merging",
    ],
)
def test_the_cells_that_are_committed_are_those_of_their_study(name: str) -> None:
    """A recipe that changes makes them stale, which should be seen."""
    found, notes = read_cells(load_study(ROOT / "docs" / "results" / f"{name}.yaml"))
    assert not [note for note in notes if "left out" in note]
    assert all(cells for cells in found.values())


def test_what_a_source_holds_is_named_without_the_network() -> None:
    assert (
        cells_module._source_digest("set:dolly") == "set:dolly"
        and cells_module._source_digest("hub:a/b@train") == "hub:a/b@train"
    )
    assert len(cells_module._source_digest("world:test")) == 64
    with pytest.raises(DataError, match=r"none\.jsonl cannot be read"):
        cells_module._source_digest("none.jsonl")


def test_intervals_over_seeds() -> None:
    """Golden numbers: 1, 2, 3, 4, 5 has mean 3 and reaches 2.776445 · sqrt(2.5 / 5) to each side."""
    found = paired([1.0, 2.0, 3.0, 4.0, 5.0])
    reach = 2.776445 * math.sqrt(0.5)
    assert found["mean"] == 3 and found["ci95"] == pytest.approx([3 - reach, 3 + reach], rel=1e-6)
    assert paired([1.0])["ci95"] is None and paired([])["mean"] is None


@pytest.mark.parametrize(
    ("words", "bucket"), [(1, "0-5"), (5, "0-5"), (6, "6-10"), (10, "6-10"), (11, "11+"), (400, "11+")]
)
def test_buckets_of_the_reference(words: int, bucket: str) -> None:
    assert reference_bucket({"references": ["word " * words, "another"]}) == bucket
    assert reference_bucket({"references": []}) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"compare_with": "shrt"}, "did you mean 'short'"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": []}, "at least one seed"),
        ({"name": "../up"}, "letters, digits"),
        ({"arms": {"student": {}, "short": {}}}, "neither 'student' nor 'teacher'"),
        ({"arms": {"a/b": {}, "short": {}}}, "a/b"),
        ({"arms": {"plain": {"seed": 3}, "short": {}}}, "set by the study itself"),
        ({"arms": {"plain": {"stages.0.gama": 0}, "short": {}}}, "did you mean 'gamma'"),
        ({"arms": {"plain": {"stages.0.gamma": 2}, "short": {}}}, "at most 1"),
        ({"recipe": "none.yaml"}, "none.yaml"),
        ({"student": "none.yaml"}, "none.yaml"),
        ({"armz": {}}, "armz"),
    ],
)
def test_mistakes_are_told_before_anything_runs(place: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        load_study(study_file(place, name="bad") if not changes else _bad(place, changes))


def _bad(place: Path, changes: dict[str, Any]) -> Path:
    file = study_file(place, name="bad")
    values = {
        "name": "bad", "recipe": str(place / "distil.yaml"), "seeds": [1], "arms": ARMS, "compare_with": "short",
        "results": str(place / "bad"), **changes,
    }  # fmt: skip
    file.write_text(write_yaml(values), encoding="utf-8")
    return file


def test_a_file_that_is_no_cell_is_told(place: Path) -> None:
    for text in ("{", "[]", json.dumps({"schema": 1})):
        (place / "odd.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="move it away"):
            read_cell(place / "odd.json")


def test_the_command_prints_the_table(
    place: Path, finished: StudyConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    file = place / "two.yaml"

    def run(*options: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["minillm", "study", "--config", str(file), *options])
        code = cli._guarded(cli.app)
        told = capsys.readouterr()
        return code, told.out, told.err

    for _ in range(2):  # the second time over the files of the first
        code, out, _ = run("--show", "--json", str(place / "found.json"), "--plot", str(place / "found.png"))
    assert code == 0 and "…" not in out and "rev. KL less that of short" in out, out
    assert json.loads((place / "found.json").read_text(encoding="utf-8"))["arms"]["plain"]["done"] == [1, 2]
    assert (place / "found.png").stat().st_size > 1000
    code, _, err = run("--arms", "plian")
    assert code == 2 and "did you mean 'plain'" in err
    code, _, err = run("--seeds", "1,x")
    assert code == 2 and "--seeds" in err
    code, _, err = run("--seeds", "7")
    assert code == 2 and "none of the study's (1, 2)" in err
    code, _, err = run("--show", "--again")
    assert code == 2 and "leave one out" in err
    code, _, err = run("--plot", str(place / "found.txt"))
    assert code == 2 and "--plot" in err
    code, _, err = run("--curves", str(place / "curves.png"), "--against", "token")
    assert code == 2 and "--against: got 'token', wanted one of tokens, update, seconds; did you mean 'tokens'?" in err
    code, out, _ = run("--show", "--compare-with", "plain")
    assert code == 0 and "rev. KL less that of plain" in out and "against plain:" in out
    code, _, err = run("--show", "--compare-with", "plian")
    assert code == 2 and "--compare-with: 'plian' is none of the study's (plain, short); did you mean 'plain'" in err
    code, _, err = run("--show", "--diversity", "distinct4")
    assert code == 2 and "did you mean 'distinct_4'" in err
    code, out, _ = run("--show", "--curves", str(place / "curves.png"))
    assert code == 0 and "not written, no cell says how its validations stand against tokens" in out


def course(*points: tuple[int, float], **more: Any) -> dict[str, Any]:
    """A cell with these validations: (tokens, validity)."""
    lines = [{"step": n, "update": 2 * n, "tokens": at, "validity": value} for n, (at, value) in enumerate(points, 1)]
    return {"state": "done", "training": {"validations": lines}, **more}


def test_curves_are_the_validations_and_arms_without_any_are_named(tmp_path: Path) -> None:
    cells = {
        "learns": {1: course((100, 0.1), (200, 0.5)), 2: course((120, 0.3), (220, 0.7), (320, 0.8))},
        "mute": {1: {"state": "done", "training": {"validations": [{"step": 1, "tokens": 5, "loss": 0.4}]}}},
        "failed": {1: course((1, 1.0), state="failed")},
    }
    figure, drawn = draw_curves(cells, measures=("validity",), against="tokens")
    figure.savefig(tmp_path / "curves.svg")
    assert drawn == ["learns"]
    assert (tmp_path / "curves.svg").read_text(encoding="utf-8").count("<path") > 5
    assert draw_curves(cells, measures=("validity",), against="seconds")[1] == []


def test_validations_say_what_training_had_taken(place: Path) -> None:
    prompts = str(place / "prompts.jsonl")
    settings = {"data.validation": prompts, "data.validation_limit": 4, "stages.0.validate_every": 1}
    chosen = load_study(
        study_file(place, name="validated", settings=settings, arms={"plain": {}}, compare_with="plain")
    )
    make(chosen, seeds=[1])
    training = read_cells(chosen)[0]["plain"][1]["training"]
    tokens = [line["tokens"] for line in training["validations"]]
    assert 0 < tokens[0] < tokens[1] == training["tokens"]
    assert [line["update"] for line in training["validations"]] == [1, 2]
    assert training["validations"][0]["seconds"] > 0

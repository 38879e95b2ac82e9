"""Promises: several processes make the same cells as one; a short form keeps to folders of its own; a cell made again
is held against the committed one."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from minillm import errors
from minillm.errors import ConfigError, DataError
from minillm.study import jobs as jobs_module
from minillm.study.cells import read_cell
from minillm.study.command import run_again
from minillm.study.config import StudyConfig, load_study
from minillm.study.jobs import run_by_jobs
from minillm.study.reproduce import Held, hold, reproduce
from tests.unit.test_study import make, place, study_file

__all__ = ["place"]  # a fixture
SEARCH = {"setting": "stages.0.optimiser.lr", "values": [1e-3, 1e-2], "metric": "rouge_l"}
WITHIN = {"rouge_l": 0.01, "reverse_kl": 0.01}


def _kinds(kind: type[errors.MinillmError]) -> list[type[errors.MinillmError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _kinds(child))]


def tuned(place: Path, name: str, **changes: Any) -> Path:
    """A study that makes students and text, and tunes."""
    prompts = str(place / "prompts.jsonl")
    arms = {
        "plain": {},
        "taught": {
            "data.teacher_text": f"runs/studies/{name}/taught.jsonl",
            "stages": [{"kind": "seqkd", "steps": 2, "batch": 4, "optimiser": {"lr": 1e-2}}],
        },
    }
    whole = {
        "arms": arms, "compare_with": "plain", "settings": {"data.validation": prompts}, "taught": {"rows": 8},
        "budget": {"unit": "tokens", "amount": 60, "pilot": 2}, "search": SEARCH, "within": WITHIN, **changes,
    }  # fmt: skip
    return study_file(place, name=name, **whole)


def by_jobs(study: StudyConfig, jobs: int) -> list[str]:
    said: list[str] = []
    run_by_jobs(
        study, jobs=jobs, arms=list(study.arms), seeds=list(study.seeds), again=False, say=said.append
    )  # fmt: skip
    return said


@pytest.fixture(scope="module")
def shared(place: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """Made by two processes, in a working folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shared"))
        study = load_study(tuned(place, "shared"))
        said = by_jobs(study, 2)
        assert [line for line in said if line.startswith("study")] == ["study shared: 4 cells to make, 0 there already"]
        assert sorted(line.split(":")[0] for line in said if line.startswith("tuned")) == [
            "tuned plain",
            "tuned taught",
        ]
        assert [line.split("  ")[0] for line in said[-4:]] == ["1/4", "2/4", "3/4", "4/4"]
        assert by_jobs(study, 2) == ["study shared: 0 cells to make, 4 there already"]
    return study


def test_two_processes_make_what_one_makes(
    place: Path, shared: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = load_study(tuned(place, "alone"))
    make(alone)
    for arm in alone.arms:
        chosen = [json.loads(study.tuning_file(arm).read_text(encoding="utf-8")) for study in (shared, alone)]
        assert chosen[0]["settings"] == chosen[1]["settings"] and chosen[0]["tries"] == chosen[1]["tries"]
        for seed in alone.seeds:
            ours, theirs = read_cell(shared.cell_file(arm, seed)), read_cell(alone.cell_file(arm, seed))
            assert ours is not None and theirs is not None
            assert ours["temperatures"] == theirs["temperatures"] and ours["made_from"] == theirs["made_from"]


def test_jobs_and_a_launcher_exclude_each_other(shared: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--jobs 2: under a launcher all ranks make each cell together"):
        by_jobs(shared, 2)


def _ended(*_: object) -> None:
    os._exit(9)


def test_a_process_that_is_killed_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(study_file(place, name="killed"))
    monkeypatch.setattr(jobs_module, "_make_cell", _ended)
    with pytest.raises(ConfigError, match="--jobs 2: one of the processes was ended from outside"):
        by_jobs(study, 2)


@pytest.mark.parametrize("kind", _kinds(errors.MinillmError), ids=lambda kind: kind.__name__)
def test_a_users_mistake_comes_out_of_a_process_as_it_went_in(kind: type[errors.MinillmError]) -> None:
    given = kind("logits", (2, 3), (2, 4)) if issubclass(kind, errors.ShapeMismatch) else kind("what was got")
    back = pickle.loads(pickle.dumps(given))
    assert type(back) is kind and str(back) == str(given)


def test_the_short_form_keeps_to_itself(place: Path) -> None:
    quick = {"seeds": [2], "search": None, "budget": {"unit": "updates", "amount": 1},
             "settings": {"data.test_limit": 2}, "student_settings": {"stages.0.steps": 1}}  # fmt: skip
    file = tuned(place, "whole", quick=quick)
    whole, short = load_study(file), load_study(file, quick=True)
    assert (short.name, short.results) == ("whole-quick", "runs/studies/whole-quick/cells")
    assert short.seeds == (2,) and short.search is None and short.budget is not None and short.budget.amount == 1
    assert short.settings == {"data.validation": str(place / "prompts.jsonl"), "data.test_limit": 2}
    assert short.learns_from_taught("taught") and short.taught_file != whole.taught_file
    student, shorter = whole.student_config(2), short.student_config(2)
    assert student is not None and shorter is not None
    assert (student.stages[0].steps, shorter.stages[0].steps) == (2, 1) and student.name != shorter.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--quick: this file has no entry 'quick'"),
        ({"quick": {"name": "mine"}}, "quick: 'name' is set by the short form itself"),
        ({"quick": {"seds": [1]}}, "seds"),
        ({"quick": {"settings": {"stages.0.stepz": 1}}}, "stages.0.stepz"),
        ({"quick": {"settings": None}}, "quick: settings is None, wanted settings by path"),
        ({"quick": {"student_settings": ["steps"]}}, "quick: student_settings is .*, wanted settings by path"),
    ],
)
def test_a_short_form_with_mistakes_is_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    file = tuned(place, "wrong", **changes)
    with pytest.raises(ConfigError, match=message):
        load_study(file, quick=True)


def test_one_student_may_serve_all_seeds(place: Path) -> None:
    study = load_study(tuned(place, "one", student_seed=7))
    runs = [study.student_config(seed) for seed in study.seeds]
    assert runs[0] is not None and runs[0] == runs[1] and runs[0].seed == 7
    assert study.cell_config("plain", 1).student == study.cell_config("plain", 2).student
    own = load_study(tuned(place, "own"))
    assert own.student_config(1) != own.student_config(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student_settings": {"seed": 3}}, "student_settings: 'seed' is set by the study itself"),
        ({"student": None, "student_settings": {"stages.0.steps": 3}}, "there is no 'student' whose file"),
        ({"student_settings": {"stages.0.stepz": 3}}, "stages.0.stepz"),
        ({"student": None, "student_seed": 3}, "student_seed: there is no 'student'"),
        ({"within": {"rouge": 0.1}}, "within: 'rouge' is no measure; did you mean 'rouge_l'"),
        ({"within": {"rouge_l": 0}}, "within.rouge_l"),
    ],
)
def test_settings_of_models_and_tolerances_are_checked(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(tuned(place, "checked", **changes))


def test_a_cell_made_again_comes_out_the_same(
    shared: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly, here: the tolerance is for other machines."""
    monkeypatch.chdir(tmp_path)
    before = shared.cell_file("plain", 2).read_bytes()
    exact = shared.model_copy(update={"within": {"rouge_l": 1e-12, "reverse_kl": 1e-12}})
    assert reproduce(exact, "plain", 2)
    shown = capsys.readouterr().out
    assert "code: the same" in shown and shown.count("holds") == 2 and "train data:" in shown
    assert shared.cell_file("plain", 2).read_bytes() == before


def test_a_figure_that_was_changed_by_hand_does_not_hold(
    shared: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = shared.cell_file("plain", 1)
    kept = file.read_text(encoding="utf-8")
    cell = json.loads(kept)
    cell["temperatures"]["1.0"]["rouge_l"] += 0.02
    file.write_text(json.dumps(cell), encoding="utf-8")
    try:
        assert not reproduce(shared, "plain", 1)
    finally:
        file.write_text(kept, encoding="utf-8")
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_figures_are_held_within_the_tolerance() -> None:
    held = [Held(measure="rouge_l", expected=0.5, seen=seen, within=0.03) for seen in (0.5, 0.52, 0.469, None)]
    assert [each.holds for each in held] == [True, True, False, False]


def test_a_cell_that_cannot_be_held_is_refused(place: Path, shared: StudyConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'within' is empty"):
        reproduce(shared.model_copy(update={"within": {}}), "plain", 1)
    with pytest.raises(DataError, match="there is no such cell"):
        reproduce(shared.model_copy(update={"results": str(tmp_path)}), "plain", 1)
    with pytest.raises(DataError, match=r"it differs in stages\.0\.prompts"):
        reproduce(shared.model_copy(update={"settings": {**shared.settings, "stages.0.prompts": 4}}), "plain", 1)
    stored = read_cell(shared.cell_file("plain", 1))
    assert stored is not None
    with pytest.raises(ConfigError, match="within: the cell has no measure 'validity'"):
        hold(shared.model_copy(update={"within": {"validity": 0.1}}), stored, stored, temperature="1.0")
    for asked, message in [
        ("plain", "wanted an arm and a seed"),
        ("plane:1", "'plane' is none"),
        ("plain:9", "9 is none"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_again(tuned(place, "refused"), asked)

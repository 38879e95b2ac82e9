"""KEY=VALUE on a study's command line: an entry of its file, or a setting of the recipe for all cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillm.errors import ConfigError
from minillm.study.config import StudyConfig, load_study

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "docs" / "results" / "world.yaml"
PAIR = ("teacher=teachers/micro-world", "student=students/micro-world-16x1")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def load(*overrides: str, quick: bool = False) -> StudyConfig:
    return load_study(STUDY, overrides, quick=quick)


def test_a_pair_takes_the_place_of_the_models_that_the_study_makes() -> None:
    plain, own = load(), load(*PAIR)
    arm, seed = own.compare_with, own.seeds[0]
    assert plain.makes(arm, "teacher") and plain.makes(arm, "student")  # control
    assert not own.makes(arm, "teacher") and not own.makes(arm, "student")
    config = own.arm_config(arm, seed, name="x", changes={})
    assert (f"teacher={config.teacher}", f"student={config.student}") == PAIR


def test_settings_reach_every_cell_and_the_short_form() -> None:
    for quick in (False, True):
        study = load("decoding.max_new_tokens=7", quick=quick)
        assert study.arm_config(study.compare_with, 1, name="x", changes={}).decoding.max_new_tokens == 7


def test_entries_are_those_of_the_file_and_a_name_takes_its_cells_along() -> None:
    study = load("name=mine", "seeds=[7]", "budget.amount=1000")
    assert (study.name, study.seeds, study.results) == ("mine", (7,), "runs/studies/mine/cells")
    assert study.budget is not None and (study.budget.amount, study.budget.unit) == (1000, "tokens")
    assert load("name=mine", "results=here").results == "here" and load().results != study.results


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=3", "'seed' is set by the study itself"),
        ("seed", "wanted PATH=VALUE"),
        ("=3", "wanted PATH=VALUE"),
        ("sedes=[3]", "neither an entry of a study nor a setting of a run; did you mean 'seeds'"),
        ("arms.sft.stages.0.steps=3", "change the entry 'arms' as a whole"),
        ("stages.0.steps=3", "its 'stages' stand in the place of the recipe's"),
        ("decoding.max_new_token=3", "max_new_token"),
    ],
)
def test_what_would_not_be_heard_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
        load(override)


def test_a_setting_that_an_arm_has_itself_is_refused(tmp_path: Path) -> None:
    file = ROOT / "docs" / "results" / "long-horizon.yaml"
    with pytest.raises(ConfigError, match="arm 'single_step' sets it itself, and would win"):
        load_study(file, ["stages.0.gamma=0.5"])
    assert load_study(file, ["stages.0.prompts=8"]).settings["stages.0.prompts"] == 8  # control

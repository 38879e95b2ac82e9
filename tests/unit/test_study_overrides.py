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
        ("stages.0.steps=3", "arm 'sft' sets 'stages' itself, which would win"),
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


LONG = ROOT / "docs" / "results" / "long-horizon.yaml"


def test_a_setting_around_one_of_an_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"arm 'single_step' sets 'stages.0.gamma' itself, which would win"):
        load_study(LONG, ["stages=[{kind: minillm, steps: 1, prompts: 8, optimiser: {lr: 1e-3}}]"])
    with pytest.raises(ConfigError, match=r"arm 'paper' sets 'stages.0.teacher_mix' itself"):
        load_study(LONG, ["arms={single_step: {}, paper: {stages.0.teacher_mix: 0.2}}", "stages.0={kind: minillm}"])
    assert load_study(LONG, ["stages.0.prompts=8"]).settings["stages.0.prompts"] == 8  # control


@pytest.mark.parametrize(
    ("entry", "path", "told"),
    [
        (
            "search={setting: stages.0.optimiser.lr, values: [1e-3, 2e-3]}",
            "stages.0.optimiser.lr=5e-4",
            "search sets it",
        ),
        ("search={setting: stages.0.long_weight, values: [1, 2]}", "stages.0.long_weight=3", "search sets it"),
        ("budget={unit: updates, amount: 50}", "stages.0.steps=5", "budget sets it"),
    ],
)
def test_a_setting_that_the_study_decides_is_refused(entry: str, path: str, told: str) -> None:
    arms = "arms={single_step: {}}"
    validated = "data.validation=world:validation"
    with pytest.raises(ConfigError, match=f"override '{path.partition('=')[0]}': {told} for every arm"):
        load_study(LONG, [arms, validated, entry, path])
    load_study(LONG, [arms, validated, path])  # control: nothing decides it
    load_study(LONG, [arms, validated, entry, "stages.0.prompts=8"])


@pytest.mark.parametrize("override", ["seeds=[1,2]", "budget.amount=500", "budget=null", "results=here"])
def test_an_entry_that_the_short_form_has_is_refused_with_it(override: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"--quick has its own '{override.split('=', maxsplit=1)[0].split('.', maxsplit=1)[0]}', which would win",
    ):
        load(override, quick=True)
    load(override)  # control
    assert load("name=mine", quick=True).name == "mine-quick"

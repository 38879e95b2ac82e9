"""Promises: a budget sets the steps of every arm, a search tries the same values for each, and both are kept and not
made again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minillm.errors import ConfigError, DataError
from minillm.generated import read_generated
from minillm.pair_manifest import read_pair_manifest
from minillm.ranks import Ranks
from minillm.study import budget, tuning
from minillm.study.config import StudyConfig, load_study
from minillm.study.table import read_cells
from minillm.study.tuning import tune, untuned
from tests.unit.test_study import make, place, study_file

__all__ = ["place"]  # a fixture
WILD = 1e30
"""A learning rate that wrecks its run."""
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "twice": {"stages.0.inner_epochs": 2},
    "supervised": {"stages": [{"kind": "sft", "steps": 2, "batch": 4, "optimiser": {"lr": 1e-2}}]},
}


def study(place: Path, name: str, **changes: Any) -> StudyConfig:
    values = {"name": name, "student": None, "arms": ARMS, "compare_with": "plain", "seeds": [1], **changes}
    return load_study(study_file(place, **values))


def settle(chosen: StudyConfig, arm: str) -> dict[str, Any]:
    tune(chosen, arm, ranks=Ranks(), say=lambda line: None)
    return dict(json.loads(chosen.tuning_file(arm).read_text(encoding="utf-8")))


def test_updates_are_counted_without_guessing(place: Path) -> None:
    chosen = study(place, "updates", budget={"unit": "updates", "amount": 7, "pilot": 2})
    steps = {arm: settle(chosen, arm)["settings"]["stages.0.steps"] for arm in ARMS}
    assert steps == {"plain": 7, "twice": 3, "supervised": 7}


def test_tokens_are_those_of_responses_each_counted_once(place: Path) -> None:
    chosen = study(place, "tokens", budget={"unit": "tokens", "amount": 1000, "pilot": 3})
    for arm in ARMS:
        found = settle(chosen, arm)
        cost, steps = found["pilot"]["tokens_per_step"], found["settings"]["stages.0.steps"]
        assert steps * cost <= 1000 < (steps + 1) * cost
        rows = 4 if arm == "supervised" else 8
        assert rows <= cost <= rows * 6  # of six tokens at most; without the prompts
    assert settle(chosen, "plain")["pilot"]["tokens_per_step"] == pytest.approx(
        settle(chosen, "twice")["pilot"]["tokens_per_step"], rel=0.3
    )


def test_seconds_leave_out_what_a_run_starts_with(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = study(place, "seconds", budget={"unit": "seconds", "amount": 10, "pilot": 3})
    lines = course((50.0, 50.5, 51.0))
    monkeypatch.setattr(budget, "course_of", lambda run: lines)
    assert settle(chosen, "plain")["settings"]["stages.0.steps"] == 20


def test_a_budget_that_holds_no_step_is_told(place: Path) -> None:
    chosen = study(place, "small", budget={"unit": "tokens", "amount": 1, "pilot": 2})
    with pytest.raises(ConfigError, match=r"arm plain: a step costs .* tokens, and the budget has 1; give it more"):
        settle(chosen, "plain")


REFINED = {"unit": "tokens", "amount": 300, "pilot": 2, "refined": True}


def longer_later(run: Any) -> list[dict[str, Any]]:
    """The log of a run whose responses grow: 20 tokens in the pilot, 30 on average in a run of 15 steps, 40 in one of
    another seed."""
    mean = 20.0 if "pilot" in run.name else 30.0 if run.stages[-1].steps == 15 else 40.0
    return [{"kind": "train", "stage": "minillm", "tokens": mean} for _ in range(run.stages[-1].steps)]


def course(seconds: Sequence[float], validated: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The log of a run whose steps ended at these seconds, with validations after some of them."""
    lines: list[dict[str, Any]] = []
    for step, end in enumerate(seconds, start=1):
        lines.append({"kind": "train", "step": step, "seconds": end, "tokens": 1})
        lines += [{"kind": "validation", "step": step, "seconds": end + 38.0}] if step in validated else []
    return lines


@pytest.mark.parametrize("search", [None, {"values": [1e-3, 2e-3], "metric": "rouge_l"}])
def test_a_whole_run_corrects_what_the_pilot_told(place: Path, search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def noted(run: Any, **options: Any) -> dict[str, Any]:
        made.append(run.name.rpartition("/")[2])
        better = {"rouge_l": float(run.stages[0].optimiser.lr == 2e-3)}
        return {"state": "done", "reason": None, "temperatures": {"1.0": better}}

    monkeypatch.setattr(tuning, "make", noted)
    monkeypatch.setattr(budget, "make", noted)
    for module in (tuning, budget):
        monkeypatch.setattr(module, "course_of", longer_later)
    prompts = str(place / "prompts.jsonl")
    settings = {"settings": {"data.validation": prompts}, "arms": {"plain": {"stages.0.inner_epochs": 2}}}
    chosen = study(place, f"refined-{search is None}", budget=REFINED, search=search, **(settings if search else {}))
    found = settle(chosen, "plain")
    assert found["pilot"] == {"steps": 2, "tokens_per_step": 20.0, "settings": {"stages.0.steps": 15}}
    assert found["refined"] == {"steps": 15, "tokens_per_step": 30.0, "settings": {"stages.0.steps": 10}}
    assert found["settings"]["stages.0.steps"] == 10
    assert made == (["pilot", "try_0", "try_1"] if search else ["pilot", "whole"]), "a try is a whole run"
    assert untuned(chosen, ["plain"]) == {}
    coarse = chosen.model_copy(update={"budget": chosen.budget.model_copy(update={"refined": False})})  # type: ignore[union-attr]
    assert untuned(coarse, ["plain"]) == {"plain": ["budget or search"]}
    assert settle(coarse, "plain")["settings"]["stages.0.steps"] == 15, "the control: the pilot alone"


def made_but(reasons: dict[str, str]) -> Any:
    """Runs that are done at once, but for those whose name ends so."""
    return lambda run, **options: {"reason": reasons.get(run.name.rpartition("/")[2])}


@pytest.mark.parametrize("name, steps", [("pilot", 2), ("whole", 15)])
def test_a_run_that_fails_is_told(place: Path, name: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = study(place, f"breaks-{name}", budget=REFINED)
    monkeypatch.setattr(budget, "course_of", longer_later)
    monkeypatch.setattr(budget, "make", made_but({name: "NonFinite: a loss"}))
    told = {"pilot": "pilot", "whole": "whole run"}[name]
    with pytest.raises(ConfigError, match=f"arm plain: its {told} of {steps} steps failed: NonFinite: a loss"):
        settle(chosen, "plain")


def test_a_pilot_wants_all_its_steps_and_a_whole_run_may_stop_early(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "make", made_but({}))
    monkeypatch.setattr(budget, "course_of", lambda run: longer_later(run)[: 2 if "pilot" in run.name else 4])
    found = settle(study(place, "early", budget=REFINED), "plain")
    assert found["settings"]["stages.0.steps"] == 10, "30 tokens a step in the first four"
    monkeypatch.setattr(budget, "course_of", lambda run: longer_later(run)[:1])
    with pytest.raises(ConfigError, match="arm plain: its pilot of 2 steps failed: 1 steps were made"):
        settle(study(place, "shorter", budget=REFINED), "plain")


def test_validations_are_no_seconds_of_a_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole run as in a pilot; where every step has one, what the pilot said stays."""
    seconds = {"unit": "seconds", "amount": 10, "pilot": 3, "refined": True}
    monkeypatch.setattr(budget, "make", made_but({}))
    pilot = course((50.0, 50.5, 51.0))
    for name, whole, steps in (
        ("some", course((60.0, 61.0, 62.0, 102.0, 103.0), validated=(3,)), 10),
        ("all", course((60.0, 161.0, 262.0), validated=(1, 2, 3)), 20),
        ("one", course((60.0,)), 20),
    ):
        monkeypatch.setattr(budget, "course_of", lambda run, whole=whole: pilot if "pilot" in run.name else whole)
        found = settle(study(place, f"watched-{name}", budget=seconds), "plain")
        assert found["settings"]["stages.0.steps"] == steps, name


def test_the_question_of_studies_without_it_stays(place: Path) -> None:
    chosen = study(place, "older", budget={"unit": "updates", "amount": 7})
    assert settle(chosen, "plain")["asked"]["budget"] == {"unit": "updates", "amount": 7.0, "pilot": 8}


@pytest.fixture(scope="module")
def searched(place: Path) -> StudyConfig:
    prompts = str(place / "prompts.jsonl")
    settings = {"data.validation": prompts, "data.validation_limit": 6, "stages.0.steps": 3}
    return study(
        place, "searched", settings=settings, arms={"plain": {}, "twice": ARMS["twice"]},
        search={"values": [1e-8, 3e-2, WILD], "metric": "reverse_kl"},
    )  # fmt: skip


def test_a_search_takes_the_value_that_is_best_on_validation(searched: StudyConfig) -> None:
    found = settle(searched, "plain")
    assert [each["value"] for each in found["tries"]] == [1e-8, 3e-2, WILD]
    idle, good, wild = (each["reverse_kl"] for each in found["tries"])
    assert wild is None and found["tries"][2]["reason"]
    assert good < idle
    assert found["settings"] == {"stages.0.optimiser.lr": 3e-2}
    assert searched.cell_config("plain", 1).stages[0].optimiser.lr == 3e-2
    assert searched.cell_config("twice", 1).stages[0].optimiser.lr == 1e-2  # not tuned yet: the recipe's


def test_cells_are_made_with_what_was_found_and_nothing_twice(searched: StudyConfig) -> None:
    make(searched)
    cells, notes = read_cells(searched)
    assert not notes
    assert all(cell["config"]["stages"][0]["optimiser"]["lr"] == 3e-2 for of in cells.values() for cell in of.values())
    again = make(searched)
    assert not any("tuned" in line for line in again)
    assert again[-1].endswith("0 cells to make, 2 there already")


def test_another_question_is_tuned_anew_and_told(place: Path, searched: StudyConfig) -> None:
    make(searched)
    other = searched.model_copy(
        update={"search": searched.search.model_copy(update={"values": (1e-8, 2e-2)})}  # type: ignore[union-attr]
    )
    assert untuned(other, ["plain"]) == {"plain": ["budget or search"]}
    assert untuned(searched, ["plain"]) == {}
    changed = searched.model_copy(update={"settings": {**searched.settings, "stages.0.steps": 4}})
    assert untuned(changed, ["plain"]) == {"plain": ["stages.0.steps"]}
    _, notes = read_cells(other)
    assert any("out of date, since it differs in budget or search" in note for note in notes)


def test_more_values_cost_only_those_that_are_new(searched: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = settle(searched, "twice")
    tried: list[float] = []
    plain = tuning.make

    def noted(run: Any, **options: Any) -> Any:
        tried.append(run.stages[0].optimiser.lr)
        return plain(run, **options)

    monkeypatch.setattr(tuning, "make", noted)
    wider = searched.model_copy(
        update={"search": searched.search.model_copy(update={"values": (1e-8, 1e-3, 3e-2, WILD)})}  # type: ignore[union-attr]
    )
    after = settle(wider, "twice")
    assert tried == [1e-3]
    assert [each for each in after["tries"] if each["value"] != 1e-3] == before["tries"]
    # Another measure is another question.
    other = wider.model_copy(update={"search": wider.search.model_copy(update={"metric": "rouge_l"})})  # type: ignore[union-attr]
    settle(other, "twice")
    assert tried == [1e-3, 1e-8, 1e-3, 3e-2, WILD]
    settle(searched, "twice")


def test_if_every_value_fails_the_arm_is_named(place: Path) -> None:
    prompts = str(place / "prompts.jsonl")
    chosen = study(
        place, "wild", settings={"data.validation": prompts, "data.validation_limit": 4, "stages.0.inner_epochs": 2},
        arms={"plain": {}}, search={"values": [WILD, 10 * WILD]},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"arm plain: every value of stages\.0\.optimiser\.lr failed: NonFinite"):
        settle(chosen, "plain")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"search": {"values": [1e-3]}}, "values: got .0.001., wanted at least two"),
        ({"search": {"values": [1e-3, 2e-3], "metric": "mean_length"}}, "wanted a measure of text with a better side"),
        ({"search": {"values": [1e-3, 2e-3], "seed": 1}}, "search.seed 1 is one of the study's"),
        ({"search": {"values": [1e-3, 2e-3], "setting": "stages.0.lrr"}}, "stages.0.lrr: no setting of this name"),
        ({"search": {"values": [1e-3, 2e-3]}}, "has no data.validation; a search needs prompts to judge by"),
        ({"budget": {"unit": "epochs", "amount": 1}}, "budget.unit: got 'epochs'"),
        (
            {"settings": {"stages.0.steps": 90}},
            "arms.supervised: its 'stages' stand in the place of the recipe's, and of settings.stages.0.steps",
        ),
        (
            {"budget": {"unit": "updates", "amount": 5, "refined": True}},
            "refined: updates a step are known",
        ),
        (
            {"budget": {"unit": "updates", "amount": 5, "pilot": 1}},
            "pilot: got 1, wanted a number of at least 2",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(place: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        study(place, "wrong", **changes)


def test_a_file_that_is_no_tuning_is_told(place: Path) -> None:
    chosen = study(place, "broken", budget={"unit": "updates", "amount": 5})
    chosen.tuning_file("plain").parent.mkdir(parents=True)
    for text in ("{", "[]", "{}"):
        chosen.tuning_file("plain").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="move it away"):
            untuned(chosen, ["plain"])


def test_an_arm_may_learn_from_what_the_studys_teacher_wrote(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    text = "runs/studies/taught/taught.jsonl"
    supervised = {"kind": "seqkd", "steps": 2, "batch": 2, "optimiser": {"lr": 1e-2}}
    arms: dict[str, dict[str, Any]] = {"plain": {}, "seqkd": {"data.teacher_text": text, "stages": [supervised]}}
    chosen = study(place, "taught", arms=arms, taught={"rows": 20, "samples": 2})
    make(chosen)
    cells, notes = read_cells(chosen)
    assert not notes
    stored = cells["seqkd"][1]
    assert stored["state"] == "done"
    assert "teacher_text data" in stored["made_from"] and "teacher_text data" not in cells["plain"][1]["made_from"]
    assert read_generated(text).asked.samples == 2
    # Known before it is written: the table needs no text. More of it is other text.
    Path(text).unlink()
    assert not read_cells(chosen)[1]
    more = chosen.model_copy(update={"taught": chosen.taught.model_copy(update={"rows": 21})})  # type: ignore[union-attr]
    assert any("differs in teacher_text data" in note for note in read_cells(more)[1])


def test_text_of_the_teacher_may_be_a_setting_of_all_arms(place: Path) -> None:
    chosen = study(
        place, "everyones", arms={"plain": {}}, taught={"rows": 5},
        settings={"data.teacher_text": "runs/studies/everyones/taught.jsonl"},
    )  # fmt: skip
    assert chosen.learns_from_taught("plain")
    other = chosen.model_copy(update={"settings": {"data.teacher_text": "another.jsonl"}})
    assert not other.learns_from_taught("plain"), "the control: a file of somebody else's"


PAIRS = {"kind": "preference", "steps": 2, "batch": 2, "optimiser": {"lr": 1e-2}}


def test_an_arm_may_learn_from_pairs_of_the_student_that_it_starts_from(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    name = "runs/studies/pairs/pairs.jsonl"
    arms: dict[str, dict[str, Any]] = {"plain": {}, "dpo": {"data.preferences": name, "stages": [PAIRS]}}
    settings = {"decoding.max_new_tokens": 30}
    chosen = study(
        place,
        "pairs",
        arms=arms,
        paired={"rows": 20},
        settings=settings,
        seeds=[1, 2],
        student=str(place / "tune.yaml"),
    )
    make(chosen)
    cells, notes = read_cells(chosen)
    assert not notes and cells["dpo"][1]["state"] == "done"
    made_from = [cells["dpo"][seed]["made_from"] for seed in (1, 2)]
    assert "preferences data" not in cells["plain"][1]["made_from"]
    assert made_from[0]["preferences data"] != made_from[1]["preferences data"], "each student has pairs of its own"
    files = [read_pair_manifest(Path(f"runs/studies/pairs/pairs/{seed}.jsonl")) for seed in (1, 2)]
    assert files[0] is not None and files[1] is not None and files[0].rejected.weights != files[1].rejected.weights
    assert chosen.cell_config("dpo", 2).data.preferences == "runs/studies/pairs/pairs/2.jsonl"
    more = chosen.model_copy(update={"paired": chosen.paired.model_copy(update={"rows": 21})})  # type: ignore[union-attr]
    assert any("differs in preferences data" in note for note in read_cells(more)[1])
    one = chosen.model_copy(update={"student_seed": 5})
    assert {one.paired_file(seed) for seed in (1, 2)} == {"runs/studies/pairs/pairs/5.jsonl"}
    foreign = chosen.model_copy(update={"arms": {"dpo": {"data.preferences": "mine.jsonl"}}})
    assert not foreign.learns_from_paired("dpo"), "the control: a file of somebody else's"

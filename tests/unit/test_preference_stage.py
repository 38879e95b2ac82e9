"""Settings of a stage that learns from pairs: what may stand together, what is refused, and what is told to be idle."""

from __future__ import annotations

from typing import Any

import pytest

from minillm.alarm_config import AlarmsConfig, PreferenceAlarmsConfig
from minillm.alarms import OF_PAIRS, WINDOW, Alarms
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.preference_stage import PreferenceStage
from minillm.stage_base import BETTER, KeepConfig
from minillm.study.config import SearchConfig
from minillm.text_stages import SftStage

OPTIMISER = {"lr": 1e-3}


def stage(**changes: Any) -> PreferenceStage:
    return PreferenceStage(**{"steps": 2, "batch": 4, "optimiser": OPTIMISER, **changes})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 0.3}, "alpha 0.3 with value 'dpo', which has none"),
        ({"alpha": 0.3, "value": "tdpo1"}, "with value 'tdpo1'"),
        ({"link": "ipo", "value": "tdpo2"}, "IPO is of means over tokens"),
        ({"link": "ipo", "value": "tdpo1"}, "set value: dpo"),
        ({"link": "robust", "label_noise": 0.1, "target": "soft"}, "target 'soft' with link 'robust'"),
        ({"link": "hinge", "target": "smoothed", "label_noise": 0.1}, "target 'smoothed' with link 'hinge'"),
        ({"link": "ipo", "target": "soft"}, "target 'soft' with link 'ipo'"),
        ({"label_noise": 0.1}, "label_noise 0.1 with link 'sigmoid' and target 'null'"),
        ({"label_noise": 0.1, "target": "soft"}, "set both or neither"),
        ({"target": "smoothed"}, "label_noise 0 with link 'sigmoid' and target 'smoothed'"),
        ({"link": "robust"}, "label_noise 0 with link 'robust'"),
        ({"patience": 2}, "patience 2 with validate_every 0"),
        (
            {"alarms": {"chosen_floor": {"action": "rollback"}}},
            r"alarms\.chosen_floor\.action 'rollback' with validate",
        ),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedCombination, match=words):
        stage(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label_noise": 0.5, "target": "smoothed"}, r"wanted below 0\.5"),
        ({"label_noise": 0.6, "link": "robust"}, r"wanted below 0\.5"),
        ({"sources": ()}, "wanted at least one name"),
        ({"sources": ("a", "a")}, "and each once"),
        ({"beta": 0.0}, "beta"),
        ({"value": "tdpo"}, "wanted 'dpo', 'tdpo1' or 'tdpo2'"),
        ({"keep": {"metric": "reverse_kl"}}, "does not measure 'reverse_kl'"),
    ],
)
def test_values_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stage(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value": "tdpo2", "alpha": 0.3, "target": "soft"},
        {"value": "tdpo1", "link": "hinge"},
        {"link": "robust", "label_noise": 0.1},
        {"link": "robust", "label_noise": 0.1, "target": "hard"},
        {"target": "smoothed", "label_noise": 0.2},
        {"link": "ipo", "sft_weight": 1.0, "sequential_kl": True},
        {"sources": ("a", "b")},
        {"alarms": {"chosen_floor": {"action": "rollback"}}, "validate_every": 1},
        {"alarms": {"chosen_floor": None}},
    ],
)
def test_what_may_stand_together_does_and_comes_back_from_its_dump(settings: dict[str, Any]) -> None:
    made = stage(**settings)
    assert PreferenceStage(**made.model_dump()) == made
    assert made.idle_settings(tempered=False) == {}


def test_settings_that_change_nothing_are_told() -> None:
    said = stage(value="tdpo2", sequential_kl=True, alpha=0.0).idle_settings(tempered=False)
    assert said == {
        "value tdpo2 measures them": ["sequential_kl"], "alpha 0: the stage trains as value dpo does": ["value"],
    }  # fmt: skip
    assert stage(keep={"metric": "rouge_l", "mode": "max"}).idle_settings(tempered=False) == {
        "validate_every 0": ["keep"]
    }


@pytest.mark.parametrize("value", ["dpo", "tdpo1", "tdpo2"])
def test_the_reference_stays_where_it_is_asked_in_every_step(value: str) -> None:
    assert stage(value=value).keeps_reference == (value != "dpo")
    assert stage(value=value, sequential_kl=True).keeps_reference


def test_nothing_is_dropped_out_and_nothing_is_drawn_for_measures_of_pairs() -> None:
    made = stage(validate_every=1)
    assert not made.drops_out and not made.on_policy and not made.samples_to_validate
    assert SftStage(steps=1, batch=1, optimiser=OPTIMISER).drops_out  # the control
    assert stage(validate_every=1, keep={"metric": "rouge_l", "mode": "max"}).samples_to_validate


def test_measures_of_pairs_decide_for_stages_of_pairs_only() -> None:
    for metric in (name for name in BETTER if name.startswith("preference_")):
        keep = KeepConfig(metric=metric, mode=BETTER[metric] or "max")
        assert stage(validate_every=1, keep=keep).keep == keep
        with pytest.raises(ConfigError, match="does not measure"):
            SftStage(steps=1, batch=1, optimiser=OPTIMISER, validate_every=1, keep=keep)
    with pytest.raises(UnsupportedCombination, match="would keep the worst weights"):
        stage(keep={"metric": "preference_loss", "mode": "max"})


def test_the_alarm_rings_below_its_floor_and_only_there() -> None:
    assert set(OF_PAIRS) == set(PreferenceAlarmsConfig.model_fields)
    for value, rings in ((-9.9, False), (-10.1, True), (10.1, False)):
        alarms = Alarms(PreferenceAlarmsConfig())
        raised = [one for _ in range(WINDOW) for one in alarms.hear({"chosen_log_ratio": value})]
        assert [one.name for one in raised] == (["chosen_floor"] if rings else [])
        assert all("over 5 steps, below -10" in one.words for one in raised)
    off = Alarms(PreferenceAlarmsConfig(chosen_floor=None))
    assert not [one for _ in range(WINDOW) for one in off.hear({"chosen_log_ratio": -99.0})]
    other = Alarms(AlarmsConfig())  # a stage that samples has no such alarm
    assert not [one for _ in range(WINDOW) for one in other.hear({"chosen_log_ratio": -99.0})]


@pytest.mark.parametrize("metric", ["preference_loss", "preference_accuracy", "loss"])
def test_a_study_does_not_tune_by_a_measure_that_no_text_has(metric: str) -> None:
    with pytest.raises(ConfigError, match="wanted a measure of text with a better side: reverse_kl"):
        SearchConfig(values=(0.1, 0.2), metric=metric)
    assert SearchConfig(values=(0.1, 0.2), metric="rouge_l").metric == "rouge_l"  # the control

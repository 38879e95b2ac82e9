"""Promises: at equal diversity an arm is held against the other of the same seed, at the temperature at which that one
is as varied; nothing is extrapolated, and what is left out is counted."""

from __future__ import annotations

from typing import Any

import pytest

from minillm.errors import ConfigError
from minillm.study import diversity
from minillm.study.diversity import Place, at_equal_diversity, find, left_out, require_diversity
from tests.study_cells import cell

BASE = {
    "1.0": {"distinct_4": 0.50, "validity": 0.60, "self_bleu": 0.8},
    "0.8": {"distinct_4": 0.46, "validity": 0.68, "self_bleu": 0.83},
    "0.4": {"distinct_4": 0.40, "validity": 0.70, "self_bleu": 0.9},
}
"""Half way from 1 to 0.8, distinct-4 is 0.48 and validity 0.64."""


def shifted(by: float) -> dict[str, dict[str, float]]:
    return {key: {**of, "validity": of["validity"] + by} for key, of in BASE.items()}


def compared(arm: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]], over: str = "distinct_4") -> Any:
    made = {"base": {s: cell(of) for s, of in base.items()}, "arm": {s: cell(of) for s, of in arm.items()}}
    return at_equal_diversity(made, compare_with="base", temperature="1.0", measures=["validity"], diversity=over)


def test_by_hand() -> None:
    """Seed 1: distinct-4 0.48 is half way to 0.8, where the base has 0.64. Seed 2: 0.41 is at 0.4 + 0.4 / 6 = 0.4667,
    and 0.70 - 0.02 / 6 = 0.69667. So +0.06 and +0.10333."""
    arm = {1: {"1.0": {"distinct_4": 0.48, "validity": 0.70}}, 2: {"1.0": {"distinct_4": 0.41, "validity": 0.80}}}
    found = compared(arm, {1: BASE, 2: BASE})["arms"]["arm"]
    assert found["temperatures"] == pytest.approx({1: 0.9, 2: 0.4 + 0.4 / 6})
    assert found["differences"]["validity"]["mean"] == pytest.approx((0.06 + 0.80 - 0.70 + 0.02 / 6) / 2)
    assert found["differences"]["validity"]["seeds"] == 2 and found["left_out"] == {}
    assert found["mean_temperature"] == pytest.approx((0.9 + 0.4 + 0.4 / 6) / 2)


SHARPER = {1: {"1.0": BASE["0.8"]}, 2: {"1.0": shifted(0.1)["0.8"]}}
"""What the base is at 0.8, at temperature 1: a model that is sharper, and no better."""


def test_a_model_that_is_only_sharper_gains_nothing() -> None:
    found = compared(SHARPER, {1: BASE, 2: shifted(0.1)})["arms"]["arm"]
    assert found["differences"]["validity"]["mean"] == pytest.approx(0)
    assert found["differences"]["validity"]["ci95"] == pytest.approx([0, 0])


def test_control_at_equal_temperature_it_would_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a search that always finds the headline temperature."""
    monkeypatch.setattr(diversity, "find", lambda curve, wanted, near: Place(left="0.8", right="1.0", share=1.0))
    found = compared(SHARPER, {1: BASE, 2: shifted(0.1)})["arms"]["arm"]
    assert found["differences"]["validity"]["mean"] == pytest.approx(0.08)


def test_control_each_seed_is_held_against_its_own() -> None:
    """Against the other's seed, the arm that equals the base would not."""
    equal = compared({1: BASE, 2: shifted(0.1)}, {1: BASE, 2: shifted(0.1)})["arms"]["arm"]
    crossed = compared({1: BASE, 2: shifted(0.1)}, {1: shifted(0.1), 2: BASE})["arms"]["arm"]
    assert equal["differences"]["validity"]["ci95"] == [0, 0]
    assert crossed["differences"]["validity"]["ci95"][1] > 1


def test_nothing_is_extrapolated_and_what_is_left_out_is_counted() -> None:
    beyond = {"1.0": {"distinct_4": 0.51, "validity": 0.9}}
    below = {"1.0": {"distinct_4": 0.39, "validity": 0.9}}
    edge = {"1.0": {"distinct_4": 0.40, "validity": 0.75}}
    none = {"1.0": {"validity": 0.9}}
    found = compared({1: beyond, 2: below, 3: edge, 4: none, 5: edge}, dict.fromkeys((1, 2, 3, 4), BASE))
    own = found["arms"]["arm"]
    assert list(own["left_out"]) == [1, 2, 4, 5] and own["temperatures"] == {3: 0.4}
    assert own["differences"]["validity"] == {"mean": pytest.approx(0.05), "ci95": None, "p": None, "seeds": 1}
    (line,) = left_out(found, compare_with="base")
    assert line.startswith("arm, at equal distinct-4 with base: 4 of 5 seeds left out (seed 1: the other has less at")
    assert "seed 2: the other has more" in line and "seed 5: no cell to compare" in line


def test_one_temperature_has_no_curve() -> None:
    found = compared({1: {"1.0": BASE["1.0"]}}, {1: {"1.0": BASE["1.0"]}})
    assert found["arms"] == {} and left_out(found, compare_with="base") == []


def test_another_measure_of_variety_may_fall_with_temperature() -> None:
    """Self-BLEU 0.815 is half way, too."""
    found = compared({1: {"1.0": {"self_bleu": 0.815, "validity": 0.7}}}, {1: BASE}, over="self_bleu")
    assert found["arms"]["arm"]["temperatures"] == pytest.approx({1: 0.9})


def test_a_line_that_has_it_twice_gives_the_nearest_place() -> None:
    bent = {"1.0": 0.4, "0.8": 0.6, "0.6": 0.4, "0.4": 0.4}
    place = find(bent, 0.5, near=1.0)
    assert isinstance(place, Place) and place.temperature == pytest.approx(0.9)
    place = find(bent, 0.4, near=0.5)  # a level stretch: at one of its ends
    assert isinstance(place, Place) and place.temperature in (0.4, 0.6)


def test_failed_cells_have_no_part() -> None:
    made = {"base": {1: cell(BASE), 2: cell({}, state="failed")}, "arm": {1: cell({}, state="failed"), 2: cell(BASE)}}
    made["gone"] = {1: cell({}, state="failed")}
    found = at_equal_diversity(
        made, compare_with="base", temperature="1.0", measures=["validity"], diversity="distinct_4"
    )
    assert list(found["arms"]) == ["arm"] and found["arms"]["arm"]["left_out"] == {2: "no cell to compare"}


def test_a_measure_that_says_nothing_of_variety_is_told() -> None:
    require_diversity("self_bleu")
    with pytest.raises(ConfigError, match=r"--diversity: got 'distinct4', .*did you mean 'distinct_4'"):
        require_diversity("distinct4")
    with pytest.raises(ConfigError, match="wanted one of distinct_4, distinct_1"):
        require_diversity("validity")

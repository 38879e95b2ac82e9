"""Promises: intervals and probabilities over seeds are Student's t; Holm's correction is over all arms and main
measures; and a study says what is best, and what it cannot tell."""

from __future__ import annotations

import math
from typing import Any

import pytest

from minillm.study import verdict
from minillm.study.paired import LEVEL, excludes_zero, paired, stars, t_probability, t_reach
from minillm.study.table import difference_rows, summary
from minillm.study.verdict import correct, sentences, standings
from tests.study_cells import cells, study

TIMES = (0.0, 0.01, 0.7, 2.5, 12.7, 400.0)


@pytest.mark.parametrize("t", TIMES)
def test_the_distribution_has_its_closed_forms(t: float) -> None:
    """With one degree of freedom it is Cauchy's; with two its probability is a root."""
    assert t_probability(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-12, abs=1e-15)
    assert t_probability(t, 2) == pytest.approx(1 - t / math.sqrt(t * t + 2), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 14, 15, 29, 500])
def test_the_interval_is_left_by_one_case_of_twenty(freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")  # scikit-learn brings it along
    assert t_probability(t_reach(freedom), freedom) == pytest.approx(LEVEL, rel=1e-10)
    assert t_reach(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)
    assert t_probability(2.5, freedom) == pytest.approx(2 * stats.t.sf(2.5, freedom), rel=1e-10)


def test_an_interval_and_a_probability_by_hand() -> None:
    """1, 2, 3 has mean 2 and standard deviation 1, so t = 2 · sqrt(3), and p = 1 - t / sqrt(t² + 2)."""
    found = paired([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert found["mean"] == 2 and found["seeds"] == 3
    assert found["p"] == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert found["ci95"] == pytest.approx([2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)], rel=1e-6)
    assert paired([1.0])["p"] is None and paired([])["p"] is None


def test_equal_differences_have_no_spread() -> None:
    assert paired([0.5, 0.5])["ci95"] == [0.5, 0.5] and paired([0.5, 0.5])["p"] == 0
    assert paired([0.0, 0.0])["ci95"] == [0, 0] and paired([0.0, 0.0])["p"] == 1


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 1.2, 1.3, 2.0, 5.0])
@pytest.mark.parametrize("seeds", [2, 3, 20, 40])
def test_an_interval_excludes_zero_just_where_its_probability_is_small(shift: float, seeds: int) -> None:
    found = paired([shift * (1 + n % 3) - n % 2 for n in range(seeds)])
    assert excludes_zero(found) == (found["p"] < LEVEL)


def three(shift: float, *, spread: float, better: float = 0.0) -> dict[int, dict[str, float]]:
    """Three seeds that are ``shift`` from the base's, some more, some less."""
    return {
        seed: {"validity": 0.5 + 0.01 * seed + shift + spread * (seed - 2), "rouge_l": 0.7 + better * (1 + 0.1 * seed)}
        for seed in (1, 2, 3)
    }


@pytest.fixture
def four() -> dict[str, dict[int, Any]]:
    """A base, an arm surely better, one that looks better, and one that is noise."""
    own = {"base": three(0, spread=0), "sure": three(0.2, spread=0.002), "looks": three(0.02, spread=0.006)}
    return cells({**own, "noise": three(0.01, spread=0.4)})


def judged(made: dict[str, dict[int, Any]], *measures: str, compare_with: str = "base") -> dict[str, Any]:
    found = summary(study(list(made), compare_with=compare_with, seeds=(1, 2, 3)), made)
    correct(found, temperature="1.0", measures=measures)
    found["best"] = standings(made, temperature="1.0", measures=measures)
    return found


def change(found: dict[str, Any], arm: str, name: str = "validity") -> dict[str, Any]:
    return dict(found["arms"][arm]["temperatures"]["1.0"][name]["difference"])


def test_the_family_is_all_arms_in_all_main_measures(four: dict[str, dict[int, Any]]) -> None:
    """By hand: the least p of one measure is times 3, with a second measure of three differences at p = 1 times 6."""
    alone, both = judged(four, "validity"), judged(four, "validity", "rouge_l")
    p = sorted(change(alone, arm)["p"] for arm in ("sure", "looks", "noise"))
    assert [change(alone, arm)["p_holm"] for arm in ("sure", "looks")] == pytest.approx([3 * p[0], 2 * p[1]])
    assert [change(both, arm)["p_holm"] for arm in ("sure", "looks")] == pytest.approx([6 * p[0], 5 * p[1]])
    assert alone["corrected"]["differences"] == 3 and both["corrected"]["differences"] == 6
    assert "p_holm" not in change(alone, "base") and "p_holm" not in change(alone, "sure", "rouge_l")


def test_two_stars_are_for_what_stands_after_the_correction(four: dict[str, dict[int, Any]]) -> None:
    found = judged(four, "validity", "rouge_l")
    assert [stars(change(found, arm)) for arm in ("sure", "looks", "noise")] == ["**", "*", ""]
    shown = {row[0]: row[1] for row in difference_rows(found, "validity")}
    assert "+0.200**" in shown["sure"] and "+0.020*\n" in shown["looks"] and "*" not in shown["noise"]


def test_control_without_the_correction_what_looks_better_would_stand(
    four: dict[str, dict[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "holm", list)
    assert stars(change(judged(four, "validity", "rouge_l"), "looks")) == "**"


def test_the_best_and_what_cannot_be_told_from_it(four: dict[str, dict[int, Any]]) -> None:
    best = judged(four, "validity", "rouge_l")["best"]["validity"]
    assert best["arm"] == "sure" and best["mean"] == pytest.approx(0.72)
    less = {arm: (round(of["mean"], 9), of["state"]) for arm, of in best["less"].items()}
    assert less == {"base": (0.2, "behind"), "looks": (0.18, "behind"), "noise": (0.19, "within")}


def test_less_is_better_where_it_is(four: dict[str, dict[int, Any]]) -> None:
    made = cells(
        {arm: {seed: {"reverse_kl": shift + 0.1 * seed} for seed in (1, 2)} for arm, shift in (("a", 2), ("b", 1))}
    )
    best = standings(made, temperature="1.0", measures=["reverse_kl", "mean_length"])
    assert list(best) == ["reverse_kl"]  # of a length nobody says which is better
    assert best["reverse_kl"]["arm"] == "b" and best["reverse_kl"]["less"]["a"]["state"] == "behind"


def test_an_arm_with_fewer_seeds_is_not_the_best_but_may_be_ahead() -> None:
    full = {seed: {"validity": 0.5 + 0.001 * seed} for seed in (1, 2, 3)}
    made = cells(
        {
            "full": full,
            "one": {1: {"validity": 0.9}},
            "two": {seed: {"validity": 0.7 + 0.0011 * seed} for seed in (1, 2)},
        }
    )
    made["failed"] = {}
    best = standings(made, temperature="1.0", measures=["validity"])["validity"]
    assert best["arm"] == "full" and best["fewer_seeds"] == ["one", "two"]
    assert {arm: of["state"] for arm, of in best["less"].items()} == {"one": "unknown", "two": "ahead"}
    assert standings({"full": made["full"]}, temperature="1.0", measures=["validity"]) == {}


def test_the_words_say_what_stands_and_what_cannot_be_told(four: dict[str, dict[int, Any]]) -> None:
    parts = dict(sentences(judged(four, "validity", "rouge_l")))
    said = parts["validity"]
    assert said[0] == "sure has the best mean, 0.720; sure less the others, by seed:"
    assert said[1].startswith("told from it: base +0.200 (") and "looks +0.180" in said[1]
    assert said[2].startswith("within its interval, so the data cannot tell: noise +0.190 (")
    assert said[3] == (
        "against base: better, also after correction: sure; better by its own interval, not after correction: looks; "
        "the data cannot tell: noise."
    )
    assert "told from it: none." in parts["ROUGE-L"]
    assert "over 6 differences" in parts["How to read this"][1]
    assert sentences({"best": {}}) == []

"""Promises: ECE and the reliability curve have their known values and another library's; prompts are resampled."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from minillm.calibration import Answers, bin_of, calibration, chosen
from minillm.errors import NonFinite, ShapeMismatch
from minillm.statistics import Array


def answers(confidence: Any, correct: Any, prompts: Any = None) -> Answers:
    of = np.zeros(len(confidence), dtype=np.int64) if prompts is None else np.array(prompts, dtype=np.int64)
    return Answers(
        confidence_K=np.array(confidence, dtype=np.float64), correct_K=np.array(correct, dtype=bool), prompt_K=of
    )


def measured(given: Answers, **changed: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"prompts": 1 + int(given.prompt_K.max()), "resamples": 50, "seed": 0} | changed
    return calibration(given, **settings)


def noisy(answers_: int = 400, prompts: int = 40, *, seed: int = 0, skill: float = 0.8) -> Answers:
    noise = np.random.default_rng(seed)
    confidence = noise.random(answers_)
    return answers(confidence, noise.random(answers_) < skill * confidence, noise.integers(prompts, size=answers_))


def test_golden_value() -> None:
    given = answers([0.9, 0.8, 0.6, 0.55], [1, 0, 1, 0])
    found = measured(given, bins=10)
    assert found["ece"] == pytest.approx(0.2625)
    assert [(b["low"], b["answers"], b["accuracy"]) for b in found["curve"]] == [
        (0.5, 2, 0.5),
        (0.7, 1, 0.0),
        (0.8, 1, 1.0),
    ]
    assert found["accuracy"] == 0.5 and found["confidence"] == pytest.approx(0.7125)
    # The control: bins that are open on their right put .8 and .9, or .6, elsewhere.
    left_K = np.floor(given.confidence_K * 10).astype(int)
    assert by_loop(given, left_K) == pytest.approx(0.4625)
    json.dumps(found, allow_nan=False)


def by_loop(given: Answers, bin_K: Any) -> float:
    total = 0.0
    for m in set(bin_K.tolist()):
        here = bin_K == m
        total += here.sum() * abs(given.correct_K[here].mean() - given.confidence_K[here].mean())
    return float(total / len(bin_K))


def test_edges_belong_to_the_bin_below() -> None:
    edges = np.linspace(0, 1, 5)
    assert bin_of(edges, bins=4).tolist() == [0, 0, 1, 2, 3]
    assert bin_of(np.nextafter(edges[:-1], 1), bins=4).tolist() == [0, 1, 2, 3]


def test_a_model_that_is_as_right_as_it_is_sure_has_none() -> None:
    assert measured(answers([1.0, 1.0], [1, 1]))["ece"] == 0.0
    assert measured(answers([0.75] * 4, [1, 1, 1, 0]))["ece"] == pytest.approx(0.0)
    assert measured(answers([0.75] * 4, [1, 1, 0, 0]))["ece"] == pytest.approx(0.25)  # the control: one is wrong
    assert measured(answers([1.0, 1.0], [0, 0]))["ece"] == 1.0


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_equals_another_library(bins: int) -> None:
    sklearn = pytest.importorskip("sklearn.calibration")
    given = noisy(seed=bins)
    found = measured(given, bins=bins)
    share, sure = sklearn.calibration_curve(given.correct_K, given.confidence_K, n_bins=bins, strategy="uniform")
    np.testing.assert_allclose([b["accuracy"] for b in found["curve"]], share, atol=1e-12)
    np.testing.assert_allclose([b["confidence"] for b in found["curve"]], sure, atol=1e-12)
    weights = np.array([b["answers"] for b in found["curve"]]) / 400
    assert found["ece"] == pytest.approx(float((weights * abs(share - sure)).sum()), abs=1e-12)
    # The control: bins of equal numbers of answers are other bins.
    other, _ = sklearn.calibration_curve(given.correct_K, given.confidence_K, n_bins=bins, strategy="quantile")
    if bins > 1:
        assert abs(np.sort(other) - np.sort([b["accuracy"] for b in found["curve"]])).max() > 1e-3


def ece_of(given: Answers, rows: list[int], *, bins: int) -> float:
    part = Answers(
        confidence_K=given.confidence_K[rows], correct_K=given.correct_K[rows], prompt_K=given.prompt_K[rows]
    )
    return by_loop(part, bin_of(part.confidence_K, bins=bins))


def bootstrap_by_loop(given: Answers, *, prompts: int, resamples: int, seed: int, bins: int) -> Array:
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(prompts, size=prompts)
        found.append(ece_of(given, [k for n in drawn for k in np.flatnonzero(given.prompt_K == n)], bins=bins))
    return np.array(found)


def test_the_interval_resamples_prompts_with_all_their_answers() -> None:
    noise = np.random.default_rng(9)
    # The answers of a prompt are right or wrong together, as tokens of one response nearly are.
    right_N = noise.random(20) < 0.5
    prompt_K = np.repeat(np.arange(20), 30)
    given = answers(np.full(600, 0.8), right_N[prompt_K], prompt_K)
    found = measured(given, resamples=200, seed=4)
    want = np.percentile(bootstrap_by_loop(given, prompts=20, resamples=200, seed=4, bins=15), (2.5, 97.5))
    np.testing.assert_allclose(found["ci95"], want, atol=1e-12)
    alone = measured(answers(given.confidence_K, given.correct_K, range(600)), resamples=200, seed=4)["ci95"]
    assert found["ci95"][1] - found["ci95"][0] > 3 * (alone[1] - alone[0])  # the control: as if they were independent
    assert found["curve"][0]["ci95"][0] < found["accuracy"] < found["curve"][0]["ci95"][1]


def test_prompts_without_answers_are_counted_and_one_alone_has_no_interval() -> None:
    found = measured(answers([0.9, 0.7], [1, 1], [2, 2]), prompts=5)
    assert (found["prompts"], found["ci95"]) == (1, None)
    assert measured(answers([0.9, 0.7], [1, 1], [2, 3]), prompts=5)["ci95"] is not None
    empty = calibration(answers([], []), prompts=3, resamples=5, seed=0)
    assert (empty["ece"], empty["ci95"], empty["curve"], empty["answers"]) == (None, None, [], 0)


def test_the_order_of_answers_changes_nothing() -> None:
    given = noisy()
    turned = answers(given.confidence_K[::-1], given.correct_K[::-1], given.prompt_K[::-1])
    assert measured(turned)["ece"] == pytest.approx(measured(given)["ece"])
    np.testing.assert_allclose(measured(turned)["ci95"], measured(given)["ci95"], atol=1e-12)


def test_choices_are_weighed_against_each_other() -> None:
    sure, right = chosen([np.log(0.02), np.log(0.06), np.log(0.01)], right=1)
    assert sure == pytest.approx(6 / 9) and right
    assert sure != pytest.approx(0.06)  # the control: not over all that could be said
    assert chosen([np.log(0.02), np.log(0.06)], right=0) == (pytest.approx(0.75), False)
    assert chosen([-5000.0, -5001.0], right=0)[0] == pytest.approx(1 / (1 + np.exp(-1)))
    assert chosen([-1.0, -1.0], right=0) == (0.5, True)


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(NonFinite):
        answers([float("nan")], [1])
    with pytest.raises(AssertionError, match="no probability"):
        answers([1.2], [1])
    with pytest.raises(ShapeMismatch):
        answers([0.5, 0.5], [1])

"""Promises: ratios are means over seeds of sum over sum; intervals resample prompts; differences are paired."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minillm import statistics
from minillm.errors import ConfigError, DataError, NonFinite, ShapeMismatch
from minillm.statistics import Ratio, difference, estimate, mean_over_seeds, per_seed, resample_weights


def ratio(numerator: object, denominator: object | None = None, uids: tuple[str, ...] | None = None) -> Ratio:
    above = np.array(numerator, dtype=np.float64)
    below = np.ones_like(above) if denominator is None else np.array(denominator, dtype=np.float64)
    names = uids or tuple(f"p{n}" for n in range(above.shape[1]))
    return Ratio(uids=names, seeds=tuple(range(above.shape[0])), numerator_SN=above, denominator_SN=below)


def noisy(seed: int, *, seeds: int = 3, prompts: int = 12) -> Ratio:
    noise = np.random.default_rng(seed)
    return ratio(noise.normal(size=(seeds, prompts)), noise.integers(0, 5, size=(seeds, prompts)))


def draws_by_loop(one: Ratio, *, resamples: int, seed: int) -> list[float]:
    """The slow obvious bootstrap: draw prompts, add up, divide within each seed, average the seeds."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(len(one.uids), size=len(one.uids))
        values = []
        for s in range(len(one.seeds)):
            above = sum(one.numerator_SN[s, n] for n in drawn)
            below = sum(one.denominator_SN[s, n] for n in drawn)
            if below > 0:
                values.append(above / below)
        found.append(sum(values) / len(values))
    return found


def test_mean_is_over_seeds_of_sum_over_sum() -> None:
    one = ratio([[1, 2], [3, 0]], [[1, 3], [2, 2]])
    assert per_seed(one).tolist() == [3 / 4, 3 / 4]
    two = ratio([[1, 2], [3, 0]], [[1, 5], [2, 2]])
    assert mean_over_seeds(two) == pytest.approx((3 / 6 + 3 / 4) / 2)
    pooled = two.numerator_SN.sum() / two.denominator_SN.sum()
    assert mean_over_seeds(two) != pytest.approx(pooled)  # a pool of the seeds is another number


def test_bootstrap_equals_the_slow_loop() -> None:
    one = noisy(0)
    low, high = estimate({"m": one}, resamples=200, seed=7)["m"]["ci95"]
    want = np.percentile(draws_by_loop(one, resamples=200, seed=7), (2.5, 97.5))
    np.testing.assert_allclose((low, high), want, rtol=0, atol=1e-12)
    other = np.percentile(draws_by_loop(one, resamples=200, seed=8), (2.5, 97.5))
    assert abs(other - (low, high)).max() > 1e-6  # the loop of another seed does not agree


def test_paired_difference_equals_the_slow_loop() -> None:
    left, right = noisy(1), noisy(2)
    found = difference({"m": left}, {"m": right}, resamples=200, seed=3)["m"]
    pairs = zip(draws_by_loop(left, resamples=200, seed=3), draws_by_loop(right, resamples=200, seed=3), strict=True)
    want = np.percentile([a - b for a, b in pairs], (2.5, 97.5))
    np.testing.assert_allclose(found["ci95"], want, rtol=0, atol=1e-12)
    assert found["mean"] == pytest.approx(mean_over_seeds(left) - mean_over_seeds(right))


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resample_weights(9, resamples=50, seed=1)))
    monkeypatch.setattr(statistics, "WEIGHTS_AT_ONCE", 9 * 7)
    blocks = list(resample_weights(9, resamples=50, seed=1))
    assert len(blocks) == 8
    assert (np.concatenate(blocks) == whole).all()
    assert (whole.sum(axis=1) == 9).all()


def test_same_seed_same_interval_and_another_seed_another() -> None:
    one = {"m": noisy(4)}
    assert estimate(one, resamples=50, seed=1) == estimate(one, resamples=50, seed=1)
    assert estimate(one, resamples=50, seed=1)["m"]["ci95"] != estimate(one, resamples=50, seed=2)["m"]["ci95"]


def test_pairing_narrows_the_interval_of_correlated_models() -> None:
    noise = np.random.default_rng(5)
    hard = noise.normal(size=(1, 60))
    left, right = ratio(hard + 0.1 + 0.05 * noise.normal(size=(2, 60))), ratio(hard + 0.05 * noise.normal(size=(2, 60)))
    low, high = difference({"m": left}, {"m": right}, resamples=1000, seed=0)["m"]["ci95"]
    # The negative control: draws of the two that have nothing to do with each other.
    unpaired = np.array(draws_by_loop(left, resamples=300, seed=1)) - draws_by_loop(right, resamples=300, seed=2)
    wide_low, wide_high = np.percentile(unpaired, (2.5, 97.5))
    assert low > 0
    assert wide_low < 0 < wide_high
    assert (wide_high - wide_low) > 5 * (high - low)


def coverage(*, seeds_inside: bool, trials: int = 200, prompts: int = 40, seeds: int = 5) -> float:
    """Share of 95 % intervals that hold the true mean 0, when responses to one prompt are alike."""
    noise, held = np.random.default_rng(11), 0
    for trial in range(trials):
        value_SN = noise.normal(size=(1, prompts)) + 0.3 * noise.normal(size=(seeds, prompts))
        if not seeds_inside:  # the mistake: every response a prompt of its own
            value_SN = value_SN.reshape(1, -1)
        low, high = estimate({"m": ratio(value_SN)}, resamples=200, seed=trial)["m"]["ci95"]
        held += low <= 0 <= high
    return held / trials


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    assert 0.88 <= coverage(seeds_inside=True) <= 0.99


def test_responses_taken_as_independent_would_cover_far_too_seldom() -> None:
    assert coverage(seeds_inside=False) < 0.75


def test_zero_denominators_are_undefined_not_zero() -> None:
    found = estimate({"m": ratio([[0, 0], [1, 3]], [[0, 0], [2, 2]])}, resamples=20, seed=0)["m"]
    assert found["per_seed"] == [None, 1.0]
    assert found["mean"] == 1.0
    nothing = estimate({"m": ratio([[0, 0]], [[0, 0]])}, resamples=20, seed=0)["m"]
    assert nothing == {"mean": None, "ci95": None, "per_seed": [None], "prompts": 0}
    json.dumps([found, nothing], allow_nan=False)


def test_draws_without_a_denominator_are_counted() -> None:
    two = [[1, 1, 0, 0, 0, 0]]
    found = estimate({"m": ratio(two, two)}, resamples=1000, seed=0)["m"]
    assert found["ci95"] == [1.0, 1.0]
    assert found["prompts"] == 2
    assert 50 < found["undefined_resamples"] < 130  # (4/6)**6 of 1000 is 88


def test_no_interval_from_one_prompt_or_without_resamples() -> None:
    assert estimate({"m": ratio([[1.0], [0.0]])}, resamples=50, seed=0)["m"]["ci95"] is None
    assert estimate({"m": ratio([[1.0, 0.0]])}, resamples=0, seed=0)["m"]["ci95"] is None
    with pytest.raises(ConfigError, match="got -1"):
        estimate({"m": ratio([[1.0, 0.0]])}, resamples=-1, seed=0)


def test_difference_names_the_prompts_that_differ() -> None:
    left = {"m": ratio([[1, 2, 3]], uids=("a", "b", "c"))}
    with pytest.raises(DataError, match=r"only the first has 'c', only the second 'd'"):
        difference(left, {"m": ratio([[1, 2, 3]], uids=("a", "b", "d"))}, resamples=5, seed=0)
    with pytest.raises(DataError, match=r"another order: at 0 the first has 'a', the second 'b'"):
        difference(left, {"m": ratio([[1, 2, 3]], uids=("b", "a", "c"))}, resamples=5, seed=0)
    with pytest.raises(DataError, match=r"got 3 and 2: only the first has 'c', only the second none"):
        difference(left, {"m": ratio([[1, 2]], uids=("a", "b"))}, resamples=5, seed=0)


def test_difference_is_of_shared_measures_and_seeds_may_differ() -> None:
    left = {"m": ratio([[1, 2]]), "only": ratio([[1, 1]])}
    found = difference(left, {"m": ratio([[1, 1], [1, 2]])}, resamples=5, seed=0)
    assert list(found) == ["m"]
    assert found["m"]["mean"] == pytest.approx(1.5 - 1.25)


def test_a_number_that_is_not_finite_is_refused_with_its_prompt() -> None:
    with pytest.raises(NonFinite, match=r"prompt 'p1', seed 0, is inf"):
        ratio([[1.0, float("inf")]])


def test_shapes_must_agree() -> None:
    with pytest.raises(ShapeMismatch, match="numerator"):
        ratio([[1.0, 2.0]], uids=("a",))


@pytest.mark.parametrize(("carriers", "bounded"), [(1, False), (2, True)])
def test_one_prompt_that_carries_a_measure_has_no_interval(carriers: int, bounded: bool) -> None:
    """Every draw of it is the same number: an interval of no width, which would exclude zero. Control: two of them."""
    there = np.arange(50) < carriers
    one = {"m": ratio([there * np.arange(1.0, 51.0)], [there])}
    found = estimate(one, resamples=200, seed=0)["m"]
    assert found["prompts"] == carriers and (found["ci95"] is not None) == bounded
    everywhere = {"m": ratio([np.arange(50) % 7])}
    for left, right in ((one, everywhere), (everywhere, one)):
        change = difference(left, right, resamples=200, seed=0)["m"]
        assert change["mean"] is not None and (change["ci95"] is not None) == bounded


def test_a_difference_counts_the_prompts_that_carry_it_in_both() -> None:
    left, right = ({"m": ratio([[1, 2, 3, 4]], [there])} for there in ([1, 1, 0, 0], [0, 1, 1, 1]))
    assert difference(left, right, resamples=50, seed=0)["m"]["ci95"] is None
    assert difference(right, right, resamples=50, seed=0)["m"]["ci95"] == [0, 0]  # control

"""Promises of the statistics of a comparison.

Paired differences, wins and corrections have the values of a hand calculation; a model against itself differs in
nothing; swapping two models turns every sign; intervals of equal models exclude 0 as often as they say; a model that is
only sharper is not better at equal diversity.

Shapes here: S sampling seeds, N prompts, R resamples.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from minillm.compare.diversity import at_equal_diversity, gap
from minillm.compare.pairs import (
    Drawn,
    bootstrap_p,
    changes,
    draw,
    holm,
    needed_prompts,
    prompt_values,
    require_same_seeds,
    sign_test,
    tally,
)
from minillm.errors import DataError
from minillm.statistics import Array, Ratio, draws

SETS = 400
"""Simulated evaluations of a pair of equal models."""


def ratio(numerator: object, denominator: object | None = None) -> Ratio:
    above = np.array(numerator, dtype=np.float64)
    below = np.ones_like(above) if denominator is None else np.array(denominator, dtype=np.float64)
    return Ratio(
        uids=tuple(f"p{n}" for n in range(above.shape[1])), seeds=tuple(range(above.shape[0])),
        numerator_SN=above, denominator_SN=below,
    )  # fmt: skip


def drawn(numerator: object, denominator: object | None = None, *, resamples: int = 400, seed: int = 0) -> Drawn:
    return draw({"validity": ratio(numerator, denominator)}, resamples=resamples, seed=seed)


def noisy(seed: int, *, seeds: int = 3, prompts: int = 20) -> Array:
    return np.random.default_rng(seed).normal(size=(seeds, prompts))


def excludes_zero(base_SN: Array, other_SN: Array, *, seed: int) -> bool:
    found = changes(drawn(base_SN, seed=seed), drawn(other_SN, seed=seed))["validity"]
    low, high = found["ci95"]
    return bool(low > 0 or high < 0)


# Differences


def test_a_difference_by_hand() -> None:
    """Two prompts with differences 0 and 1: their mean under resampling is 0, ½, 1 with chances ¼, ½, ¼."""
    found = changes(drawn([[1, 0]], resamples=20_000), drawn([[1, 1]], resamples=20_000))["validity"]
    assert (found["base"], found["other"], found["mean"], found["prompts"]) == (0.5, 1.0, 0.5, 2)
    assert found["ci95"] == [0.0, 1.0]
    assert found["error"] == pytest.approx(math.sqrt(1 / 8), rel=0.02)
    assert found["p"] == pytest.approx(2 * 0.25, abs=0.02)
    assert found["detectable"] == pytest.approx(2.8016 * found["error"])
    assert found["needs"] == math.ceil(2 * (2.8016 * found["error"] / 0.5) ** 2)


def test_a_model_against_itself_differs_in_nothing() -> None:
    one = ratio(noisy(0))
    found = changes(*(draw({"validity": one}, resamples=200, seed=1) for _ in range(2)))["validity"]
    assert (found["mean"], found["ci95"], found["error"], found["p"], found["needs"]) == (
        0.0,
        [0.0, 0.0],
        0.0,
        1.0,
        None,
    )
    level = tally(one, one, better="higher", tolerance=0.0, resamples=200, seed=1)
    assert (level["wins"], level["ties"], level["losses"], level["p"]) == (0, 20, 0, 1.0)
    # Control: one response that is better, and it is a win and a difference.
    better = noisy(0)
    better[0, 3] += 0.5
    found = changes(drawn(noisy(0)), drawn(better))["validity"]
    assert found["mean"] == pytest.approx(0.5 / 60)
    level = tally(one, ratio(better), better="higher", tolerance=0.0, resamples=200, seed=1)
    assert (level["wins"], level["ties"], level["losses"]) == (1, 19, 0)


@pytest.mark.parametrize("seed", range(5))
def test_swapping_the_models_turns_every_sign(seed: int) -> None:
    pair = [noisy(seed), noisy(seed + 100) + 0.5]
    there, back = (
        changes(drawn(one, seed=seed), drawn(two, seed=seed))["validity"] for one, two in (pair, reversed(pair))
    )
    assert back["mean"] == -there["mean"]
    np.testing.assert_allclose(back["ci95"], [-end for end in reversed(there["ci95"])], rtol=0, atol=1e-12)
    assert (back["p"], back["error"]) == (there["p"], pytest.approx(there["error"]))
    one, two = (
        tally(ratio(a), ratio(b), better="higher", tolerance=0.1, resamples=100, seed=seed)
        for a, b in (pair, reversed(pair))
    )
    assert (one["wins"], one["losses"], one["ties"]) == (two["losses"], two["wins"], two["ties"])
    assert one["net"] == -two["net"] and one["p"] == two["p"]
    # Control: the two are not the same, and other draws do not have the same interval.
    assert there["mean"] != 0 and one["wins"] != one["losses"]
    other = changes(drawn(pair[0], seed=seed), drawn(pair[1], seed=seed + 1))["validity"]
    assert other["ci95"] != there["ci95"]


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    hard = np.random.default_rng(5).normal(scale=10, size=(1, 50))
    found = changes(drawn(hard), drawn(hard + 0.1 + 0.01 * noisy(6, seeds=1, prompts=50)))["validity"]
    assert found["error"] < 0.01
    unpaired = changes(drawn(hard), drawn(np.roll(hard, 1) + 0.1))["validity"]  # control: partners mixed up
    assert unpaired["error"] > 1


def equal_models(seed: int, *, prompts: int = 60, seeds: int = 3) -> tuple[Array, Array]:
    """Valid or not: prompts differ in how hard they are, and each model has prompts that it likes; none is better."""
    noise = np.random.default_rng(seed)
    hard_N = noise.uniform(0.2, 0.8, size=prompts)
    liked_2N = noise.choice([-0.2, 0.2], size=(2, prompts))
    one, two = (noise.random((seeds, prompts)) < hard_N + liked_N for liked_N in liked_2N)
    return one.astype(float), two.astype(float)


def test_intervals_of_equal_models_exclude_zero_as_often_as_they_say() -> None:
    hits = sum(excludes_zero(*equal_models(n), seed=n) for n in range(SETS))
    assert 0.03 * SETS <= hits <= 0.08 * SETS  # 5 %, and two standard errors of it, and what 60 prompts cost
    # Control: the responses to a prompt taken as prompts of their own. They are alike, and the intervals too narrow.
    flat = [[one.reshape(1, -1) for one in equal_models(n, seeds=12)] for n in range(SETS // 4)]
    assert sum(excludes_zero(*pair, seed=n) for n, pair in enumerate(flat)) > 0.15 * SETS / 4


def test_about_as_many_prompts_as_are_said_to_be_needed_tell_the_difference() -> None:
    """Per prompt a difference of 0.1 with standard deviation 1: with 30 prompts it takes 785, four times in five."""
    needed = needed_prompts(0.1, 1 / math.sqrt(30), prompts=30)
    assert needed == 785

    def told(prompts: int) -> float:
        pairs = [(noisy(n, seeds=1, prompts=prompts) * 0, noisy(n, seeds=1, prompts=prompts) + 0.1) for n in range(100)]
        return sum(excludes_zero(*pair, seed=n) for n, pair in enumerate(pairs)) / 100

    assert 0.68 <= told(needed) <= 0.92
    assert told(needed // 10) < 0.4  # control: a tenth of them does not do


@pytest.mark.parametrize(("mean", "error"), [(0.0, 0.1), (None, 0.1), (0.1, None), (0.1, 0.0)])
def test_where_no_number_of_prompts_is_right_none_is_named(mean: float | None, error: float | None) -> None:
    assert needed_prompts(mean, error, prompts=100) is None
    assert needed_prompts(0.1, 0.1, prompts=100) == 785  # control


def test_one_prompt_has_no_interval() -> None:
    found = changes(drawn([[0]]), drawn([[1]]))["validity"]
    assert (found["mean"], found["ci95"], found["p"], found["needs"]) == (1.0, None, None, None)
    some = [[1, 1, 1]], [[1, 0, 0]]  # three prompts, of which one has the measure
    found = changes(drawn(*some), drawn(*some))["validity"]
    assert (found["prompts"], found["ci95"]) == (1, None)


# Sampling seeds


def test_seeds_are_drawn_only_where_it_is_asked_for() -> None:
    """A seed that lifts one model on all prompts alike: prompts alone do not see that another seed might not."""
    base = noisy(1, seeds=4, prompts=30)
    other = base + np.array([[0.5], [-0.2], [-0.2], [0.1]])
    reach = {
        asked: changes(*(draw({"m": ratio(v)}, resamples=500, seed=0, also_seeds=asked) for v in (base, other)))["m"]
        for asked in (False, True)
    }
    assert reach[False]["ci95"] == pytest.approx([0.05, 0.05])
    low, high = reach[True]["ci95"]
    assert low < -0.15 and high > 0.3
    assert reach[True]["mean"] == reach[False]["mean"]


def test_draws_of_seeds_equal_the_slow_loop() -> None:
    one = ratio(noisy(2), np.random.default_rng(3).integers(1, 5, size=(3, 20)))
    prompts, seeds = np.random.default_rng(7), np.random.default_rng(8)
    drawn_N = prompts.integers(20, size=(50, 20))
    drawn_S = seeds.integers(3, size=(50, 3))
    want = [
        np.mean([one.numerator_SN[s][n].sum() / one.denominator_SN[s][n].sum() for s in those])
        for n, those in zip(drawn_N, drawn_S, strict=True)
    ]
    got = draws({"m": one}, resamples=50, seed=7, also_seeds=True)["m"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    assert abs(draws({"m": one}, resamples=50, seed=7)["m"] - want).max() > 1e-3  # control


def test_seeds_that_differ_cannot_be_drawn_for_both() -> None:
    with pytest.raises(DataError, match="--resample-seeds"):
        require_same_seeds(ratio(noisy(0, seeds=2)), ratio(noisy(0, seeds=3)))
    require_same_seeds(ratio(noisy(0)), ratio(noisy(1)))  # control


# Wins and losses


def test_wins_ties_and_losses_by_hand() -> None:
    """Means over two seeds: base ½ ½ ½ 0, other 1 ½ 0 0.1."""
    base, other = ratio([[1, 0, 1, 0], [0, 1, 0, 0]]), ratio([[1, 1, 0, 0.1], [1, 0, 0, 0.1]])

    def counts(better: str, tolerance: float) -> tuple[int, int, int]:
        found = tally(base, other, better=better, tolerance=tolerance, resamples=50, seed=0)  # type: ignore[arg-type]
        assert sum(found["shares"]) == pytest.approx(1) and found["net"] == (found["wins"] - found["losses"]) / 4
        return found["wins"], found["ties"], found["losses"]

    assert counts("higher", 0.0) == (2, 1, 1)
    assert counts("lower", 0.0) == (1, 1, 2)
    assert counts("higher", 0.1) == (1, 2, 1)  # exactly at the tolerance is a tie
    assert counts("higher", 0.6) == (0, 4, 0)


def test_a_prompts_figure_is_its_mean_over_the_seeds_that_have_it() -> None:
    values = prompt_values(ratio([[2, 3, 0], [4, 0, 0]], [[1, 2, 0], [2, 0, 0]]))
    assert values[:2].tolist() == [2.0, 1.5] and math.isnan(values[2])
    level = tally(*([ratio([[1, 1]], [[1, 0]])] * 2), better="higher", tolerance=0.0, resamples=50, seed=0)
    assert (level["prompts"], level["ties"]) == (1, 1)  # a prompt without the measure is no tie


@pytest.mark.parametrize(
    ("wins", "losses", "want"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0)],
)
def test_sign_test_by_enumeration(wins: int, losses: int, want: float) -> None:
    assert sign_test(wins, losses) == pytest.approx(want, rel=1e-9)


def test_sign_test_of_many_prompts() -> None:
    assert sign_test(5_100, 4_900) == pytest.approx(math.erfc((100 - 0.5) / 50 / math.sqrt(2)), rel=0.01)


# Corrections


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02] and holm([]) == []


def test_holm_keeps_the_errors_of_a_family_at_five_percent() -> None:
    families = np.random.default_rng(0).random((2_000, 6))
    assert np.mean([min(holm(list(family))) <= 0.05 for family in families]) < 0.065
    assert (families.min(axis=1) <= 0.05).mean() > 0.2  # control: without it


def test_a_bootstrap_probability_is_never_zero() -> None:
    assert bootstrap_p(np.ones(99)) == 0.02
    assert bootstrap_p(np.array([-1.0, 1.0])) == 1.0


# Equal diversity


def test_the_gap_of_two_curves_by_hand() -> None:
    """y = x on 0 to 1, and y = 1 on 0.5 to 1.5: on 0.5 to 1 the second is higher by 0.5 falling to 0."""
    base = np.array([1.0, 0.0]), np.array([1.0, 0.0])
    other = np.array([0.5, 1.5]), np.array([1.0, 1.0])
    assert gap(base, other) == pytest.approx(0.25)
    assert gap(other, base) == pytest.approx(-0.25)
    bent = np.array([0.5, 0.6, 1.5]), np.array([1.0, 2.0, 1.0])  # a point of one curve between those of the other
    low, at, high = 0.5, 2 - 0.6, 2 - 0.4 / 0.9 - 1
    assert gap(base, bent) == pytest.approx(((low + at) / 2 * 0.1 + (at + high) / 2 * 0.4) / 0.5)


def test_curves_that_do_not_meet_have_no_gap() -> None:
    base, apart = (np.array([0.0, 1.0]), np.array([1.0, 1.0])), (np.array([1.1, 2.0]), np.array([1.0, 1.0]))
    assert math.isnan(gap(base, apart))
    assert gap(base, (np.array([1.0, 2.0]), np.array([3.0, 1.0]))) == 2.0  # control: they touch


def cold_and_hot(lift: float = 0.0, *, prompts: int = 40) -> dict[str, Drawn]:
    """A model at four temperatures: the colder, the more valid and the less varied."""
    noise, found = np.random.default_rng(0), {}
    for turn, key in enumerate(("1.0", "0.8", "0.6", "0.3")):
        ratios = {
            "validity": ratio(0.6 + lift + 0.1 * turn + 0.05 * noise.normal(size=(2, prompts))),
            "distinct_4": ratio(0.8 - 0.1 * turn + 0.01 * noise.normal(size=(2, prompts))),
        }
        found[key] = draw(ratios, resamples=200, seed=0)
    return found


def colder(model: dict[str, Drawn]) -> dict[str, Drawn]:
    """The same model, each temperature under the name of the next hotter one: only sharper, not better."""
    return {hot: model[cold] for hot, cold in pairwise(model)}


def test_a_model_that_is_only_sharper_is_not_better_at_equal_diversity() -> None:
    plain = cold_and_hot()
    same_name = changes(plain["1.0"], colder(plain)["1.0"])["validity"]
    assert same_name["ci95"][0] > 0.05  # at equal temperature it looks better
    found = at_equal_diversity(plain, colder(plain), quality="validity", diversity="distinct_4")
    assert found["mean"] == pytest.approx(0, abs=1e-12) and found["apart"] == 0.0
    np.testing.assert_allclose(found["ci95"], 0, atol=1e-12)
    assert found["range"] == pytest.approx([0.5, 0.7], abs=0.02)
    # Control: one that is better has a curve that lies higher.
    lifted = at_equal_diversity(plain, colder(cold_and_hot(0.1)), quality="validity", diversity="distinct_4")
    assert lifted["mean"] == pytest.approx(0.1) and lifted["ends"] == pytest.approx([0.1, 0.1])
    assert lifted["ci95"] == pytest.approx([0.1, 0.1])


def test_equal_diversity_turns_its_sign_with_the_models() -> None:
    one, two = cold_and_hot(), colder(cold_and_hot(0.07))
    there, back = (
        at_equal_diversity(a, b, quality="validity", diversity="distinct_4") for a, b in ((one, two), (two, one))
    )
    assert back["mean"] == pytest.approx(-there["mean"]) and there["mean"] != 0
    np.testing.assert_allclose(back["ci95"], [-end for end in reversed(there["ci95"])], atol=1e-12)


def test_one_temperature_is_no_curve_and_ranges_apart_are_told() -> None:
    plain = cold_and_hot()
    alone = at_equal_diversity(plain, {"1.0": plain["1.0"]}, quality="validity", diversity="distinct_4")
    assert (alone["mean"], alone["other_range"], alone["range"]) == (None, None, None)
    hot, cold = ({key: plain[key] for key in keys} for keys in (("1.0", "0.8"), ("0.6", "0.3")))
    apart = at_equal_diversity(hot, cold, quality="validity", diversity="distinct_4")
    assert apart["mean"] is None and apart["range"] is None and apart["other_range"] is not None

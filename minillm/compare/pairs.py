"""Two models on the same prompts: differences, wins and losses, and what the data could tell at all.

Shapes here: S sampling seeds, N prompts, R resamples.

A difference is always *other less base*. **Prompts are resampled, jointly for both models; a prompt is drawn with its
responses under all its sampling seeds.** The sampling seeds themselves are not resampled by default, for this reason:
each response is drawn with random numbers of its own (keyed by prompt and seed), so what the sampling adds to the
figures is independent from prompt to prompt, and is already in how the prompts' means spread. With S seeds, variance
s² within a prompt and v between prompts, the variance of a mean is (v + s²/S) / N, and that is what resampling prompts
estimates. Drawing the seeds as well (``also_seeds``) counts part of s² again: intervals that are too wide, which is
safe but wasteful. It is right where one seed acts on all prompts alike, and rough with the handful of seeds that an
evaluation has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minillm.errors import DataError
from minillm.statistics import Array, Ratio, carried, draws, interval, mean_over_seeds, require_same_prompts

REACH = 1.96 + 0.8416
"""Standard errors from 0 at which a difference is told from it (5 %, two-sided) in four data sets of five."""
ROUNDING = 1e-12
"""Two means over seeds that differ by this much are the same number, added up in another order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """The measures of one model at one temperature, and each of them under the R resamples."""

    ratios: Mapping[str, Ratio]
    draws: Mapping[str, Array]


def draw(ratios: Mapping[str, Ratio], *, resamples: int, seed: int, also_seeds: bool = False) -> Drawn:
    """Draws the measures once, to be used in every comparison of this model."""
    return Drawn(ratios=ratios, draws=draws(ratios, resamples=resamples, seed=seed, also_seeds=also_seeds))


def changes(base: Drawn, other: Drawn) -> dict[str, dict[str, Any]]:
    """``other - base`` for each measure that both have; both drawn with the same ``resamples`` and ``seed``.

    ``mean``; ``ci95``, the paired percentile interval; ``error``, the standard deviation over the resamples; ``p``, the
    two-sided bootstrap probability; ``base`` and ``other``, the two figures; ``prompts`` that carry the measure in
    both; ``detectable``, the size that these prompts would tell from 0; ``needs`` (see ``needed_prompts``). None
    wherever a number does not exist. Raises ``DataError`` unless both are of the same prompts.
    """
    found = {}
    for name in (name for name in base.ratios if name in other.ratios):
        left, right = base.ratios[name], other.ratios[name]
        require_same_prompts(left.uids, right.uids)
        draw_R = other.draws[name] - base.draws[name]
        defined = draw_R[~np.isnan(draw_R)]
        both = carried(left, right)
        spread = interval(draw_R, prompts=both)
        error = float(defined.std()) if spread["ci95"] is not None else None
        values = [mean_over_seeds(left), mean_over_seeds(right)]
        mean = None if math.isnan(sum(values)) else values[1] - values[0]
        found[name] = {
            "base": _number(values[0]),
            "other": _number(values[1]),
            "mean": mean,
            **spread,
            "error": error,
            "p": None if error is None else bootstrap_p(defined),
            "prompts": both,
            "detectable": None if error is None else REACH * error,
            "needs": needed_prompts(mean, error, prompts=both),
        }
    return found


def bootstrap_p(draw_R: Array) -> float:
    """Twice the smaller share of draws on one side of 0 (0 counts for both), at most 1, and at least 2 / (R + 1)."""
    side = min(int((draw_R <= 0).sum()), int((draw_R >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(draw_R) + 1))


def needed_prompts(mean: float | None, error: float | None, *, prompts: int) -> int | None:
    """About how many prompts would tell a difference of this size, four times in five, at 5 %; None where none would.

    The standard error falls with the root of the number of prompts, so it has to shrink to |mean| / 2.8:
    ``prompts * (2.8 * error / |mean|)^2``. The size is the one that was seen, which is noisy itself: an order of
    magnitude, not a plan to the prompt.
    """
    if mean is None or error is None or abs(mean) <= ROUNDING or error <= ROUNDING:
        return None
    return max(2, math.ceil(prompts * (REACH * error / abs(mean)) ** 2))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's corrected p values, in the given order: below 0.05 in all, an error among them in at most 5 % of cases.

    The least p times their number, the next times one less, and so on, none below the one before, at most 1. Valid
    whatever the comparisons have to do with each other.
    """
    corrected, floor = [1.0] * len(values), 0.0
    for turn, place in enumerate(sorted(range(len(values)), key=lambda n: values[n])):
        floor = max(floor, min(1.0, (len(values) - turn) * values[place]))
        corrected[place] = floor
    return corrected


def prompt_values(ratio: Ratio) -> Array:
    """Each prompt's own figure [N]: its ratio under each seed, averaged; NaN where it has none."""
    kept_SN = ratio.denominator_SN > 0
    value_SN = np.divide(ratio.numerator_SN, ratio.denominator_SN, out=np.zeros_like(ratio.numerator_SN), where=kept_SN)
    kept_N: Array = kept_SN.sum(axis=0).astype(np.float64)
    mean_N: Array = np.divide(value_SN.sum(axis=0), kept_N, out=np.full_like(kept_N, np.nan), where=kept_N > 0)
    return mean_N


def tally(
    base: Ratio,
    other: Ratio,
    *,
    better: Literal["higher", "lower"],
    tolerance: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """On how many prompts the other model wins, ties and loses, by the prompts' means over their seeds.

    A tie is a difference of at most ``tolerance``, in the measure's own unit. ``shares`` are those of the three;
    ``net`` is wins less losses over all, with its bootstrap interval over prompts (``ci95``); ``p`` is the two-sided
    sign test, which leaves ties out.
    """
    gain_N = gains(base, other, better=better)
    gain_N = gain_N[~np.isnan(gain_N)]
    sign_N = np.where(np.abs(gain_N) <= tolerance + ROUNDING, 0.0, np.sign(gain_N))
    wins, losses, prompts = int((sign_N > 0).sum()), int((sign_N < 0).sum()), len(sign_N)
    one = Ratio(
        uids=tuple(map(str, range(prompts))),
        seeds=(0,),
        numerator_SN=sign_N[None],
        denominator_SN=np.ones((1, prompts)),
    )
    net_R = draws({"net": one}, resamples=resamples, seed=seed)["net"]
    return {
        "wins": wins,
        "ties": prompts - wins - losses,
        "losses": losses,
        "prompts": prompts,
        "shares": [n / prompts for n in (wins, prompts - wins - losses, losses)] if prompts else None,
        "net": (wins - losses) / prompts if prompts else None,
        **interval(net_R, prompts=prompts),
        "p": sign_test(wins, losses),
        "tolerance": tolerance,
    }


def gains(base: Ratio, other: Ratio, *, better: Literal["higher", "lower"]) -> Array:
    """By how much the other model is better on each prompt [N]; NaN where one of them has no figure."""
    require_same_prompts(base.uids, other.uids)
    change_N = prompt_values(other) - prompt_values(base)
    return change_N if better == "higher" else -change_N


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least this uneven, were each of the two equally likely; 1 without any."""
    n, fewer = wins + losses, min(wins, losses)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def require_same_seeds(base: Ratio, other: Ratio) -> None:
    """Raise ``DataError`` unless both have the same sampling seeds, which are to be drawn for both at once."""
    if sorted(base.seeds) != sorted(other.seeds):
        raise DataError(
            f"sampling seeds {sorted(base.seeds)} and {sorted(other.seeds)} cannot be drawn for both models at once, "
            "wanted the same; leave out --resample-seeds, or evaluate both with the same seeds"
        )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value

"""Differences of the same seed: their mean, its interval and its probability, by Student's t.

Of n differences with mean m and standard deviation s, t = m / (s / sqrt(n)) has n - 1 degrees of freedom. Interval and
probability come from one distribution, so an interval excludes zero just where its probability is below 0.05.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import mpmath

LEVEL = 0.05
"""An interval is left by this share of chance, and a probability below it counts."""


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """Mean difference over seeds, its 95 % interval and two-sided probability by Student's t.

    Neither interval nor probability from fewer than two seeds. Where all differences are equal, the interval is that
    one number, and the probability is 1 at zero and 0 elsewhere.
    """
    mean, deviation = spread(differences).values()
    found: dict[str, Any] = {"mean": mean, "ci95": None, "p": None, "seeds": len(differences)}
    if mean is None or deviation is None:
        return found
    freedom, error = len(differences) - 1, deviation / math.sqrt(len(differences))
    reach = t_reach(freedom) * error
    t = abs(mean) / error if error > 0 else (math.inf if mean else 0.0)
    return {**found, "ci95": [mean - reach, mean + reach], "p": t_probability(t, freedom)}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation (n - 1), None where there are too few values."""
    if not values:
        return {"mean": None, "sd": None}
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def t_probability(t: float, freedom: int) -> float:
    """The probability that Student's t is at least this far from zero, to either side.

    The regularised incomplete beta function of (freedom / 2, 1 / 2) up to freedom / (freedom + t²).
    """
    below = 0.0 if math.isinf(t) else freedom / (freedom + t * t)
    return float(mpmath.betainc(freedom / 2, 0.5, 0, below, regularized=True))


@lru_cache(maxsize=256)
def t_reach(freedom: int) -> float:
    """How far from zero Student's t is in one case of twenty: 12.706 at one degree of freedom, 1.96 at very many."""

    def gap(t: Any) -> Any:
        return t_probability(float(t), freedom) - LEVEL

    return float(mpmath.findroot(gap, (1.0, 13.0), solver="illinois", tol=1e-13))


def excludes_zero(difference: Mapping[str, Any]) -> bool:
    """Whether a difference has an interval, and zero is outside; touching is inside."""
    ends = difference["ci95"]
    return ends is not None and not ends[0] <= 0 <= ends[1]


def stars(difference: Mapping[str, Any]) -> str:
    """``*`` where the interval excludes zero, ``**`` where that stands after Holm's correction (``p_holm``) too."""
    if not excludes_zero(difference):
        return ""
    corrected = difference.get("p_holm")
    return "**" if corrected is not None and corrected <= LEVEL else "*"

"""Two models at equal diversity: is the better one better, or only sharper?

Shapes here: T temperatures, R resamples.

A lower temperature makes most models more often right and less varied, so a gain at one temperature may be had for
nothing, by sampling the other model colder. Here each model is a *curve*: its quality as a function of its diversity,
one point for each temperature, straight lines between them (by rising diversity, wherever the temperature
put the point). The two curves are compared where both have one: over the range of diversity that both reach. The
figure is the mean of the difference over that range. Nothing is extrapolated.

In each resample of the prompts both curves and the range are made anew. The diversity of a resample keeps each
response's contributions to the n-grams of the whole set, so it moves less than it should; the interval is a little
too narrow for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.compare.pairs import Drawn
from minillm.statistics import Array, interval, mean_over_seeds

LEAST_POINTS = 2
"""A line needs two temperatures."""


def at_equal_diversity(
    base: Mapping[str, Drawn], other: Mapping[str, Drawn], *, quality: str, diversity: str
) -> dict[str, Any]:
    """Mean of ``other - base`` in ``quality`` over the range of ``diversity`` that both reach, by temperature.

    ``mean`` and its paired ``ci95`` (None without a shared range), ``range`` (the shared one, None where there is
    none), ``base_range`` and ``other_range``, ``ends`` (the difference at both ends of the range), and ``apart``: the
    share of resamples in which the ranges did not meet, which are left out. A model with fewer than two temperatures
    has no curve, and then everything is None.
    """
    curves = [_points(model, quality, diversity) for model in (base, other)]
    ranges = [[min(x), max(x)] if len(x) >= LEAST_POINTS else None for x, _ in curves]
    found: dict[str, Any] = {"mean": None, "ci95": None, "range": None, "ends": None, "apart": None}
    found |= {"base_range": ranges[0], "other_range": ranges[1]}
    if None in ranges:
        return found
    met = meeting(curves[0][0], curves[1][0])
    if met is None:
        return found
    found |= {"range": list(met), "mean": gap(curves[0], curves[1]), "ends": _ends(curves[0], curves[1], met)}
    drawn = [_drawn_points(model, quality, diversity) for model in (base, other)]
    resamples = drawn[0][0].shape[1]
    gap_R = np.array(
        [gap((drawn[0][0][:, r], drawn[0][1][:, r]), (drawn[1][0][:, r], drawn[1][1][:, r])) for r in range(resamples)]
    )
    prompts = len(next(iter(next(iter(base.values())).ratios.values())).uids)
    found["apart"] = float(np.isnan(gap_R).mean()) if resamples else None
    return found | interval(gap_R, prompts=prompts)


Curve = tuple[Array, Array]
"""Diversity and quality at each temperature [T]."""


def gap(base: Curve, other: Curve) -> float:
    """The mean difference of two curves over the range that both reach; NaN where they do not meet.

    Exact for straight lines between the points: trapezia between all points of both. Where the range is one
    point, the difference there.
    """
    met = meeting(base[0], other[0])
    if met is None:
        return math.nan
    low, high = met
    knots = np.unique(np.concatenate([base[0], other[0], met]))
    knots = knots[(knots >= low) & (knots <= high)]
    change = _at(other, knots) - _at(base, knots)
    if len(knots) == 1:
        return float(change[0])
    widths = np.diff(knots)
    return float((widths * (change[1:] + change[:-1]) / 2).sum() / widths.sum())


def meeting(base: Array, other: Array) -> tuple[float, float] | None:
    """The range of diversity that two sets of points both reach; None where they do not meet or a point is NaN."""
    low, high = max(base.min(), other.min()), min(base.max(), other.max())
    return (float(low), float(high)) if low <= high else None  # NaN compares as False


def _at(curve: Curve, where: Array) -> Array:
    order = np.argsort(curve[0], kind="stable")
    return np.interp(where, curve[0][order], curve[1][order])


def _ends(base: Curve, other: Curve, met: tuple[float, float]) -> list[float]:
    return [float(change) for change in _at(other, np.array(met)) - _at(base, np.array(met))]


def _kept(model: Mapping[str, Drawn], quality: str, diversity: str) -> list[Drawn]:
    """The temperatures at which both measures have a value."""
    return [
        drawn
        for drawn in model.values()
        if all(
            name in drawn.ratios and not math.isnan(mean_over_seeds(drawn.ratios[name]))
            for name in (quality, diversity)
        )
    ]


def _points(model: Mapping[str, Drawn], quality: str, diversity: str) -> Curve:
    kept = _kept(model, quality, diversity)
    x, y = ([mean_over_seeds(drawn.ratios[name]) for drawn in kept] for name in (diversity, quality))
    return np.array(x), np.array(y)


def _drawn_points(model: Mapping[str, Drawn], quality: str, diversity: str) -> tuple[Array, Array]:
    """The same under each resample: [T, R] twice."""
    kept: Sequence[Drawn] = _kept(model, quality, diversity)
    return np.array([drawn.draws[diversity] for drawn in kept]), np.array([drawn.draws[quality] for drawn in kept])

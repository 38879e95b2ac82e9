"""Arms at equal diversity: is the better one better, or only sharper?

A lower temperature makes a model more often right and less varied, so a gain at one temperature may be had for nothing,
by sampling the other model colder. So each arm, at the headline temperature, is held against the arm that all are
compared with *of the same seed* at the temperature at which that one is just as varied. What it is worth there is read
off the straight lines between the temperatures that were evaluated. Nothing is extrapolated: a seed whose variety the
other does not reach is left out, and counted.

``compare.diversity`` asks the same of two evaluations; there whole curves are compared, and prompts are resampled.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from minillm.errors import ConfigError, did_you_mean
from minillm.measures import MEASURES, NAMES, OF_A_SET
from minillm.study.paired import paired
from minillm.study.table import Cells

DIVERSITIES = tuple(name for name in NAMES if name in OF_A_SET)
"""What may say how varied text is: measures of all responses together."""
Figures = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A point on the line between two evaluated temperatures."""

    left: str
    right: str
    share: float
    """Of the way from left to right: 0 is left, 1 is right."""

    @property
    def temperature(self) -> float:
        """What to sample at, between the two."""
        return (1 - self.share) * float(self.left) + self.share * float(self.right)

    def read(self, temperatures: Mapping[str, Figures], name: str) -> float:
        """A measure there."""
        left, right = float(temperatures[self.left][name]), float(temperatures[self.right][name])
        return (1 - self.share) * left + self.share * right


def require_diversity(name: str) -> None:
    """Raise ``ConfigError`` for a measure that does not say how varied text is."""
    if name not in DIVERSITIES:
        known = ", ".join(DIVERSITIES)
        raise ConfigError(f"--diversity: got {name!r}, wanted one of {known}{did_you_mean(name, DIVERSITIES)}")


def at_equal_diversity(
    cells: Cells, *, compare_with: str, temperature: str, measures: Sequence[str], diversity: str
) -> dict[str, Any]:
    """``arm - compare_with`` in each measure that is better when higher, at equal ``diversity``, paired over seeds.

    Of each arm: ``differences`` (mean, interval, probability), ``temperatures`` (of the other, by seed), and
    ``left_out``: why, by seed. ``arms`` is empty where the other has no two temperatures with this measure.
    """
    qualities = [name for name in measures if MEASURES[name].better == "higher"]
    base = _done(cells[compare_with])
    found: dict[str, Any] = {"diversity": diversity, "temperature": temperature, "measures": qualities, "arms": {}}
    if not any(len(_curve(of, diversity)) > 1 for of in base.values()):
        return found
    for arm, of_arm in cells.items():
        if arm != compare_with and (own := _done(of_arm)):
            found["arms"][arm] = _held_against(own, base, temperature, qualities, diversity)
    return found


def find(curve: Mapping[str, float], wanted: float, *, near: float) -> Place | str:
    """Where a line through diversities by temperature has the wanted one; in words why it is nowhere.

    A line that has it more than once, as a noisy one may, gives the place nearest to the temperature ``near``.
    """
    keys = sorted(curve, key=float)
    if len(keys) < 2:
        return "the other has one temperature only"
    places = []
    for left, right in pairwise(keys):
        low, high = curve[left], curve[right]
        if min(low, high) <= wanted <= max(low, high):
            shares = [0.0, 1.0] if low == high else [(wanted - low) / (high - low)]
            places += [Place(left=left, right=right, share=share) for share in shares]
    if not places:
        return f"the other has {'less' if wanted > max(curve.values()) else 'more'} at all its temperatures"
    return min(places, key=lambda place: abs(place.temperature - near))


def heading(found: Mapping[str, Any], *, compare_with: str) -> str:
    """What the figures are, in two lines."""
    return (
        f"at equal {MEASURES[found['diversity']].label}: each arm at temperature {found['temperature']} less "
        f"{compare_with} of the\nsame seed, at the temperature (T) at which that is as varied"
    )


def left_out(found: Mapping[str, Any], *, compare_with: str) -> list[str]:
    """A line for each arm that is without some of its seeds, and why."""
    lines = []
    for arm, of in found["arms"].items():
        reasons: dict[str, list[str]] = {}
        for seed, why in of["left_out"].items():
            reasons.setdefault(why, []).append(str(seed))
        told = "; ".join(
            f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: {why}" for why, seeds in reasons.items()
        )
        if told:
            label = MEASURES[found["diversity"]].label
            seeds = len(of["left_out"]) + len(of["temperatures"])
            counted = f"{len(of['left_out'])} of {seeds} seeds left out"
            lines.append(f"{arm}, at equal {label} with {compare_with}: {counted} ({told})")
    return lines


def _held_against(
    own: Mapping[int, Mapping[str, Figures]],
    base: Mapping[int, Mapping[str, Figures]],
    temperature: str,
    qualities: Sequence[str],
    diversity: str,
) -> dict[str, Any]:
    places: dict[int, Place] = {}
    missing: dict[int, str] = {}
    for seed, of in own.items():
        wanted = of.get(temperature, {}).get(diversity)
        if seed not in base or wanted is None:
            missing[seed] = "no cell to compare" if seed not in base else "no such figure of its own"
            continue
        place = find(_curve(base[seed], diversity), wanted, near=float(temperature))
        if isinstance(place, str):
            missing[seed] = place
        else:
            places[seed] = place
    differences = {}
    for name in qualities:
        changes = [
            own[seed][temperature][name] - place.read(base[seed], name)
            for seed, place in places.items()
            if all(name in at for at in (own[seed][temperature], base[seed][place.left], base[seed][place.right]))
        ]
        differences[name] = paired(changes)
    by_seed = {seed: place.temperature for seed, place in places.items()}
    mean = statistics.fmean(by_seed.values()) if by_seed else None
    return {"differences": differences, "temperatures": by_seed, "mean_temperature": mean, "left_out": missing}


def _done(of_arm: Mapping[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Figures]]:
    return {seed: cell["temperatures"] for seed, cell in of_arm.items() if cell["state"] == "done"}


def _curve(temperatures: Mapping[str, Figures], diversity: str) -> dict[str, float]:
    """Diversity by temperature, where there is a figure."""
    return {key: of[diversity] for key, of in temperatures.items() if diversity in of}

"""Ratios over prompts, their bootstrap intervals, and paired differences of two models.

Shapes here: S sampling seeds, N prompts, R resamples, M measures.

A measure is a ratio, sum of numerators over sum of denominators, taken within one sampling seed and then
averaged over the seeds. Intervals come from resampling *prompts*: a prompt is drawn together with its
responses under every seed, because responses to one prompt are alike and would otherwise count as independent.
They say how far the figure would move with other prompts of the same kind. They do not say how far it would
move with another training seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minillm.errors import ConfigError, DataError, NonFinite, ShapeMismatch

Array = NDArray[np.float64]

WEIGHTS_AT_ONCE = 4_000_000
"""Most resampling weights in memory at a time (32 MB); a data set of any size then fits."""
SHOWN = 3
"""How many differing uids an error names."""
TWO_PROMPTS = 2
"""An interval over prompts needs at least this many of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ratio:
    """One measure of one model: what each prompt adds to the numerator and the denominator under each seed.

    Example: validity of 2 prompts under 1 seed, the first valid: numerator [[1, 0]], denominator [[1, 1]].
    A prompt for which the measure does not exist has 0 in both. Raises ``NonFinite`` for a value that is no
    finite number (an infinity times a resampling weight of 0 would silently poison every interval).
    """

    uids: tuple[str, ...]
    seeds: tuple[int, ...]
    numerator_SN: Array
    denominator_SN: Array

    def __post_init__(self) -> None:
        wanted = (len(self.seeds), len(self.uids))
        for what, value_SN in (("numerator", self.numerator_SN), ("denominator", self.denominator_SN)):
            if value_SN.shape != wanted:
                raise ShapeMismatch(f"{what} of [seeds, prompts]", value_SN.shape, wanted)
            bad = np.argwhere(~np.isfinite(value_SN))
            if len(bad):
                s, n = bad[0]
                raise NonFinite(
                    f"the {what} of prompt {self.uids[n]!r}, seed {self.seeds[s]}, is {value_SN[s, n]}, wanted a "
                    f"finite number; {len(bad)} such values in all; look at that row in samples.jsonl"
                )
        assert (self.denominator_SN >= 0).all(), "a denominator counts something and cannot be negative"


def per_seed(ratio: Ratio) -> Array:
    """The ratio within each seed [S]; NaN where the denominators of a seed add up to 0."""
    return divide(ratio.numerator_SN.sum(axis=1), ratio.denominator_SN.sum(axis=1))


def mean_over_seeds(ratio: Ratio) -> float:
    """The measure: the ratio within each seed, averaged over the seeds where it is defined; NaN if none is."""
    return float(_mean_of_defined(per_seed(ratio)))


def estimate(ratios: Mapping[str, Ratio], *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Mean, 95 % interval and per-seed values of each measure, ready for JSON.

    ``{"mean": float, "ci95": [lo, hi], "per_seed": [...]}``; the percentile interval of ``resamples`` draws of the
    prompts. All measures see the same draws. An undefined number (no denominator) is None. ``ci95`` is None
    with fewer than two prompts that carry the measure (a single one gives the same number in every draw, which says
    nothing of others) or with ``resamples=0``. Two keys appear only when there is something to say:
    ``prompts``, how many prompts carry the measure when not all do, and ``undefined_resamples``, how many draws
    had no denominator at all and are left out of the interval. Raises ``DataError`` when the measures are not
    of the same prompts and ``ConfigError`` for a negative number of resamples.
    """
    drawn = draws(ratios, resamples=resamples, seed=seed)
    found: dict[str, dict[str, Any]] = {}
    for name, ratio in ratios.items():
        carrying = carried(ratio)
        entry: dict[str, Any] = {
            "mean": number(mean_over_seeds(ratio)),
            **interval(drawn[name], prompts=carrying),
            "per_seed": [number(value) for value in per_seed(ratio)],
        }
        if carrying < len(ratio.uids):
            entry["prompts"] = carrying
        found[name] = entry
    return found


def difference(
    left: Mapping[str, Ratio], right: Mapping[str, Ratio], *, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """``left - right`` for each measure that both have, with a paired 95 % interval: ``{"mean", "ci95"}``.

    Paired: every draw of prompts is used for both models, so what makes a prompt hard for both cancels. The
    two may have other sampling seeds. Edges as in ``estimate``, of the prompts that carry the measure in both. Raises
    ``DataError`` naming the uids unless both answered the same prompts in the same order.
    """
    names = [name for name in left if name in right]
    for name in names:
        require_same_prompts(left[name].uids, right[name].uids)
    left_draws = draws({name: left[name] for name in names}, resamples=resamples, seed=seed)
    right_draws = draws({name: right[name] for name in names}, resamples=resamples, seed=seed)
    return {
        name: {
            "mean": number(mean_over_seeds(left[name]) - mean_over_seeds(right[name])),
            **interval(left_draws[name] - right_draws[name], prompts=carried(left[name], right[name])),
        }
        for name in names
    }


def carried(*ratios: Ratio) -> int:
    """How many prompts carry the measure, in each of these that are of the same prompts."""
    there_MN = np.stack([ratio.denominator_SN.sum(axis=0) > 0 for ratio in ratios])
    return int(there_MN.all(axis=0).sum())


def require_same_prompts(left: tuple[str, ...], right: tuple[str, ...]) -> None:
    """Raise ``DataError``, naming the first few uids that differ, unless both list the same uids in the same order."""
    if left == right:
        return
    in_left, in_right = set(left), set(right)
    only_left, only_right = [u for u in left if u not in in_right], [u for u in right if u not in in_left]
    if only_left or only_right:
        told = f"only the first has {_some(only_left)}, only the second {_some(only_right)}"
    else:
        at = next((n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), -1)
        assert at >= 0, "the same uids, each once, and yet of unequal number"
        told = f"the same uids in another order: at {at} the first has {left[at]!r}, the second {right[at]!r}"
    raise DataError(
        f"a paired difference needs two models on the same prompts, got {len(left)} and {len(right)}: {told}; "
        "evaluate both with the same data configuration"
    )


def resample_weights(prompts: int, *, resamples: int, seed: int) -> Iterator[Array]:
    """How often each prompt is drawn, in blocks [some R, N] that hold ``resamples`` rows in all.

    A pure function of its three arguments: the same draws for every model and measure.
    """
    generator = np.random.default_rng(seed)
    block = max(1, WEIGHTS_AT_ONCE // prompts)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn_RN = generator.integers(prompts, size=(rows, prompts))
        cells = (np.arange(rows)[:, None] * prompts + drawn_RN).ravel()
        yield np.bincount(cells, minlength=rows * prompts).reshape(rows, prompts).astype(np.float64)


def draws(ratios: Mapping[str, Ratio], *, resamples: int, seed: int, also_seeds: bool = False) -> dict[str, Array]:
    """The measure under each draw of the prompts [R]; NaN where a draw has no denominator under any seed.

    Draws follow from ``seed`` and from the numbers of prompts, sampling seeds and resamples, so two models that are
    drawn alike are drawn in pairs. ``also_seeds`` draws the sampling seeds with replacement, too: one draw of them for
    all prompts of a resample. The prompts are drawn the same with and without.
    """
    if resamples < 0:
        raise ConfigError(f"bootstrap resamples: got {resamples}, wanted 0 or more")
    if not ratios:
        return {}
    first = next(iter(ratios.values()))
    for ratio in ratios.values():
        require_same_prompts(first.uids, ratio.uids)
    parts: dict[str, list[Array]] = {name: [np.empty(0)] for name in ratios}
    if len(first.uids) > 0:
        place = 0
        times_RS = _all_weights(len(first.seeds), resamples=resamples, seed=seed + 1) if also_seeds else None
        for weight_RN in resample_weights(len(first.uids), resamples=resamples, seed=seed):
            for name, ratio in ratios.items():
                value_RS = divide(weight_RN @ ratio.numerator_SN.T, weight_RN @ ratio.denominator_SN.T)
                block_RS = None if times_RS is None else times_RS[place : place + len(weight_RN)]
                parts[name].append(_mean_of_defined(value_RS, block_RS))
            place += len(weight_RN)
    return {name: np.concatenate(blocks) for name, blocks in parts.items()}


def interval(draw_R: Array, *, prompts: int) -> dict[str, Any]:
    """``{"ci95": [low, high]}``, the percentile interval of draws that are not NaN; None where there can be none."""
    defined = draw_R[~np.isnan(draw_R)]
    if prompts < TWO_PROMPTS or len(defined) == 0:
        return {"ci95": None}
    low, high = np.percentile(defined, (2.5, 97.5))
    left_out = len(draw_R) - len(defined)
    return {"ci95": [float(low), float(high)]} | ({"undefined_resamples": left_out} if left_out else {})


def _all_weights(count: int, *, resamples: int, seed: int) -> Array:
    return np.concatenate([np.empty((0, count)), *resample_weights(count, resamples=resamples, seed=seed)])


def divide(numerator: Array, denominator: Array) -> Array:
    """Element-wise quotient; NaN, without a warning, where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator > 0)


def _mean_of_defined(value_XS: Array, times_XS: Array | None = None) -> Array:
    """Mean over the last axis of what is not NaN, each counted ``times`` (once); NaN where nothing is."""
    counted_XS = np.where(np.isnan(value_XS), 0.0, 1.0 if times_XS is None else times_XS)
    return divide((np.nan_to_num(value_XS) * counted_XS).sum(axis=-1), counted_XS.sum(axis=-1))


def number(value: float) -> float | None:
    """The value as JSON has it: None for NaN."""
    return None if np.isnan(value) else float(value)


def _some(uids: list[str]) -> str:
    if not uids:
        return "none"
    more = f" and {len(uids) - SHOWN} more" if len(uids) > SHOWN else ""
    return ", ".join(repr(uid) for uid in uids[:SHOWN]) + more

"""Everything that a comparison of evaluations finds, as one record that is ready for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from minillm.compare.diversity import at_equal_diversity
from minillm.compare.evaluated import Evaluated, common_temperatures, headline, require_comparable
from minillm.compare.extremes import extremes
from minillm.compare.pairs import Drawn, changes, draw, holm, require_same_seeds, tally
from minillm.errors import ConfigError, did_you_mean
from minillm.measures import LENGTH_BUCKETS, MEASURES, NAMES, QUALITIES, reference_bucket
from minillm.statistics import mean_over_seeds

SCHEMA = 1
FEW = 4
"""Up to so many models every pair is compared; of more, the first with each other one."""
DIVERSITIES = ("distinct_4",)
"""What the curves at equal diversity may be drawn over: the first that both models have."""
SET_FIELDS = ("set", "dataset")
"""Fields of a sample that name the data set that its prompt is from."""
SAME_NATS = "reverse_kl_per_token"
"""The reverse KL once more, in another unit: shown, but without a verdict of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to compare."""

    resamples: int = 4000
    seed: int = 0
    also_seeds: bool = False
    """Resample the sampling seeds, too (see ``pairs``)."""
    across: bool = False
    """Compare also what was sampled with different decoding."""
    tolerance: float | None = None
    """Largest difference of a prompt that is a tie, in the measure's own unit; None is half of its last shown digit."""
    by: str = ""
    """A field of the samples (family, topic) to compare by; "" compares by the data set, where samples name one."""
    shown: int = 8
    """Most prompts in each direction that are kept side by side."""

    def __post_init__(self) -> None:
        for name, least in (("resamples", 100), ("seed", 0), ("shown", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} {getattr(self, name)}: wanted {least} or more")
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise ConfigError(f"--tolerance {self.tolerance}: wanted a number of 0 or more")


def directed(names: Mapping[str, Any]) -> list[str]:
    """Those measures that have a better and a worse, in the order of ``MEASURES``."""
    return [name for name in NAMES if name in names and MEASURES[name].better is not None]


def main_measures(names: Mapping[str, Any]) -> list[str]:
    """Those of them that get a verdict: what Holm's correction is over."""
    return [name for name in directed(names) if name != SAME_NATS]


def summary(evaluated: Sequence[Evaluated], options: Options) -> dict[str, Any]:
    """The whole comparison. Raises what ``evaluated.require_comparable`` does, before anything is computed."""
    first, *others = evaluated
    # The first against each other one comes first, so that what more pairs add stands behind it.
    pairs = [(first, other) for other in others]
    if len(evaluated) <= FEW:
        pairs += [(base, other) for n, base in enumerate(others) for other in others[n + 1 :]]
    checked = [(base, other, *require_comparable(base, other, across=options.across)) for base, other in pairs]
    groups = _groups(first, options.by)
    drawn = _Draws(options)
    comparisons = [_compared(base, other, out, groups, drawn) for base, other, _, out in checked]
    record = {
        "schema": SCHEMA,
        "names": [one.name for one in evaluated],
        "options": asdict(options),
        "notes": list(dict.fromkeys(note for *_, notes, _ in checked for note in notes)),
        "prompts": len(first.prompts()),
        "seeds": {one.name: one.seeds for one in evaluated},
        "comparisons": comparisons,
        "corrected": _correct(comparisons),
        "least_p": 2 / (options.resamples + 1),
        "evaluations": {
            one.name: {key: value for key, value in one.results.items() if key not in ("measures", "temperatures")}
            for one in evaluated
        },
    }
    # JSON has no NaN, and a field that a sample or an evaluation carries along may be one.
    return json.loads(json.dumps(record), parse_constant=lambda _: None)  # type: ignore[no-any-return]


class _Draws:
    """Each model's resamples at each temperature, made once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._made: dict[tuple[str, str], Drawn] = {}

    def of(self, one: Evaluated, temperature: str) -> Drawn:
        key = (one.name, temperature)
        if key not in self._made:
            self._made[key] = self.fresh(one, temperature, None)
        return self._made[key]

    def fresh(self, one: Evaluated, temperature: str, uids: Sequence[str] | None) -> Drawn:
        o = self.options
        return draw(one.ratios(temperature, uids=uids), resamples=o.resamples, seed=o.seed, also_seeds=o.also_seeds)


def _compared(
    base: Evaluated,
    other: Evaluated,
    out: frozenset[str],
    groups: Mapping[str, Sequence[str]],
    drawn: _Draws,
) -> dict[str, Any]:
    """One pair; the measures in ``out`` are left out."""
    options = drawn.options
    keys = common_temperatures(base, other)
    at = headline(keys)
    left, right = drawn.of(base, at[0]), drawn.of(other, at[1])
    if options.also_seeds:
        require_same_seeds(next(iter(left.ratios.values())), next(iter(right.ratios.values())))

    def kept(found: Mapping[str, Any]) -> dict[str, Any]:
        return {name: found[name] for name in NAMES if name in found and name not in out}

    main = kept(changes(left, right))
    return {
        "base": base.name,
        "other": other.name,
        "at": list(at),
        "changes": main,
        "wins": {
            name: tally(
                left.ratios[name], right.ratios[name], better=MEASURES[name].better or "higher",
                tolerance=_tolerance(name, options), resamples=options.resamples, seed=options.seed,
            )
            for name in directed(main)
        },
        "temperatures": {
            key: kept(changes(drawn.of(base, key), drawn.of(other, key))) for key, same in keys if key == same
        },
        "equal_diversity": _equal_diversity(base, other, drawn),
        "groups": {
            label: {
                "prompts": len(uids),
                "changes": kept(changes(drawn.fresh(base, at[0], uids), drawn.fresh(other, at[1], uids))),
            }
            for label, uids in groups.items()
        },
        "extremes": extremes(
            base, other, at=at, ratios=(left.ratios, right.ratios), measures=main_measures(main), count=options.shown
        ),
    }  # fmt: skip


def _tolerance(name: str, options: Options) -> float:
    return 0.5 * 10.0 ** -MEASURES[name].digits if options.tolerance is None else options.tolerance


def _equal_diversity(base: Evaluated, other: Evaluated, drawn: _Draws) -> dict[str, Any]:
    """By quality measure; each model over all of its own temperatures."""
    curves = [{key: drawn.of(one, key) for key in one.rows} for one in (base, other)]
    have = [set.intersection(*(set(point.ratios) for point in curve.values())) for curve in curves]
    both = have[0] & have[1]
    over = next((name for name in DIVERSITIES if name in both), None)
    if over is None:
        return {}
    found: dict[str, Any] = {}
    for quality in (name for name in QUALITIES if name in both):
        found[quality] = {
            "over": over,
            **at_equal_diversity(curves[0], curves[1], quality=quality, diversity=over),
            "points": [
                {key: [_mean(point, over), _mean(point, quality)] for key, point in curve.items()} for curve in curves
            ],
        }
    return found


def _mean(drawn: Drawn, name: str) -> float | None:
    value = mean_over_seeds(drawn.ratios[name])
    return None if math.isnan(value) else value


def _groups(first: Evaluated, by: str) -> dict[str, list[str]]:
    """Label -> uids: by the words of the reference, and by a field where there is one; only where there are several."""
    prompts = first.prompts()
    lengths: dict[str, list[str]] = {name: [] for name in LENGTH_BUCKETS}
    for uid, row in prompts.items():
        if (bucket := reference_bucket(dict(row))) is not None:
            lengths[bucket].append(uid)
    found = {f"{name} words": uids for name, uids in lengths.items() if uids}
    kinds: dict[str, list[str]] = {}
    fields = [by] if by else [name for name in SET_FIELDS if any(_value(row, name) for row in prompts.values())][:1]
    for uid, row in prompts.items():
        for field in fields:
            if value := _value(row, field):
                kinds.setdefault(f"{field} {value}", []).append(uid)
    if by and not kinds:
        known = dict.fromkeys(key for row in prompts.values() for key in row.get("extra") or {})
        raise ConfigError(
            f"--by {by}: no sample has it; there are {', '.join(known) or 'none'}{did_you_mean(by, known)}"
        )
    return {**(found if len(found) > 1 else {}), **(kinds if len(kinds) > 1 else {})}


def _value(row: Mapping[str, Any], field: str) -> str:
    extra = row.get("extra") or {}
    value = row.get(field, extra.get(field) if isinstance(extra, dict) else None)
    return str(value) if isinstance(value, str | int) else ""


def _correct(comparisons: Sequence[Mapping[str, Any]]) -> int:
    """Adds ``holm``, the corrected probability, over all pairs and all measures with a verdict, at the headline
    temperature; how many.

    The other measures say how a text differs, not which is better; counted in, they would cost the verdicts power.
    """
    family: list[dict[str, Any]] = [
        found["changes"][name]
        for found in comparisons
        for name in main_measures(found["changes"])
        if found["changes"][name]["p"] is not None
    ]
    for change, corrected in zip(family, holm([change["p"] for change in family]), strict=True):
        change["holm"] = corrected
    return len(family)

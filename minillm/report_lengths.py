"""The measures by the length of the reference on a page: bars in their buckets, and the figures below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillm import plots
from minillm.measures import MEASURES
from minillm.report_parts import estimate_cell, grid, head_row, legend, scrolling
from minillm.report_text import clean, finite, safe

HEADING = "By the length of the reference"
BUCKETED = ("validity", "coverage", "rouge_l", "exact_match", "reverse_kl")
"""The measures that are shown, where some model has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """What one evaluation says by length."""

    set: str
    """"" where there is one alone."""
    model: str
    unit: str
    """What was counted, such as "words of the first reference, split at white space"."""
    temperature: str
    without: int
    """Prompts without a reference, which are in no bucket."""
    buckets: Mapping[str, Mapping[str, Any]]

    @property
    def counted(self) -> str:
        """The unit in a word: words, or tokens."""
        return self.unit.partition(" ")[0]


def lengths(reports: Mapping[str, Mapping[str, Any]], colour: Mapping[str, int]) -> str:
    """Drawings and a table of combined results, by set ("" of a single one); "" where no evaluation says it.

    Lengths in words and lengths in tokens are no common axis: each unit has drawings and a table of its own.
    """
    splits = [split for name, found in reports.items() for split in _splits(name, found)]
    units = dict.fromkeys(split.unit for split in splits)
    return "".join(
        _of_unit([split for split in splits if split.unit == unit], colour, key=f"length-{number}")
        for number, unit in enumerate(units)
    ) + _unsaid(reports, splits)


def _splits(name: str, found: Mapping[str, Any]) -> Iterator[_Split]:
    for model, about in found["evaluations"].items():
        split = about.get("by_length") or {}
        if split.get("buckets"):
            yield _Split(
                set=name,
                model=model,
                unit=str(split.get("unit", "")),
                temperature=str(split.get("temperature", found["temperature"])),
                without=int(split.get("without_reference", 0)),
                buckets=split["buckets"],
            )


def _of_unit(splits: Sequence[_Split], colour: Mapping[str, int], *, key: str) -> str:
    names = [name for name in BUCKETED if any(_estimate(s, bucket, name) for s in splits for bucket in s.buckets)]
    sets = dict.fromkeys(split.set for split in splits)
    drawings = [
        _drawn(name, own, colour, key=f"{key}-{number}-{name}")
        for number, own in enumerate([split for split in splits if split.set == each] for each in sets)
        for name in names
    ]
    rows = [head_row(["", "prompts", *(MEASURES[name].label for name in names)])]
    for each in sets:
        own = [split for split in splits if split.set == each]
        for bucket in dict.fromkeys(bucket for split in own for bucket in split.buckets):
            rows += _rows(bucket, own, names)
    models = dict.fromkeys(split.model for split in splits)
    drawn = legend(list(models), colour) + grid([drawing for drawing in drawings if drawing])
    return drawn + scrolling("".join(rows)) + f"<p class='note'>{safe(_told(splits))}</p>"


def _rows(bucket: str, splits: Sequence[_Split], names: Sequence[str]) -> list[str]:
    """A row with the name of a bucket, and one for each model below it."""
    place = f"{splits[0].set}: " if splits[0].set else ""
    heading = safe(f"{place}{bucket} {splits[0].counted}")
    rows = [f'<tr class="part"><th scope="rowgroup" colspan="{2 + len(names)}"><span>{heading}</span></th></tr>']
    for split in (split for split in splits if bucket in split.buckets):
        cells = "".join(estimate_cell(_estimate(split, bucket, name), name) for name in names)
        rows.append(
            f'<tr><th scope="row">{safe(split.model)}</th><td>{safe(split.buckets[bucket]["prompts"])}</td>{cells}</tr>'
        )
    return rows


def _drawn(name: str, splits: Sequence[_Split], colour: Mapping[str, int], *, key: str) -> str:
    """The bars of one measure on one set; "" where no model has it."""
    groups = []
    for bucket in dict.fromkeys(bucket for split in splits for bucket in split.buckets):
        bars = []
        for split in splits:
            if (estimate := _estimate(split, bucket, name)) is not None:
                ends = estimate.get("ci95")
                reach = None if ends is None else (ends[0], ends[1])
                bars.append((clean(split.model), colour[split.model], estimate["mean"], reach))
        groups.append((clean(f"{bucket} {splits[0].counted}, {_prompts(bucket, splits)}"), bars))
    if not any(bars for _, bars in groups):
        return ""
    measure, place = MEASURES[name], f", {clean(splits[0].set)}" if splits[0].set else ""
    return plots.bar_groups(groups, key=key, title=f"{measure.label}{place}", digits=measure.digits)


def _estimate(split: _Split, bucket: str, name: str) -> Mapping[str, Any] | None:
    """A measure of a bucket, where it is a number."""
    found = ((split.buckets.get(bucket) or {}).get("measures") or {}).get(name) or {}
    return found if finite(found.get("mean")) else None


def _prompts(bucket: str, splits: Sequence[_Split]) -> str:
    """ "5 prompts", or "5 to 7 prompts" where models were asked for different ones."""
    counts = sorted({split.buckets[bucket]["prompts"] for split in splits if bucket in split.buckets})
    if counts == [0]:
        return "no prompt"
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{many} prompt" + ("" if counts == [1] else "s")


def _told(splits: Sequence[_Split]) -> str:
    """The unit, the temperature, what the intervals are of, and what is in no bucket."""
    hot: dict[str, list[str]] = {}
    for split in splits:
        hot.setdefault(split.temperature, []).append(_named(split))
    at = [key if len(hot) == 1 else f"{key} ({', '.join(names)})" for key, names in hot.items()]
    texts = [
        f"Length: {splits[0].unit}, at temperature {' and '.join(at)}.",
        "Intervals are 95 % bootstrap intervals over the prompts of the bucket; where it has one prompt there is none.",
    ]
    if bare := [f"{split.without} prompts of {_named(split)}" for split in splits if split.without]:
        texts.append(f"In no bucket, without a reference: {', '.join(bare)}.")
    return " ".join(texts)


def _named(split: _Split) -> str:
    return f"{split.model} on {split.set}" if split.set else split.model


def _unsaid(reports: Mapping[str, Mapping[str, Any]], splits: Sequence[_Split]) -> str:
    """Who is missing; "" where nobody says anything, since there is no section then."""
    there = {(split.set, split.model) for split in splits}
    absent = [
        f"{model} on {name}" if name else model
        for name, found in reports.items()
        for model in found["evaluations"]
        if (name, model) not in there
    ]
    if not splits or not absent:
        return ""
    verb = "is not here: its" if len(absent) == 1 else "are not here: their"
    told = f"{', '.join(absent)} {verb} results do not say it."
    return f"<p class='note'>{safe(told)}</p>"

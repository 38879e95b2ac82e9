"""A study as one HTML page in the look of the report: no script, nothing loaded, light or dark.

The tables that the command prints, and what they are hard to see in: differences with their intervals, quality over
variety, validations against the budget, kinds of prompts, and what tuning found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minillm import plots
from minillm.compare.words import probability
from minillm.measures import LENGTH_BUCKETS, MEASURES
from minillm.report_parts import frame, grid, head_row, legend, scrolling, section
from minillm.report_text import DASH, MINUS, clean, figure, interval, safe
from minillm.study import diversity, yardsticks
from minillm.study.config import StudyConfig
from minillm.study.curves import LABELS_AGAINST, courses_of, mean_course
from minillm.study.paired import excludes_zero, spread, stars
from minillm.study.table import Cells, words
from minillm.study.tuning import at_the_edge
from minillm.study.verdict import sentences

Found = Mapping[str, Any]
Change = Mapping[str, Any]
STYLE = """
td.picked { font-weight: 700; text-decoration: underline; text-underline-offset: .2em; }
tr.below th, tr.below td { color: var(--soft); } tr.below:first-of-type th { border-top: 2px solid var(--grid); }
"""
MADE_BY = "minillm study --html"
OVER_SEEDS = (
    "Below each difference: its 95 % interval over training seeds, by Student's t. * excludes zero; ** does so after "
    "Holm's correction over all arms and main measures, too."
)


def page(
    found: Found, study: StudyConfig, cells: Cells, *, shown: Sequence[str], against: str, notes: Sequence[str]
) -> str:
    """The whole page; ``shown`` are the measures of its first table, ``against`` what curves are drawn over."""
    colour = {arm: number for number, arm in enumerate(found["arms"])}
    parts = [_in_words(found, notes)]
    if found["temperature"] is not None:
        main = found["corrected"]["measures"]
        parts += [
            _figures(found, shown),
            _differences(found, main, colour),
            _temperatures(found, main),
            _equal_diversity(found, colour),
            _by_length(found, main, colour),
        ]
    parts += [
        _curves(cells, found.get("corrected", {}).get("measures", ()), colour, against),
        _failures(found),
        _tuning(found),
        _made(study, cells),
    ]
    content = "\n".join(part for part in parts if part)
    return frame(f"Study {study.name}", content, style=STYLE, made_by=MADE_BY)


def _said(lines: Sequence[str]) -> str:
    return f"<ul class='said-list'>{''.join(f'<li>{safe(line)}</li>' for line in lines)}</ul>"


def _note(text: str) -> str:
    return f"<p class='note'>{safe(text)}</p>"


def _folded(label: str, content: str) -> str:
    return f"<details><summary>{safe(label)}</summary>{content}</details>"


def _head(label: str, small: str = "") -> str:
    return f'<th scope="row">{safe(label)}{f"<small>{safe(small)}</small>" if small else ""}</th>'


def _in_words(found: Found, notes: Sequence[str]) -> str:
    none = [("Nothing yet", ["No cell is done."])]
    parts = none if found["temperature"] is None else sentences(found)
    parts += [("Notes", list(notes))] if notes else []
    return section("In words", "".join(f"<h3>{safe(label)}</h3>{_said(lines)}" for label, lines in parts))


def _level(mean: float | None, name: str, deviation: float | None) -> str:
    more = "" if deviation is None else f"<small>± {figure(deviation, name)}</small>"
    return f"<td>{figure(mean, name)}{more}</td>"


def _figures(found: Found, shown: Sequence[str]) -> str:
    """Means over the seeds, the yardsticks below them."""
    at = found["temperature"]
    rows = [head_row(["", "seeds", *(MEASURES[name].label for name in shown), "CPU s"])]
    for arm, of in found["arms"].items():
        own, cost = of["temperatures"].get(at, {}), of["cpu_seconds"]["mean"]
        levels = "".join(
            _level(own.get(name, {}).get("mean"), name, own.get(name, {}).get("sd")) for name in shown
        )  # fmt: skip
        failed = f"<small>{len(of['failed'])} failed</small>" if of["failed"] else ""
        spent = DASH if cost is None else f"{cost:.0f}"
        rows.append(f"<tr>{_head(arm)}<td>{len(of['done'])}{failed}</td>{levels}<td>{spent}</td></tr>")
    for name, yardstick in found["yardsticks"].items():
        own = yardsticks.at_temperature(yardstick, at)
        levels = "".join(_level(own.get(measure), measure, None) for measure in shown)
        label = _head(yardsticks.LABELS[name])
        rows.append(f'<tr class="below">{label}<td>{DASH}</td>{levels}<td>{DASH}</td></tr>')
    better = [f"{MEASURES[name].label}: {MEASURES[name].better}" for name in shown if MEASURES[name].better]
    said = f"Mean ± standard deviation over training seeds. Better is, in {', '.join(better)}."
    told = yardsticks.told(found["yardsticks"])
    return section(f"Temperature {at}", scrolling("".join(rows)) + _note(said) + (_said(told) if told else ""))


def _change(change: Change | None, name: str) -> str:
    if change is None or change["mean"] is None:
        return f"<td>{DASH}</td>"
    ends = "" if change["ci95"] is None else f"<small>{interval(change, name, signed=True)}</small>"
    if "p_holm" in change:
        ends += f"<small>{safe(probability(change['p']))}</small>"
        ends += f"<small>corrected {safe(probability(change['p_holm']).removeprefix('p ').removeprefix('= '))}</small>"
    kind = ' class="sure"' if excludes_zero(change) else ""
    return f"<td{kind}>{figure(change['mean'], name, signed=True)}{stars(change)}{ends}</td>"


def _others(found: Found) -> Iterator[tuple[str, Found]]:
    """The arms that are held against the one that all are compared with, and have figures."""
    for arm, of in found["arms"].items():
        if arm != found["compare_with"] and of["temperatures"]:
            yield arm, of


def _difference(of: Found, temperature: str, name: str) -> Change | None:
    change: Change | None = of["temperatures"].get(temperature, {}).get(name, {}).get("difference")
    return change


def _drawn(rows: Sequence[tuple[str, int, Change | None]], *, key: str, title: str, name: str) -> str:
    """A drawing of differences; "" without any."""
    there = [
        (clean(arm), colour, change["mean"], None if change["ci95"] is None else tuple(change["ci95"]), stars(change))
        for arm, colour, change in rows
        if change is not None and change["mean"] is not None
    ]
    return plots.differences(there, key=key, title=title, digits=MEASURES[name].digits) if there else ""


def _differences(found: Found, main: Sequence[str], colour: Mapping[str, int]) -> str:
    at, base = found["temperature"], found["compare_with"]
    others = list(_others(found))
    if not others:
        return ""
    drawings = [
        _drawn(
            [(arm, colour[arm], _difference(of, at, name)) for arm, of in others],
            key=f"less-{name}", title=f"{MEASURES[name].label}, {_way(name)}", name=name,
        )
        for name in main
    ]  # fmt: skip
    rows = [head_row(["", *(MEASURES[name].label for name in main)])]
    for arm, of in others:
        rows.append(f"<tr>{_head(arm)}{''.join(_change(_difference(of, at, name), name) for name in main)}</tr>")
    said = (
        f"Each arm less {base} of the same seed, at temperature {at}; pale ones hold 0 in their interval. {OVER_SEEDS}"
    )
    return section(
        f"Differences from {base}", _note(said) + grid([one for one in drawings if one]) + scrolling("".join(rows))
    )


def _way(name: str) -> str:
    better = MEASURES[name].better
    return f"{better} is better" if better else "neither way is better"


def _temperatures(found: Found, main: Sequence[str]) -> str:
    keys = list(dict.fromkeys(key for of in found["arms"].values() for key in of["temperatures"]))
    others = list(_others(found))
    if len(keys) < 2 or not others:
        return ""
    rows = [head_row(["", *(f"temperature {key}" for key in keys)])]
    for name in main:
        rows.append(_part(f"{MEASURES[name].label} {MINUS} that of {found['compare_with']}", 1 + len(keys)))
        for arm, of in others:
            changes = [_difference(of, key, name) for key in keys]
            bare = [change and {k: v for k, v in change.items() if k != "p_holm"} for change in changes]
            rows.append(f"<tr>{_head(arm)}{''.join(_change(change, name) for change in bare)}</tr>")
    return section(
        "At several temperatures", scrolling("".join(rows)) + _note("* excludes zero. Nothing here is corrected.")
    )


def _part(label: str, columns: int) -> str:
    return f'<tr class="part"><th scope="rowgroup" colspan="{columns}"><span>{safe(label)}</span></th></tr>'


def _equal_diversity(found: Found, colour: Mapping[str, int]) -> str:
    """Each arm where the other is as varied, and the curves that this is read off."""
    equal, base = found["equal_diversity"], found["compare_with"]
    if not equal["arms"]:
        return ""
    label, at = MEASURES[equal["diversity"]].label, equal["temperature"]
    rows = [head_row(["", "seeds", "temperature", *(MEASURES[name].label for name in equal["measures"])])]
    for arm, of in equal["arms"].items():
        left, mean = len(of["left_out"]), of["mean_temperature"]
        cells = f"<td>{len(of['temperatures'])}{f'<small>{left} left out</small>' if left else ''}</td>"
        cells += f"<td>{DASH if mean is None else f'{mean:.2f}'}</td>"
        rows.append(
            f"<tr>{_head(arm)}{cells}{''.join(_change(of['differences'][n], n) for n in equal['measures'])}</tr>"
        )
    said = (
        f"Each arm at temperature {at} less {base} of the same seed at the temperature at which that has the same "
        f"{label}. A model that is only sharper has 0 here. * excludes zero; nothing here is corrected."
    )
    drawings = [_over_variety(found, name, colour) for name in equal["measures"]]
    lost = diversity.left_out(equal, compare_with=base)
    without = _folded("Seeds that are left out", _said(lost)) if lost else ""
    drawn = legend(list(colour), colour) + grid(drawings)
    more = _note(f"The plots have a point for each temperature, means over seeds; those of {base} are named.")
    return section(f"At equal {label}", _note(said) + scrolling("".join(rows)) + drawn + more + without)


def _over_variety(found: Found, name: str, colour: Mapping[str, int]) -> str:
    over, series = found["equal_diversity"]["diversity"], []
    for arm, of in found["arms"].items():
        points = [
            (at[over]["mean"], at[name]["mean"], key)
            for key, at in of["temperatures"].items()
            if over in at and name in at
        ]
        if points:
            x, y, labels = zip(*points, strict=True)
            named = labels if arm == found["compare_with"] else ()
            series.append(plots.Series(colour=colour[arm], x=x, y=y, labels=named))
    title = f"{MEASURES[name].label} against variety"
    return plots.lines(series, key=f"over-{name}", title=title, x=MEASURES[over].label, y="")


def _by_length(found: Found, main: Sequence[str], colour: Mapping[str, int]) -> str:
    """Bars of each measure by the words of the reference, and the differences there."""
    at = found["temperature"]
    arms = {arm: of["temperatures"].get(at, {}).get("by_length", {}) for arm, of in found["arms"].items()}
    buckets = [name for name in LENGTH_BUCKETS if any(own.get(name) for own in arms.values())]
    drawings = []
    for measure in main:
        for number, bucket in enumerate(buckets):
            there = {arm: own[bucket][measure] for arm, own in arms.items() if measure in own.get(bucket, {})}
            bars = [(clean(arm), colour[arm], of["mean"], _reach(of)) for arm, of in there.items()]
            title = f"{MEASURES[measure].label}, {bucket} words"
            if bars:
                key, digits = f"length-{measure}-{number}", MEASURES[measure].digits
                drawings.append(plots.bars(bars, key=key, title=title, digits=digits))
    if not drawings:
        return ""
    rows = [head_row(["", *(f"{bucket} words" for bucket in buckets)])]
    for measure in main:
        rows.append(_part(f"{MEASURES[measure].label} {MINUS} that of {found['compare_with']}", 1 + len(buckets)))
        for arm, _ in _others(found):
            changes = [arms[arm].get(bucket, {}).get(measure, {}).get("difference") for bucket in buckets]
            rows.append(f"<tr>{_head(arm)}{''.join(_change(change, measure) for change in changes)}</tr>")
    said = (
        f"By the words of the reference, at temperature {at}. Bars: means over seeds, with one standard deviation to "
        "each side. Table: differences by seed with their intervals; nothing there is corrected."
    )
    table = _folded("Differences by length", scrolling("".join(rows)))
    return section("By length of the reference", _note(said) + grid(drawings) + table)


def _reach(of: Found) -> tuple[float, float] | None:
    return None if of["sd"] is None else (of["mean"] - of["sd"], of["mean"] + of["sd"])


def _curves(cells: Cells, main: Sequence[str], colour: Mapping[str, int], against: str) -> str:
    """What validation said while the arms were trained, against what training had taken."""
    drawings, drawn = [], dict[str, None]()
    for name in (*main, "loss"):
        series = []
        for arm, of_arm in cells.items():
            if courses := courses_of(of_arm, name, against):
                x, y = zip(*mean_course(courses), strict=True)
                series.append(plots.Series(colour=colour[arm], x=x, y=y))
                drawn[arm] = None
        if series:
            label = MEASURES[name].label if name in MEASURES else name
            drawings.append(
                plots.lines(series, key=f"course-{name}", title=label, x=LABELS_AGAINST[against], y="")
            )  # fmt: skip
    if not drawings:
        return ""
    order = [arm for arm in cells if arm in drawn]
    missing = [arm for arm in cells if arm not in drawn]
    said = f"Means over seeds on the validation prompts, against {LABELS_AGAINST[against]}."
    said += f" Without {', '.join(missing)}, whose cells do not say." if missing else ""
    return section("While training", legend(order, colour) + grid(drawings) + _note(said))


def _failures(found: Found) -> str:
    lines = words(found) or ["No cell failed, and no alarm rang."]
    return section("Budgets, failed cells, alarms", _said(lines))


def _tuning(found: Found) -> str:
    """What the budget and the search settled for each arm, every value that was tried with what it came to."""
    tuning = found["tuning"]
    if not tuning:
        return ""
    values = list(dict.fromkeys(each["value"] for of in tuning.values() for each in of.get("tries", [])))
    settings = list(dict.fromkeys(path for of in tuning.values() for path in of["settings"]))
    rows = [
        head_row(
            ["", *(path.rpartition(".")[2] for path in settings), *(f"{value:g} tried" for value in sorted(values))]
        )
    ]
    metric = ""
    for arm, of in tuning.items():
        search = of["asked"].get("search", {})
        metric = search.get("metric", metric)
        cells = "".join(_settled(of["settings"].get(path), of, path) for path in settings)
        tries = {each["value"]: each for each in of.get("tries", [])}
        best = of["settings"].get(search.get("setting"))
        cells += "".join(_try(tries.get(value), metric, picked=value == best) for value in values)
        rows.append(f"<tr>{_head(arm)}{cells}</tr>")
    said = f"What was settled: {', '.join(settings)}."
    if metric:
        label = MEASURES[metric].label
        said += f" What was tried: {label} on the validation prompts, of one run each; underlined: taken."
        said += " Beyond the edge of what was tried there may be a better one."
    if any("refined" in of for of in tuning.values()):
        said += " Steps are those by which the taken try's cost meets the budget; tries had those of a pilot."
    return section("What tuning found", scrolling("".join(rows)) + _note(said))


def _settled(value: Any, of: Found, path: str) -> str:
    if value is None:
        return f"<td>{DASH}</td>"
    search = of["asked"].get("search", {})
    edge = path == search.get("setting") and at_the_edge(value, search["values"])
    return f"<td>{value:g}{'<small>at the edge</small>' if edge else ''}</td>"


def _try(tried: Found | None, metric: str, *, picked: bool) -> str:
    if tried is None:
        return f"<td>{DASH}</td>"
    told = "failed" if tried[metric] is None else figure(tried[metric], metric)
    return f'<td class="picked">{told}</td>' if picked else f"<td>{told}</td>"


def _made(study: StudyConfig, cells: Cells) -> str:
    """The study's settings, those of each arm, and what the cells say of themselves."""
    own = study.model_dump(mode="json", exclude={"arms"}, exclude_none=True)
    told: list[tuple[str, Any]] = [("settings of the study", own)]
    told.append(("what each arm replaces", study.arms))
    done = [cell for of_arm in cells.values() for cell in of_arm.values()]
    about = {
        "cells": len(done),
        "dates": sorted({cell["date"] for cell in done if "date" in cell}),
        "versions": [json.loads(one) for one in sorted({json.dumps(cell.get("versions")) for cell in done})],
        "code": sorted({str(cell.get("code")) for cell in done}),
        "tokens of responses, by arm": {
            arm: spread([cell["training"]["tokens"] for cell in of_arm.values()])["mean"]
            for arm, of_arm in cells.items()
        },
    }
    parts = []
    for name, value in [*told, ("what the cells were made by", about)]:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        parts.append(_folded(name, f'<pre tabindex="0">{safe(text)}</pre>'))
    return section("How it was made", "".join(parts))

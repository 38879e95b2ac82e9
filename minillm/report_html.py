"""The report as one HTML page: no script, nothing loaded from anywhere, light or dark as the reader's system is.

Whatever came out of a model or a file is cleaned of control characters and escaped before it is put on the page,
and a content policy in the page's head forbids scripts and every request besides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minillm import plots
from minillm.measures import MEASURES, QUALITIES, shown
from minillm.report_extras import chapters, without_curves
from minillm.report_files import Course
from minillm.report_lengths import HEADING, lengths
from minillm.report_parts import estimate_cell, frame, grid, head_row, legend, scrolling, section
from minillm.report_samples import samples_shown
from minillm.report_text import (
    DASH,
    MINUS,
    at_each_temperature,
    clean,
    figure,
    finite,
    interval,
    reading,
    safe,
)
from minillm.report_words import describe

CURVES = ("reverse_kl", "validity", "coverage", "mean_length", "repetition_3", "loss")
OVER_TEMPERATURE = ("validity", "coverage", "reverse_kl", "distinct_4", "rouge_l")


def page(
    combined: Mapping[str, Any],
    *,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    courses: Mapping[str, Course],
    title: str,
    settings: Mapping[str, Any],
) -> str:
    """The whole page. Sections without anything to show say so or are left out."""
    words = section("In words", "".join(f"<p>{safe(text)}</p>" for text in describe(combined)))
    below, filters = body(combined, samples=samples, courses=courses, settings=settings)
    return frame(title, f"{words}\n{below}", style=filters)


def body(
    combined: Mapping[str, Any],
    *,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    courses: Mapping[str, Course],
    settings: Mapping[str, Any],
) -> tuple[str, str]:
    """The sections below the words ("" where there is nothing at all), and the style that their filters need."""
    names = [*combined["models"], *(name for name in courses if name not in combined["models"])]
    colour = {name: number for number, name in enumerate(names)}
    cards, filters = samples_shown(samples, colour, main=combined.get("temperature", ""))
    content = "\n".join(
        part
        for part in (
            _figures(combined, colour),
            _temperatures(combined, colour),
            section(HEADING, lengths({"": combined}, colour)),
            _extras(combined, colour),
            _training(courses, colour),
            section("Samples", cards),
            _about(combined, settings),
        )
        if part
    )
    return content, filters


def _change_cell(change: Mapping[str, Any] | None, name: str) -> str:
    if change is None or change.get("mean") is None:
        return f"<td>{DASH}</td>"
    ends = f"<small>{interval(change, name, signed=True)}</small><small>{reading(change)}</small>"
    ends = "" if change["ci95"] is None else ends
    kind = ' class="sure"' if reading(change) == "excludes zero" else ""
    return f"<td{kind}>{figure(change['mean'], name, signed=True)}{ends}</td>"


def _figures(combined: Mapping[str, Any], colour: Mapping[str, int]) -> str:
    """The tables and the bars at the main temperature."""
    models = combined["models"]
    if not models:
        return ""
    main, more = shown(models)
    drawings = [drawing for name in main if (drawing := _bars(models, name, colour))]
    return section(
        f"Held-out prompts, temperature {combined['temperature']}",
        _measure_table(combined, main)
        + "<p class='note'>Below each figure: its 95 % bootstrap interval over prompts.</p>"
        + grid(drawings)
        + (f"<h3>More measures</h3>{_measure_table(combined, more)}" if more else ""),
    )


def _measure_table(combined: Mapping[str, Any], names: Sequence[str]) -> str:
    models, pairs = combined["models"], combined["pairs"]
    rows = [head_row(["", *models, *(f"{left} {MINUS} {right}, paired" for left, right in pairs.values())])]
    meanings = []
    for name in names:
        measure = MEASURES[name]
        way = f", {measure.better} is better" if measure.better else ""
        cells = [estimate_cell(measures.get(name), name) for measures in models.values()]
        cells += [_change_cell(combined["differences"][pair].get(name), name) for pair in pairs]
        head = f'<th scope="row">{safe(measure.label)}<small>{safe(measure.meaning + way)}</small></th>'
        rows.append(f'<tr class="told">{head}{"".join(cells)}</tr>')
        meanings.append(f"<dt>{safe(measure.label)}</dt><dd>{safe(measure.meaning + way)}</dd>")
    # The meanings again, for pages too narrow to have them in the table.
    return scrolling("".join(rows)) + f'<dl class="meanings">{"".join(meanings)}</dl>'


def _bars(models: Mapping[str, Any], name: str, colour: Mapping[str, int]) -> str:
    rows = []
    for model, measures in models.items():
        estimate = measures.get(name) or {}
        if estimate.get("mean") is not None:
            ends = None if estimate.get("ci95") is None else (estimate["ci95"][0], estimate["ci95"][1])
            rows.append((clean(model), colour[model], estimate["mean"], ends))
    if not rows:
        return ""
    return plots.bars(rows, key=f"bar-{name}", title=MEASURES[name].label, digits=MEASURES[name].digits)


def _temperatures(combined: Mapping[str, Any], colour: Mapping[str, int]) -> str:
    """Each measure over temperature, quality against variety, and the table behind them; "" with one temperature."""
    if len(combined["temperatures"]) <= 1:
        return ""
    drawings = [drawing for name in OVER_TEMPERATURE if (drawing := _over_temperature(combined, name, colour))]
    scatter = _against_variety(combined, colour)
    note = (
        "<p class='note'>The last plot has one point for each temperature. A lower one as a rule makes a model more "
        "often right and less varied: left and up along its own line. A better model has a line that lies higher; "
        "a model that is only sharper has its points further along the same line.</p>"
    )
    plotted = grid([*drawings, scatter] if scatter else drawings)
    return section(
        "At several temperatures",
        legend(list(combined["models"]), colour) + plotted + (note if scatter else "") + _temperature_table(combined),
    )


def _temperature_table(combined: Mapping[str, Any]) -> str:
    pairs = combined["pairs"]
    rows = [head_row(["", *combined["models"], *(f"{left} {MINUS} {right}" for left, right in pairs.values())])]
    for key, found in combined["temperatures"].items():
        width = 1 + len(combined["models"]) + len(pairs)
        rows.append(
            f'<tr class="part"><th scope="rowgroup" colspan="{width}"><span>temperature {safe(key)}</span></th></tr>'
        )
        for name in at_each_temperature(combined):
            cells = [estimate_cell(found["models"].get(m, {}).get(name), name) for m in combined["models"]]
            cells += [_change_cell(found["differences"].get(pair, {}).get(name), name) for pair in pairs]
            rows.append(f'<tr><th scope="row">{safe(MEASURES[name].label)}</th>{"".join(cells)}</tr>')
    return scrolling("".join(rows))


def _points(
    combined: Mapping[str, Any], model: str, names: Sequence[str]
) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(temperature, the estimates of the named measures) wherever a model has all of them."""
    for key, found in combined["temperatures"].items():
        estimates = [found["models"].get(model, {}).get(name, {}) for name in names]
        if all(estimate.get("mean") is not None for estimate in estimates):
            yield key, estimates


def _over_temperature(combined: Mapping[str, Any], name: str, colour: Mapping[str, int]) -> str:
    series = []
    for model in combined["models"]:
        found = [(float(key), estimates[0]) for key, estimates in _points(combined, model, [name])]
        if not found:
            continue
        bounded = all(estimate.get("ci95") is not None for _, estimate in found)
        series.append(
            plots.Series(
                colour=colour[model],
                x=tuple(temperature for temperature, _ in found),
                y=tuple(estimate["mean"] for _, estimate in found),
                low=tuple(estimate["ci95"][0] for _, estimate in found) if bounded else None,
                high=tuple(estimate["ci95"][1] for _, estimate in found) if bounded else None,
            )
        )
    label = MEASURES[name].label
    return plots.lines(series, key=f"t-{name}", title=label, x="temperature", y="") if series else ""


def _against_variety(combined: Mapping[str, Any], colour: Mapping[str, int]) -> str:
    """Validity (coverage, or ROUGE-L, where there is none) against distinct-4, a point for each temperature."""
    for name in QUALITIES:
        series = []
        for model in combined["models"]:
            found = list(_points(combined, model, [name, "distinct_4"]))
            if found:
                series.append(
                    plots.Series(
                        colour=colour[model],
                        x=tuple(estimates[1]["mean"] for _, estimates in found),
                        y=tuple(estimates[0]["mean"] for _, estimates in found),
                        labels=tuple(key for key, _ in found),
                    )
                )
        if series:
            title = f"{MEASURES[name].label} against variety, by temperature"
            return plots.lines(series, key="variety", title=title, x="distinct-4", y=MEASURES[name].label)
    return ""


def _extras(combined: Mapping[str, Any], colour: Mapping[str, int]) -> str:
    """Exposure bias and calibration, where some evaluation measured them."""
    parts = []
    for chapter in chapters(combined["evaluations"], colour):
        # The second column is words in both chapters: to the left, and broken where it is long.
        rows = [head_row(chapter.head, words=1)]
        for name, what, *cells in chapter.rows:
            figures = "".join(f"<td>{safe(cell)}</td>" for cell in cells)
            rows.append(f'<tr><th scope="row">{safe(name)}</th><td class="text">{safe(what)}</td>{figures}</tr>')
        drawn = legend(chapter.models, colour) + grid(chapter.drawings) if chapter.drawings else ""
        note = f"<p class='note'>{safe(chapter.note)}</p>"
        parts.append(section(chapter.heading, drawn + scrolling("".join(rows)) + note))
    return "\n".join(parts)


def _training(courses: Mapping[str, Course], colour: Mapping[str, int]) -> str:
    """Curves over the steps of each stage, one plot for each measure and stage name."""
    if not courses:
        return ""
    notes = [f"{name}: {note}" for name, course in courses.items() for note in course.notes]
    stages = dict.fromkeys(str(row.get("stage", "")) for course in courses.values() for row in course.rows)
    drawings: list[str] = []
    shown: set[str] = set()
    for name in CURVES:
        having = [stage for stage in stages if any(_curves(course, stage, name) for course in courses.values())]
        for stage in having:
            series = [
                _drawn(points, colour[run], kind=kind, notes=notes, what=f"{run}, {name}")
                for run, course in courses.items()
                for kind, points in _curves(course, stage, name).items()
            ]
            shown.update(run for run, course in courses.items() if _curves(course, stage, name))
            label = MEASURES[name].label if name in MEASURES else name
            title = label if len(having) == 1 else f"{label}, stage {clean(stage)}"
            drawings.append(plots.lines(series, key=f"run-{len(drawings)}", title=title, x="step", y=""))
    missing = [run for run in courses if run not in shown]
    if missing:
        notes.append(f"nothing to draw for {', '.join(missing)}")
    told = "<p class='note'>Pale lines: training steps, on the text that was trained on. Marked lines: validation.</p>"
    if notes:
        told += f"<p class='note'>{safe('; '.join(dict.fromkeys(notes)))}.</p>"
    return section("Training", legend([run for run in courses if run in shown], colour) + grid(drawings) + told)


def _curves(course: Course, stage: str, name: str) -> dict[str, list[tuple[float, float]]]:
    """{"train" | "validation": points} of one measure in one stage; kinds without a number left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in course.rows:
        if str(row.get("stage", "")) == stage and isinstance(row.get(name), int | float):
            found.setdefault(str(row.get("kind")), []).append((float(row.get("step", 0)), float(row[name])))
    return found


def _drawn(
    points: Sequence[tuple[float, float]], colour: int, *, kind: str, notes: list[str], what: str
) -> plots.Series:
    """A curve of finite points, averaged in blocks where there are very many; what was done is added to the notes."""
    kept = [(x, y) for x, y in points if finite(y)]
    if len(kept) < len(points):
        notes.append(f"{what}: {len(points) - len(kept)} values are not finite numbers and are not drawn")
    x, y, block = plots.block_means([x for x, _ in kept], [y for _, y in kept])
    if block > 1:
        notes.append(f"{what}: drawn as means of {block} steps")
    return plots.Series(colour=colour, x=x, y=y, faint=kind == "train")


def _about(combined: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Seconds, settings and what each evaluation says about itself."""
    parts = []
    if combined["seconds"]:
        rows = "".join(
            f'<tr><th scope="row">{safe(stage)}</th><td>{seconds:.1f}</td></tr>'
            for stage, seconds in combined["seconds"].items()
        )
        parts.append(f"<h3>Seconds</h3>{scrolling(rows)}")
    told = [("settings", settings)] if settings else []
    told += [(f"evaluation of {name}", without_curves(about)) for name, about in combined["evaluations"].items()]
    for name, values in told:
        text = json.dumps(values, indent=2, ensure_ascii=False, default=str)
        parts.append(f'<details><summary>{safe(name)}</summary><pre tabindex="0">{safe(text)}</pre></details>')
    return section("How it was made", "".join(parts))

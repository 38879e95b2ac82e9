"""The comparison as one HTML page in the look of the report: no script, nothing loaded, light or dark.

Whatever a model or a file said is cleaned and escaped. The filters of the samples are radio buttons that the style
sheet looks at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from minillm import plots
from minillm.compare.tables import net_share, temperature
from minillm.compare.words import describe, probability
from minillm.measures import LENGTH_BUCKETS, MEASURES
from minillm.report_parts import frame, head_row, scrolling, section
from minillm.report_samples import answer, choice, text_block
from minillm.report_text import DASH, MINUS, clean, figure, finite, interval, reading, safe

Pair = Mapping[str, Any]
BAR, HEIGHT = 220, 18
"""Width and height of an interval's drawing, in its own units."""
LENGTHS = tuple(LENGTH_BUCKETS)
STYLE = """
td.bar { min-width: 9rem; padding-top: .55rem; } td svg { width: 11rem; max-width: 11rem; margin-left: auto; }
td.under svg { width: 8.5rem; margin-top: .2rem; } td.under { min-width: 9.5rem; }
.zero { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 2; }
.reach { stroke: var(--c2); stroke-width: 5; } .reach.no { stroke: var(--c0); opacity: .75; }
.at { fill: var(--ink); }
.show-other:checked ~ article.ahead-base, .show-base:checked ~ article.ahead-other { display: none; }
.show-l0:checked ~ article:not(.l0), .show-l1:checked ~ article:not(.l1), .show-l2:checked ~ article:not(.l2)
  { display: none; }
@media print { td.bar, td.under { min-width: 0; } td svg { width: 8rem; } td.under svg { width: 5rem; } }
"""


def page(found: Mapping[str, Any], *, title: str) -> str:
    """The whole page."""
    colour = {name: number for number, name in enumerate(found["names"])}
    words = "".join(
        f"<h3>{safe(heading)}</h3><ul class='said-list'>{''.join(f'<li>{safe(text)}</li>' for text in sentences)}</ul>"
        for heading, sentences in describe(found)
    )
    parts = [section("In words", words)]
    several = len(found["names"]) > 2
    for number, pair in enumerate(found["comparisons"]):
        parts.append(
            section(
                f"{pair['other']} {MINUS} {pair['base']}",
                f"<p class='note'>{safe(_about(pair, found))}</p>"
                + _changes(pair, several=several)
                + _wins(pair)
                + _diversity(pair, colour, key=f"diversity-{number}")
                + _temperatures(pair)
                + _groups(pair)
                + _samples(pair, colour, key=f"p{number}"),
            )
        )
    parts.append(_made(found))
    return frame(title, "\n".join(part for part in parts if part), style=STYLE)


def bar(change: Mapping[str, Any], *, reach: float, label: str) -> str:
    """An interval as a bar beside a line at 0, on an axis from -reach to +reach; "" without one."""
    ends = change.get("ci95")
    if ends is None or not all(map(finite, ends)):
        return ""

    def x(value: float) -> float:
        return round(BAR / 2 + (BAR / 2 - 6) * (value / reach if reach > 0 else 0.0), 1)

    kind = "reach" if reading(change) == "excludes zero" else "reach no"
    middle = HEIGHT / 2
    return (
        f'<svg viewBox="0 0 {BAR} {HEIGHT}" role="img" aria-label="{safe(label)}">'
        f'<path class="zero" d="M{BAR / 2} 0V{HEIGHT}"/>'
        f'<path class="{kind}" d="M{x(ends[0])} {middle}H{max(x(ends[1]), x(ends[0]) + 0.5)}"/>'
        f'<rect class="at" x="{x(change["mean"]) - 1.5}" y="{middle - 6}" width="3" height="12"/></svg>'
    )


def _about(pair: Pair, found: Mapping[str, Any]) -> str:
    return (
        f"{found['prompts']} prompts, {temperature(pair)}. Right of the dashed line {pair['other']} has more; grey "
        "bars hold 0. Bars of one measure share a scale in each table."
    )


def _reach(changes: Sequence[Mapping[str, Any] | None]) -> float:
    """The farthest end of the intervals from 0."""
    ends = [abs(end) for change in changes if change and change.get("ci95") for end in change["ci95"]]
    return max([end for end in ends if math.isfinite(end)], default=0.0)


def _drawn(change: Mapping[str, Any], name: str, *, reach: float) -> str:
    says = f"{MEASURES[name].label}: {figure(change['mean'], name, signed=True)}, {interval(change, name, signed=True)}"
    return bar(change, reach=reach, label=says)


def _change_cell(change: Mapping[str, Any], name: str, *, reach: float | None = None) -> str:
    """A difference with its interval, and with its bar below where the reach of the bars is given."""
    ends = "" if change["ci95"] is None else f"<small>{interval(change, name, signed=True)}</small>"
    below = "" if reach is None else _drawn(change, name, reach=reach)
    kinds = ["sure"] * (reading(change) == "excludes zero") + ["under"] * bool(below)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{kind}>{figure(change['mean'], name, signed=True)}{ends}{below}</td>"


def _row_head(label: str, small: str = "") -> str:
    return f'<th scope="row">{safe(label)}{f"<small>{safe(small)}</small>" if small else ""}</th>'


def _changes(pair: Pair, *, several: bool) -> str:
    rows = [head_row(["", pair["base"], pair["other"], "difference", "95 % interval", *["corrected"] * several])]
    for name, change in pair["changes"].items():
        better = MEASURES[name].better
        cells = "".join(f"<td>{figure(change[side], name)}</td>" for side in ("base", "other"))
        cells += f'{_change_cell(change, name)}<td class="bar">{_drawn(change, name, reach=_reach([change]))}</td>'
        if several:
            cells += f"<td>{probability(change['holm']) if 'holm' in change else DASH}</td>".replace(
                "<td>p <", "<td>p &lt;"
            )
        rows.append(f"<tr>{_row_head(MEASURES[name].label, f'{better} is better' if better else '')}{cells}</tr>")
    return scrolling("".join(rows))


def _wins(pair: Pair) -> str:
    rows = [head_row(["prompts", f"{pair['other']} better", "level", "worse", "net share", "", "sign test"])]
    kept = {name: found for name, found in pair["wins"].items() if found["prompts"]}
    for name, found in kept.items():
        cells = "".join(
            f"<td>{found[what]}<small>{share:.0%}</small></td>"
            for what, share in zip(("wins", "ties", "losses"), found["shares"], strict=True)
        )
        net = {"mean": found["net"], "ci95": found["ci95"]}
        drawn = bar(net, reach=_reach([net]), label=f"net share {net_share(found)}")
        cells += (
            f'<td>{safe(net_share(found))}</td><td class="bar">{drawn}</td><td>{safe(probability(found["p"]))}</td>'
        )
        rows.append(f"<tr>{_row_head(MEASURES[name].label)}{cells}</tr>")
    return f"<h3>Wins and losses</h3>{scrolling(''.join(rows))}" if kept else ""


def _table(title: str, first: str, lines: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str:
    """A row for each line, a cell for each measure: the difference and, below it, its bar, scaled over the lines."""
    reach = {name: _reach([changes.get(name) for changes in lines.values()]) for name in names}
    rows = [head_row([first, *(MEASURES[name].label for name in names)])]
    for label, changes in lines.items():
        cells = "".join(
            _change_cell(changes[name], name, reach=reach[name]) if name in changes else f"<td>{DASH}</td>"
            for name in names
        )
        rows.append(f"<tr>{_row_head(label)}{cells}</tr>")
    return f"<h3>{safe(title)}</h3>{scrolling(''.join(rows))}"


def _temperatures(pair: Pair) -> str:
    if len(pair["temperatures"]) < 2:
        return ""
    return _table("At each temperature", "temperature", pair["temperatures"], list(pair["wins"]))


def _groups(pair: Pair) -> str:
    lines = {f"{label} ({of['prompts']})": of["changes"] for label, of in pair["groups"].items()}
    return _table("By kind of prompt", "prompts", lines, list(pair["wins"])) if lines else ""


def _diversity(pair: Pair, colour: Mapping[str, int], *, key: str) -> str:
    """The curves of both models, a point for each temperature."""
    drawings = []
    for name, found in pair["equal_diversity"].items():
        series = []
        for side, points in zip(("base", "other"), found["points"], strict=True):
            kept = [(label, x, y) for label, (x, y) in points.items() if x is not None and y is not None]
            kept.sort(key=lambda point: point[1])
            if kept:
                labels, x, y = zip(*kept, strict=True)
                series.append(plots.Series(colour=colour[pair[side]], x=x, y=y, labels=labels))
        if series and found["range"] is not None:
            label = MEASURES[name].label
            drawings.append(
                plots.lines(
                    series,
                    key=f"{key}-{name}",
                    title=f"{label} at equal diversity",
                    x=MEASURES[found["over"]].label,
                    y=label,
                )
            )
    if not drawings:
        return ""
    legend = "".join(
        f'<li><i class="k{colour[pair[side]] % plots.COLOURS}"></i>{safe(pair[side])}</li>'
        for side in ("base", "other")
    )
    figures = "".join(f"<figure>{drawing}</figure>" for drawing in drawings)
    return f'<h3>At equal diversity</h3><ul class="legend">{legend}</ul><div class="plots">{figures}</div>'


def _samples(pair: Pair, colour: Mapping[str, int], *, key: str) -> str:
    """The most different prompts side by side, with filters by who is ahead and by length."""
    cards = [(side, one) for side in ("other", "base") for one in pair["extremes"][side]]
    if not cards:
        return ""
    lengths = [name for name in LENGTHS if any(one["length"] == name for _, one in cards)]
    choices = [("all", "both"), ("other", f"{clean(pair['other'])} ahead"), ("base", f"{clean(pair['base'])} ahead")]
    filters = "<span>who is ahead</span>" + "".join(
        choice(f"{key}-who", kind, label, checked=kind == "all") for kind, label in choices
    )
    if len(lengths) > 1:
        filters += "<br><span>reference</span>" + choice(f"{key}-length", "any", "of any length", checked=True)
        filters += "".join(choice(f"{key}-length", f"l{LENGTHS.index(name)}", f"{name} words") for name in lengths)
    shown = "".join(_card(pair, side, one, colour) for side, one in cards)
    note = (
        "The prompts that differ most, chosen by result: they show what the difference is made of, not what is usual. "
        "Of each prompt the sampling seed at which the two differ most."
    )
    return f"<h3>Where they differ most</h3><p class='note'>{note}</p><div class='filters'>{filters}{shown}</div>"


def _card(pair: Pair, side: str, one: Mapping[str, Any], colour: Mapping[str, int]) -> str:
    base, other = one["rows"]
    references = [str(text) for text in base.get("references") or []]
    wanted = "".join(f'<div class="said"><b>reference</b>{text_block(text)}</div>' for text in references[:2])
    length = f" l{LENGTHS.index(one['length'])}" if one["length"] in LENGTHS else ""
    return (
        f'<article class="ahead-{side}{length}"><h3>{safe(one["uid"])}: {safe(pair[side])} ahead</h3>'
        f'<div class="prompt">{text_block(base["prompt"])}</div><div class="answers">{wanted}'
        f"{answer(pair['base'], base, colour)}{answer(pair['other'], other, colour)}</div></article>"
    )


def _made(found: Mapping[str, Any]) -> str:
    told = [("options", found["options"]), *((f"evaluation of {n}", v) for n, v in found["evaluations"].items())]
    parts = []
    for name, values in told:
        text = json.dumps(values, indent=2, ensure_ascii=False, default=str)
        parts.append(f'<details><summary>{safe(name)}</summary><pre tabindex="0">{safe(text)}</pre></details>')
    return section("How it was made", "".join(parts))

"""Reports of evaluations on several sets: one report a set, and a page that has them in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.errors import DataError
from minillm.measures import MAIN, MEASURES
from minillm.report_files import set_folders
from minillm.report_lengths import HEADING, lengths
from minillm.report_parts import estimate_cell, frame, head_row, scrolling, section
from minillm.report_text import DASH, figure, plain, safe

if TYPE_CHECKING:
    from rich.console import Console

PAGE = "report.html"


def by_set(evaluations: Mapping[str, Path]) -> dict[str, dict[str, Path]]:
    """Set -> the folders of those that were evaluated on it; {"": evaluations} where none of them lists sets.

    Raises ``DataError`` where only some do: one set has no row among several.
    """
    each = {name: set_folders(Path(folder)) for name, folder in evaluations.items()}
    single = [name for name, folders in each.items() if "" in folders]
    if not each or len(single) == len(each):
        return {"": dict(evaluations)}
    if single:
        several = next(name for name in each if name not in single)
        raise DataError(
            f"{single[0]} is an evaluation on one source and {several} one on the sets {', '.join(each[several])}; "
            f"wanted the same of all: name the folder of a set, such as {several}={each[several].popitem()[1]}"
        )
    sets = list(dict.fromkeys(name for folders in each.values() for name in folders))
    return {name: {model: folders[name] for model, folders in each.items() if name in folders} for name in sets}


def chosen_pairs(
    differences: Sequence[tuple[str, str]], sets: Mapping[str, Mapping[str, Path]], name: str
) -> list[tuple[str, str]]:
    """The differences of a set: those of two models that have it. One of models that share no set, or of a model that
    is not there, stays, and is told by whoever makes it."""
    there = {model for models in sets.values() for model in models}

    def kept(pair: tuple[str, str]) -> bool:
        shared = any(set(pair) <= set(models) for models in sets.values())
        return set(pair) <= set(sets[name]) or not (shared and set(pair) <= there)

    return [pair for pair in differences if kept(pair)]


def overview(reports: Mapping[str, Mapping[str, Any]], *, title: str, more: str = "") -> str:
    """One page with a row for each set and model, linked to each report, and the measures by length."""
    content = scrolling("".join([head_row(["set", "model", *_labels(reports)], words=1), *_rows(reports)]))
    note = (
        "<p class='note'>At the headline temperature, with 95 % intervals over the prompts of the set. Sets are not "
        "averaged: they have other prompts, other lengths and other numbers of rows.</p>"
    )
    models = dict.fromkeys(model for found in reports.values() for model in found["models"])
    colour = {model: number for number, model in enumerate(models)}
    parts = [
        section("All sets", content + note),
        section(HEADING, lengths(reports, colour)),
        more,
    ]
    return frame(title, "\n".join(part for part in parts if part))


def print_overview(reports: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """The same table, without intervals, in a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("All sets", style="bold"), box=SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    for number, column in enumerate(["set", "model", *_labels(reports)]):
        table.add_column(Text(plain(column)), justify="right" if number > 1 else "left", overflow="fold")
    for name, found in reports.items():
        for model, measures in found["models"].items():
            cells = [figure((measures.get(each) or {}).get("mean"), each) for each in _shown(reports)]
            table.add_row(*(Text(plain(text)) for text in (name, model, *cells)))
    console.print(table)


def _shown(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those of the main measures that some set has."""
    models = [measures for found in reports.values() for measures in found["models"].values()]
    return [name for name in MAIN if any(measures.get(name, {}).get("mean") is not None for measures in models)]


def _labels(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [MEASURES[name].label for name in _shown(reports)]


def _rows(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, found in reports.items():
        for model, measures in found["models"].items():
            cells = "".join(estimate_cell(measures.get(each), each) for each in _shown(reports))
            size = ((found["evaluations"].get(model) or {}).get("data") or {}).get("rows", DASH)
            head = (
                f'<th scope="row"><a href="{safe(name)}/{PAGE}">{safe(name)}</a><small>{safe(size)} rows</small></th>'
            )
            rows.append(f'<tr>{head}<td class="text">{safe(model)}</td>{cells}</tr>')
    return rows

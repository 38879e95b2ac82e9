"""Evaluated models side by side: the combined results, the tables in a terminal, and one HTML page.

Reads what evaluations and runs left behind (``results.json`` and ``samples.jsonl`` of evaluation folders,
``metrics.jsonl`` of runs) and no model. The words that go with the tables are in ``report_words``, the page in
``report_html``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.compare.evaluated import read_folders, require_comparable
from minillm.errors import ConfigError, DataError, did_you_mean, visible
from minillm.manifests import parsed
from minillm.measures import MAIN, MAIN_TEMPERATURE, MEASURES, shown, temperature_key
from minillm.report_files import SCHEMA, read_course, read_results, read_samples
from minillm.report_html import body, page
from minillm.report_sets import PAGE, by_set, chosen_pairs, overview, print_overview
from minillm.report_text import DASH, MINUS, at_each_temperature, figure, interval, plain, reading
from minillm.report_words import describe
from minillm.statistics import difference
from minillm.store import RunFolder, make_folder, write_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


_NOTHING: dict[str, Any] = {"models": {}, "differences": {}, "pairs": {}, "temperatures": {}, "evaluations": {}}
"""A report without an evaluation."""


def build_report(
    evaluations: Mapping[str, Path],
    *,
    out: str | Path,
    differences: Sequence[tuple[str, str]] = (),
    training: Mapping[str, Path] | None = None,
    title: str = "minillm report",
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Puts evaluation folders side by side: ``results.json`` and ``report.html`` in ``out``, and the tables in the
    terminal. Folders that list sets give a report for each set, and a table of all of them.

    Raises ``ConfigError`` where ``out`` holds an evaluation's results, and what ``combine`` does, with nothing written.
    """
    from rich.console import Console

    out = Path(out)
    _require_no_evaluation(out)
    training = training or {}
    seconds: dict[str, float] = {}
    for name, folder in training.items():
        spent = dict(RunFolder(Path(folder), writes=False).status().get("seconds", {}))
        evaluation = spent.pop("evaluation", None)
        seconds[name] = round(sum(spent.values()), 2)
        if evaluation is not None:
            seconds[f"{name}, evaluation"] = evaluation
    sets = by_set(evaluations)
    combined = {
        name: combine(
            models,
            differences=chosen_pairs(differences, sets, name),
            resamples=resamples,
            seed=seed,
            seconds={} if name else seconds,
        )
        for name, models in sets.items()
    }
    make_folder(out, setting="--out")
    # The page first: it reads what the training folders hold, and where it cannot, nothing is left.
    write_reports(combined, sets=sets, training=training, out=out, title=title, settings={}, seconds=seconds)
    whole = combined.get("") or {"schema": SCHEMA, "sets": combined, "seconds": seconds}
    write_text(out / "results.json", json.dumps(whole, indent=2) + "\n")
    for name, found in combined.items():
        if name:
            print(f"\n{visible(name)}")
        print_tables(found, Console())
    if "" not in combined:
        print_overview(combined, Console())
    return whole


def print_evaluation(name: str, folder: Path, *, resamples: int, seed: int) -> None:
    """The figures of one evaluation in the terminal, of several sets a line each, and where all of it stands."""
    from rich.console import Console

    combined = {
        test_set: combine(models, differences=[], resamples=resamples, seed=seed, seconds=None)
        for test_set, models in by_set({name: folder}).items()
    }
    if "" in combined:
        Console().print(_main_table(combined[""]))
    else:
        print_overview(combined, Console())
    print(f"results: {visible(str(folder / 'results.json'))}")


def write_reports(
    combined: Mapping[str, Mapping[str, Any]],
    *,
    sets: Mapping[str, Mapping[str, Path]],
    training: Mapping[str, Path],
    out: Path,
    title: str,
    settings: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> None:
    """The page of a single source as ``out``/report.html; of several sets one in a folder of each name, and
    ``out``/report.html with all sets in a table and the training curves."""
    if "" in sets:
        write_report(
            combined[""], evaluations=sets[""], training=training, out=out / PAGE, title=title, settings=settings
        )
        return
    more, _ = body(
        {**_NOTHING, "seconds": dict(seconds)},
        samples={},
        courses={name: read_course(Path(path)) for name, path in training.items()},
        settings=settings,
    )
    for name, models in sets.items():
        write_report(
            combined[name],
            evaluations=models,
            training={},
            out=out / name / PAGE,
            title=f"{title}, {name}",
            settings={},
        )
    _write_page(overview(combined, title=title, more=more), out / PAGE)


def combine(
    evaluations: Mapping[str, Path],
    *,
    differences: Sequence[tuple[str, str]],
    resamples: int,
    seed: int,
    seconds: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The results of several evaluation folders as one JSON-ready dict, with paired differences ``left - right``.

    ``models`` and ``differences`` hold the measures at ``temperature``: 1, where all models have it, else the hottest
    that all have, else the hottest of all, and a model without it has no figure there. ``temperatures`` holds the same
    at every temperature that some model was evaluated at. ``pairs`` says which two models a difference is of, ``notes``
    what a reader has to know of them (a measure that cannot be compared is left out of a difference), ``evaluations``
    what each folder says about itself. No folder at all is allowed. Raises ``ConfigError`` for a difference of a model
    that is not there, and ``DataError`` for a folder without results and for a difference of models that cannot be
    compared (see ``compare.evaluated.require_comparable``).
    """
    results = {name: read_results(Path(folder)) for name, folder in evaluations.items()}
    pairs = _named_pairs(differences, results)
    wanted = [name for name in evaluations if any(name in pair for pair in pairs.values())]
    compared = {one.name: one for one in read_folders({name: Path(evaluations[name]) for name in wanted})}
    checked = {
        key: require_comparable(compared[right], compared[left], across=False) for key, (left, right) in pairs.items()
    }
    temperatures = {}
    for at in _temperatures(results):
        ratios = {name: one.ratios(at) for name, one in compared.items() if at in one.rows}
        changes = {
            key: difference(ratios[left], ratios[right], resamples=resamples, seed=seed)
            for key, (left, right) in pairs.items()
            if left in ratios and right in ratios
        }
        temperatures[at] = {
            "models": {name: r["temperatures"][at] for name, r in results.items() if at in r["temperatures"]},
            "differences": {
                key: {name: change for name, change in found.items() if name not in checked[key][1]}
                for key, found in changes.items()
            },
        }
    _require_both(temperatures, pairs)
    main = _headline(results)
    headline = temperatures.get(main, {"models": {}, "differences": {}})
    return {
        "schema": SCHEMA,
        "temperature": main,
        "models": {name: headline["models"].get(name, {}) for name in results},
        "differences": {key: headline["differences"].get(key, {}) for key in pairs},
        "pairs": {key: list(pair) for key, pair in pairs.items()},
        "notes": list(dict.fromkeys(note for notes, _ in checked.values() for note in notes)),
        "temperatures": temperatures,
        "seconds": dict(seconds or {}),
        "bootstrap": {"resamples": resamples, "seed": seed},
        "evaluations": {
            name: {key: value for key, value in r.items() if key not in ("schema", "measures", "temperatures")}
            for name, r in results.items()
        },
    }


def print_tables(combined: Mapping[str, Any], console: Console) -> None:
    """Print the figures at the main temperature, the differences, the other temperatures, seconds, and the words.

    Fits 80 columns for up to four models. Prints the words alone when no model was evaluated.
    """
    from rich.text import Text

    if combined["models"]:
        console.print(_main_table(combined))
        for key, pair in combined["pairs"].items():
            if change := combined["differences"][key]:
                console.print(_difference_table(change, pair, temperature=combined["temperature"]))
        if shown(combined["models"])[1]:
            console.print(_more_table(combined))
        if len(combined["temperatures"]) > 1:
            console.print(_temperature_table(combined))
    if combined["seconds"]:
        spent = ", ".join(f"{plain(stage)} {seconds:.1f}" for stage, seconds in combined["seconds"].items())
        console.print(Text(f"Seconds: {spent}"))
    for paragraph in describe(combined):
        console.print()
        console.print(Text(plain(paragraph)))


def write_report(
    combined: Mapping[str, Any],
    *,
    evaluations: Mapping[str, Path],
    training: Mapping[str, Path],
    out: Path,
    title: str,
    settings: Mapping[str, Any],
) -> Path:
    """Write one self-contained HTML page to ``out`` and return its path.

    An older page stays until the new one is whole.
    ``training`` names runs by folder or by metrics.jsonl. Each of ``evaluations``, ``training`` and ``settings`` may be
    empty; the page then says what is missing. Raises ``DataError`` when a named file is missing or broken.
    """
    text = page(
        combined,
        samples={name: read_samples(Path(folder)) for name, folder in evaluations.items()},
        courses={name: read_course(Path(path)) for name, path in training.items()},
        title=title,
        settings=settings,
    )
    return _write_page(text, Path(out))


def _write_page(text: str, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return out


def _require_both(temperatures: Mapping[str, Any], pairs: Mapping[str, tuple[str, str]]) -> None:
    """Raise ``DataError`` for a difference, of samples, in a measure that results.json of a model does not have."""
    for at, found in temperatures.items():
        for key, changes in found["differences"].items():
            for model in pairs[key]:
                if absent := sorted(changes.keys() - found["models"].get(model, {}).keys()):
                    raise DataError(
                        f"{model}: results.json has no {absent[0]!r} at temperature {at}, and samples.jsonl has; "
                        "evaluate the model again"
                    )


def _named_pairs(
    differences: Sequence[tuple[str, str]], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, str]]:
    """The differences by a name of their own, LEFT,RIGHT as the command line has it."""
    found: dict[str, tuple[str, str]] = {}
    for pair in differences:
        for name in pair:
            if name not in results:
                known = ", ".join(results) or "none"
                raise ConfigError(f"difference of {name!r}: no such model among {known}{did_you_mean(name, results)}")
        key = ",".join(pair)
        if found.setdefault(key, pair) != pair:
            raise ConfigError(
                f"differences {found[key]} and {pair} have one name, {key!r}; give models names without a comma"
            )
    return found


def _temperatures(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every temperature that some model was evaluated at, hottest first."""
    return sorted({key for r in results.values() for key in r["temperatures"]}, key=float, reverse=True)


def _headline(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The temperature of the first table: of those that all models have, or where there is none of all, 1 or the
    hottest."""
    every = _temperatures(results)
    common = [key for key in every if all(key in r["temperatures"] for r in results.values())] or every
    main = temperature_key(MAIN_TEMPERATURE)
    return main if main in common or not common else common[0]


def _require_no_evaluation(out: Path) -> None:
    """Raise ``ConfigError`` where a report would take the place of an evaluation's own results."""
    try:
        there = parsed((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(there, dict) and ("model" in there or "measures" in there):
        raise ConfigError(
            f"--out {out}: its results.json is that of an evaluation, which a report would overwrite; nothing was "
            "touched.\n  name another folder, such as the one above it"
        )


def _estimate_cell(estimate: Mapping[str, Any] | None, name: str) -> str:
    if estimate is None or estimate.get("mean") is None:
        return DASH
    ends = estimate.get("ci95")
    if ends is None:
        return figure(estimate["mean"], name)
    return f"{figure(estimate['mean'], name)}\n{figure(ends[0], name)}{DASH}{figure(ends[1], name)}"


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(plain(title), style="bold"), box=SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    for number, column in enumerate(columns):
        # Too narrow a terminal breaks a number over two lines: ugly, but never cut short.
        left = number == 0
        table.add_column(Text(plain(column)), justify="left" if left else "right", no_wrap=left, overflow="fold")
    return table


def _main_table(combined: Mapping[str, Any]) -> Table:
    table = _table(
        f"Held-out prompts at temperature {combined['temperature']} (95 % intervals over prompts)",
        ["", *combined["models"]],
    )
    for name in shown(combined["models"])[0]:
        cells = [_estimate_cell(measures.get(name), name) for measures in combined["models"].values()]
        table.add_row(MEASURES[name].label, *cells)
    return table


def _difference_table(change: Mapping[str, Any], pair: Sequence[str], *, temperature: str) -> Table:
    title = f"{pair[0]} {MINUS} {pair[1]}, paired, at temperature {temperature}"
    table = _table(title, ["", "difference", "95 % interval", "interval"])
    for name in (name for name in MAIN if name in change):
        mean = figure(change[name]["mean"], name, signed=True)
        table.add_row(MEASURES[name].label, mean, interval(change[name], name, signed=True), reading(change[name]))
    return table


def _more_table(combined: Mapping[str, Any]) -> Table:
    """The other measures, without intervals: those are in the page and in the file."""
    title, pairs = _starred(f"More measures at temperature {combined['temperature']}", combined)
    table = _table(title, ["", *combined["models"], *pairs])
    for name in shown(combined["models"])[1]:
        table.add_row(MEASURES[name].label, *_plain_cells(combined["models"], combined["differences"], name, combined))
    return table


def _starred(title: str, combined: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A table's title and its columns of differences; a single one is spelt out above a table, which then fits a
    narrow terminal."""
    pairs = [f"{left} {MINUS} {right}" for left, right in combined["pairs"].values()]
    if len(pairs) == 1:
        return f"{title}; difference: {pairs[0]}, * its paired interval excludes zero", ["difference"]
    return title + ("; * the paired interval of a difference excludes zero" if pairs else ""), pairs


def _plain_cells(
    models: Mapping[str, Any], differences: Mapping[str, Any], name: str, combined: Mapping[str, Any]
) -> list[str]:
    """A measure of each model of the report, and its differences with a star."""
    cells = [figure(models.get(model, {}).get(name, {}).get("mean"), name) for model in combined["models"]]
    for pair in combined["pairs"]:
        change = differences.get(pair, {}).get(name, {"mean": None})
        star = "*" if reading(change) == "excludes zero" else " "
        cells.append(figure(change["mean"], name, signed=True) + star)
    return cells


def _temperature_table(combined: Mapping[str, Any]) -> Table:
    title, pairs = _starred("At each temperature", combined)
    table = _table(title, ["", *combined["models"], *pairs])
    names = at_each_temperature(combined)
    for key, found in combined["temperatures"].items():
        for name in names:
            cells = _plain_cells(found["models"], found["differences"], name, combined)
            label = f"{key if name == names[0] else '':4} {MEASURES[name].label}"
            table.add_row(label, *cells, end_section=name == names[-1])
    return table

"""What the command ``study`` does: makes the cells that are lacking, prints the tables, writes the files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from minillm.config import dump_config
from minillm.errors import ConfigError, did_you_mean
from minillm.measures import MAIN_TEMPERATURE, temperature_key
from minillm.own_files import OwnFile, page_file
from minillm.own_files import json_file as own_file
from minillm.plots import drawing_file, drawn, require_kind
from minillm.ranks import Ranks
from minillm.study.config import StudyConfig, load_study
from minillm.study.curves import LABELS_AGAINST, draw_curves
from minillm.study.diversity import DIVERSITIES, at_equal_diversity, heading, left_out, require_diversity
from minillm.study.html import MADE_BY as PAGE
from minillm.study.html import page
from minillm.study.jobs import run_by_jobs
from minillm.study.reproduce import reproduce
from minillm.study.table import (
    Cells,
    difference_rows,
    diversity_rows,
    draw_plot,
    headline_rows,
    read_cells,
    summary,
    words,
    yardstick_rows,
)  # fmt: skip
from minillm.study.tuning import stored_tuning
from minillm.study.verdict import correct, sentences, standings
from minillm.study.yardsticks import make_yardsticks, read_yardsticks, told
from minillm.terminal import print_table
from minillm.yaml_reader import write_yaml

PLOT, CURVES = "minillm study --plot", "minillm study --curves"
T = TypeVar("T", str, int)
MEASURES = ("validity", "coverage", "rouge_l", "reverse_kl", "mean_length", "repetition_3")
DIFFERENCES = ("validity", "coverage", "rouge_l", "reverse_kl")
LABELS = {"validity": "validity", "coverage": "coverage", "rouge_l": "ROUGE-L", "reverse_kl": "rev. KL",
          "mean_length": "length", "repetition_3": "rep. 3"}  # fmt: skip


def run(
    config: Path,
    *,
    overrides: Sequence[str] = (),
    arms: Sequence[str] | None,
    seeds: Sequence[int] | None,
    show: bool,
    again: bool,
    json_file: Path | None,
    plot: Path | None,
    curves: Path | None,
    against: str,
    quick: bool = False,
    jobs: int = 1,
    compare_with: str | None = None,
    diversity: str = DIVERSITIES[0],
    html: Path | None = None,
) -> None:
    """``arms`` and ``seeds`` None are all of the study's; with ``show`` nothing is made. ``compare_with`` None is the
    study's own."""
    _require_outputs({"--json": json_file, "--plot": plot, "--curves": curves, "--html": html})
    if against not in LABELS_AGAINST:
        near = did_you_mean(against, LABELS_AGAINST)
        raise ConfigError(f"--against: got {against!r}, wanted one of {', '.join(LABELS_AGAINST)}{near}")
    require_diversity(diversity)
    if show and again:
        raise ConfigError("--show makes nothing and --again makes all anew; leave one out")
    study = load_study(config, overrides, quick=quick)
    if compare_with is not None:
        _some_of("--compare-with", [compare_with], list(study.arms))
        study = study.model_copy(update={"compare_with": compare_with})
    wanted_arms = _some_of("--arms", arms, list(study.arms))
    wanted_seeds = _some_of("--seeds", seeds, list(study.seeds))
    if not show:
        run_by_jobs(
            study, jobs=jobs, arms=wanted_arms, seeds=wanted_seeds, again=again,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
        make_yardsticks(study, again=again, say=lambda line: print(line, flush=True))
    if Ranks().first:
        cells, notes = read_cells(study)
        measured, more = read_yardsticks(study)
        found = gather(study, cells, diversity=diversity, yardsticks=measured)
        _tell(study, found, notes=[*notes, *more])
        if json_file is not None:
            _own("--json", json_file).write((json.dumps(found, indent=2) + "\n").encode())
        if plot is not None:
            _draw_plot(found, plot)
        if curves is not None:
            _draw_curves(study, cells, curves, against=against)
        if html is not None:
            text = study_page(study, found, cells, against=against, notes=[*notes, *more])
            _own("--html", html).write(text.encode())
            print(f"written: {html}")


def study_page(
    study: StudyConfig, found: Mapping[str, Any], cells: Cells, *, against: str, notes: Sequence[str]
) -> str:  # fmt: skip
    """The study as one HTML page."""
    shown = [] if found["temperature"] is None else _have(found, found["temperature"], MEASURES)
    return page(found, study, cells, shown=shown, against=against, notes=notes)


def own_json(file: Path) -> OwnFile:
    """The file that --json names."""

    def fits(found: Mapping[str, Any]) -> bool:
        arms = found["arms"].values()
        return {"study", "compare_with"} <= found.keys() and all({"done", "temperatures"} <= of.keys() for of in arms)

    return own_file(file, what="the figures of a study", fits=fits)


def _require_outputs(files: Mapping[str, Path | None]) -> None:
    """Raise ``ConfigError`` or ``DataError`` where a file that an option names could not be written."""
    for option in ("--plot", "--curves"):
        require_kind(files[option], option=option)
    if (html := files["--html"]) is not None and html.suffix != ".html":
        raise ConfigError(f"--html {html}: wanted a file ending in .html")
    given = {option: file for option, file in files.items() if file is not None}
    taken: dict[Path, str] = {}
    for option, file in given.items():
        if (other := taken.setdefault(file.absolute(), option)) != option:
            raise ConfigError(f"{other} and {option} are both {file}; name two files")
    for option, file in given.items():
        _own(option, file).require()


def _own(option: str, file: Path) -> OwnFile:
    makers = {"--plot": PLOT, "--curves": CURVES}
    if option == "--json":
        return own_json(file)
    return page_file(file, made_by=PAGE) if option == "--html" else drawing_file(file, made_by=makers[option])


def describe(config: Path, *, overrides: Sequence[str] = (), quick: bool = False) -> StudyConfig:
    """Prints the study with what was given in its place, and the run that every cell starts from, on the first rank."""
    study = load_study(config, overrides, quick=quick)
    entries = study.model_dump(mode="json", exclude={"quick"}, exclude_none=True)
    start = study.yardstick_config("NAME")
    if os.environ.get("RANK", "0") == "0":  # no collective for so little
        cells = f"{len(study.arms)} arms x {len(study.seeds)} seeds"
        print(f"# makes {cells} into {study.results}, as the following says\n{write_yaml(entries)}", end="")
        print(
            f"---\n# every cell starts from this run; its arm, name and seed come on top\n{dump_config(start)}",
            end="", flush=True,
        )  # fmt: skip
    return study


def run_again(config: Path, cell: str, *, overrides: Sequence[str] = (), quick: bool = False) -> bool:
    """Makes a committed cell, 'ARM:SEED', again and says whether its figures come out."""
    study = load_study(config, overrides, quick=quick)
    arm, _, seed = cell.partition(":")
    if not seed.isdecimal():
        raise ConfigError(
            f"--reproduce {cell!r}: wanted an arm and a seed of the study, such as {study.compare_with}:1"
        )
    _some_of("--reproduce", [arm], list(study.arms))
    _some_of("--reproduce", [int(seed)], list(study.seeds))
    return reproduce(study, arm, int(seed))


def _some_of(option: str, asked: Sequence[T] | None, known: Sequence[T]) -> list[T]:
    """The asked ones in the study's own order."""
    unknown = [each for each in asked or () if each not in known]
    if unknown:
        near = did_you_mean(str(unknown[0]), [str(each) for each in known])
        raise ConfigError(f"{option}: {unknown[0]!r} is none of the study's ({', '.join(map(str, known))}){near}")
    return [each for each in known if asked is None or each in asked]


def gather(
    study: StudyConfig, cells: Cells, *, diversity: str, yardsticks: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """All figures of a study, ready for JSON; ``temperature`` is that of the headline, None where no cell is done."""
    tuned = {arm: stored_tuning(study.tuning_file(arm)) for arm in study.arms} if study.tunes else {}
    kept = ("settings", "pilot", "tries", "refined", "asked")
    found = {
        **summary(study, cells),
        "yardsticks": yardsticks,
        "tuning": {arm: {k: of[k] for k in kept if k in of} for arm, of in tuned.items() if of is not None},
    }
    temperatures = _temperatures(found)
    found["temperature"] = None
    if temperatures:
        main = temperature_key(MAIN_TEMPERATURE)
        at = found["temperature"] = main if main in temperatures else temperatures[0]
        measures = _have(found, at, DIFFERENCES)
        correct(found, temperature=at, measures=measures)
        found["best"] = standings(cells, temperature=at, measures=measures)
        found["equal_diversity"] = at_equal_diversity(
            cells, compare_with=study.compare_with, temperature=at, measures=measures, diversity=diversity
        )
    return found


def _tell(study: StudyConfig, found: Mapping[str, Any], *, notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}")
    if found["temperature"] is not None:
        _print_tables(study, found)
    else:
        print(f"study {study.name}: no cell in {study.results} is done")
    for line in words(found):
        print(line)


def _draw_plot(found: Mapping[str, Any], plot: Path) -> None:
    if (at := found["temperature"]) is not None:
        figure = draw_plot(found, measures=_have(found, at, DIFFERENCES), temperature=at)
        _own("--plot", plot).write(drawn(figure, plot.suffix, made_by=PLOT))
    else:
        print(f"{plot}: not written, there is nothing to draw")


def _temperatures(found: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(key for of in found["arms"].values() for key in of["temperatures"]))


def _draw_curves(study: StudyConfig, cells: Cells, curves: Path, *, against: str) -> None:
    figure, there = draw_curves(cells, measures=DIFFERENCES, against=against)
    missing = [arm for arm in study.arms if arm not in there]
    if there:
        _own("--curves", curves).write(drawn(figure, curves.suffix, made_by=CURVES))
    else:
        print(f"{curves}: not written, no cell says how its validations stand against {against}")
    if there and missing:
        print(f"{curves}: without {', '.join(missing)}, whose validations have none of these measures")


def _have(found: Mapping[str, Any], temperature: str, names: Sequence[str]) -> list[str]:
    """The measures that any arm has."""
    arms = found["arms"].values()
    return [name for name in names if any(name in of["temperatures"].get(temperature, {}) for of in arms)]


def _print_tables(study: StudyConfig, found: Mapping[str, Any]) -> None:
    at, temperatures = found["temperature"], _temperatures(found)
    have = _have(found, at, MEASURES)
    print_table(
        f"{study.name}: temperature {at}, mean ± standard deviation over training seeds;\n"
        "CPU seconds of loading, training and validation",
        ("", "seeds", *(LABELS[name] for name in have), "CPU s"),
        headline_rows(found, at, have),
        below=yardstick_rows(found, at, have),
    )
    for line in told(found["yardsticks"]):
        print(line)
    for name in _have(found, at, DIFFERENCES):
        if rows := difference_rows(found, name):
            print_table(
                f"{LABELS[name]} less that of {study.compare_with}, by seed;\n"
                f"with two seeds or more 95 % over seeds (*: excludes zero; **, at T {at}: also after correction)",
                ("", *(f"T {key}" for key in temperatures)),
                rows,
            )
    equal = found["equal_diversity"]
    if rows := diversity_rows(equal):
        print_table(
            f"{heading(equal, compare_with=study.compare_with)};\n*: excludes zero, not corrected",
            ("", "seeds", "T", *(LABELS[name] for name in equal["measures"])),
            rows,
        )
    for line in left_out(equal, compare_with=study.compare_with):
        print(line)
    for label, said in sentences(found):
        print("\n  ".join([label, *said]), end="\n\n")

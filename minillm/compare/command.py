"""What the command ``compare`` does: refuses what it cannot compare or write, compares, prints, writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.compare.evaluated import read_all
from minillm.compare.html import page
from minillm.compare.summary import SCHEMA, Options, summary
from minillm.compare.tables import print_comparison
from minillm.errors import ConfigError, DataError, visible
from minillm.own_files import OwnFile
from minillm.own_files import json_file as own_file
from minillm.report_sets import by_set
from minillm.store import make_folder, write_text

PAGE = "compare.html"
FIELDS = {"schema", "names", "options", "comparisons", "corrected", "evaluations"}
"""What every record of a comparison has."""


def own_json(file: Path) -> OwnFile:
    """The file that --json names."""

    def fits(found: Mapping[str, Any]) -> bool:
        of_sets = {"schema", "sets", "notes"} <= found.keys()
        return found.keys() >= FIELDS or (of_sets and all("comparisons" in each for each in found["sets"].values()))

    return own_file(file, what="the figures of a comparison", fits=fits)


def compare(
    evaluations: Mapping[str, str | Path],
    *,
    options: Options | None = None,
    json_file: Path | None = None,
    out: Path | None = None,
    title: str = "minillm compare",
    quiet: bool = False,
) -> dict[str, Any]:
    """The comparison of evaluation folders, by the name to show; the first is what the others are compared with.

    Of evaluations on several sets each set is compared by itself, and the record holds those comparisons under
    ``sets``. Prints it unless ``quiet``, and writes the record into ``json_file`` and the page into
    ``out``/compare.html (of a set ``out``/SET/compare.html) where they are named. Raises ``ConfigError`` or
    ``DataError``, with nothing written, for fewer than two folders, a folder that holds no evaluation, evaluations of
    other prompts, references or decoding settings, and a file that cannot be written.
    """
    if json_file is not None and not (out is not None and json_file.parent == out and not out.exists()):
        own_json(json_file).require()
    if out is not None and json_file == out / PAGE:
        raise ConfigError(f"--json {json_file} is the page that --out writes; name another file")
    sets, notes = _shared_sets(by_set({name: Path(folder) for name, folder in evaluations.items()}), list(evaluations))
    compared = {name: summary(read_all(models), options or Options()) for name, models in sets.items()}
    record = compared.get("") or {"schema": SCHEMA, "sets": compared, "notes": notes}
    pages = {} if out is None else {out / name / PAGE: (name, found) for name, found in compared.items()}
    for file, (name, found) in pages.items():
        text = page(found, title=f"{title}, {name}" if name else title)
        make_folder(file.parent, setting="--out")
        write_text(file, text)
    if json_file is not None:
        own_json(json_file).write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    if not quiet:
        from rich.console import Console

        for name, found in compared.items():
            if name:
                print(f"\n=== {visible(name)} ===\n")
            print_comparison(found, Console())
        for line in notes:
            print(visible(line))
        for written in (json_file, *pages):
            if written is not None:
                print(visible(f"written: {written}"))
    return record


def _shared_sets(
    sets: dict[str, dict[str, Path]], names: Sequence[str]
) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """The sets that all models were evaluated on, and what a reader has to know. ``DataError`` where there is none."""
    shared = {name: models for name, models in sets.items() if len(models) == len(names)}
    if not shared:
        found = "; ".join(f"{name}: {', '.join(models)}" for name, models in sets.items())
        raise DataError(f"no set that all of {', '.join(names)} were evaluated on ({found}); evaluate them on the same")
    if "" in shared:
        return shared, []
    notes = ["Each set is compared by itself: nothing is averaged over sets, and Holm's correction is within a set."]
    for name in (name for name in sets if name not in shared):
        notes.append(f"Set {name} is left out: only {', '.join(sets[name])} was evaluated on it.")
    return shared, notes

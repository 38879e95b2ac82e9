"""What the command ``compare`` does: refuses what it cannot compare or write, compares, prints, writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.compare.evaluated import read_all
from minillm.compare.html import page
from minillm.compare.summary import Options, summary
from minillm.compare.tables import print_comparison
from minillm.errors import ConfigError
from minillm.store import make_folder, require_writable, write_text

PAGE = "compare.html"


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

    Prints it unless ``quiet``, and writes the record into ``json_file`` and the page into ``out``/compare.html where
    they are named. Raises ``ConfigError`` or ``DataError``, with nothing written, for fewer than two folders, a folder
    that holds no evaluation, evaluations of other prompts, references or decoding settings, and a file that cannot be
    written.
    """
    if json_file is not None and not (out is not None and json_file.parent == out and not out.exists()):
        require_writable(json_file)
    if out is not None and json_file == out / PAGE:
        raise ConfigError(f"--json {json_file} is the page that --out writes; name another file")
    evaluated = read_all({name: Path(folder) for name, folder in evaluations.items()})
    found = summary(evaluated, options or Options())
    if out is not None:
        text = page(found, title=title)
        make_folder(out, setting="--out")
        write_text(out / PAGE, text)
    if json_file is not None:
        write_text(json_file, json.dumps(found, indent=2, allow_nan=False) + "\n")
    if not quiet:
        from rich.console import Console

        print_comparison(found, Console())
        for written in (json_file, None if out is None else out / PAGE):
            if written is not None:
                print(f"written: {written}")
    return found


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER or FOLDER, whose last part is then the name. ``ConfigError`` for a name that is there twice."""
    found: dict[str, Path] = {}
    for text in arguments:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():  # a folder may have "=" in its name
            name, folder = Path(text).resolve().name, text
        if not name or not folder:
            raise ConfigError(f"{text!r}: wanted FOLDER or NAME=FOLDER, such as sft=runs/quickstart/sft")
        if name in found:
            raise ConfigError(
                f"{text!r}: the name {name!r} is given twice; give each folder a name of its own, NAME=FOLDER"
            )
        found[name] = Path(folder)
    return found

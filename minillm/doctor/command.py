"""What the command ``doctor`` does: refuses a file that cannot be written, makes the checks, prints, writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minillm.doctor.examine import Report, examine
from minillm.doctor.findings import LEVELS, Finding, as_json, counts, exit_code
from minillm.doctor.rollout import shown
from minillm.errors import visible
from minillm.own_files import OwnFile
from minillm.own_files import json_file as own_json
from minillm.results import versions

SCHEMA = 1
FIELDS = {"schema", "config", "findings", "counts", "answers"}
"""What every record of an examination has."""
STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def run(
    file: Path, overrides: Sequence[str], *, ranks: int, ask_models: bool, strict: bool, json_file: Path | None
) -> int:
    """Prints the table and the answers; writes the record where a file is named. The exit code."""
    own = None if json_file is None else own_file(json_file)
    if own is not None:
        own.require()
    if ranks or ask_models:
        print("starting ranks or loading models: this takes a while …", file=sys.stderr, flush=True)
    report = examine(file, overrides, ranks=ranks, ask_models=ask_models)
    _print(report)
    if own is not None:
        own.write((json.dumps(record(report, file=file, overrides=overrides), indent=2) + "\n").encode())
    return exit_code(report.findings, strict=strict)


def own_file(file: Path) -> OwnFile:
    """The file that --json names."""

    def fits(found: Mapping[str, Any]) -> bool:
        return found.keys() >= FIELDS

    return own_json(file, what="what minillm doctor found", fits=fits)


def record(report: Report, *, file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """All that was found, for another program."""
    return {
        "schema": SCHEMA,
        "config": str(file),
        "overrides": list(overrides),
        "counts": counts(report.findings),
        "findings": as_json(report.findings),
        "answers": [asdict(answer) for answer in report.answers],
        "versions": versions(),
    }


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    # The worst last: that is where people look.
    for finding in sorted(report.findings, key=lambda each: LEVELS.index(each.level)):
        table.add_row(Text(finding.level, style=STYLES[finding.level]), Text(finding.id), Text(_words(finding)))
    console = Console(highlight=False)
    for answer in report.answers:
        console.print(Text(visible(shown(answer))))
    console.print(table)
    console.print(Text(_sum(report.findings)))


def _words(finding: Finding) -> str:
    """Found, why and how to mend it, each on a line of its own."""
    parts = [
        finding.found,
        f"why: {finding.why}" if finding.why else "",
        f"mend: {finding.mend}" if finding.mend else "",
    ]
    return visible("\n".join(part for part in parts if part))


def _sum(findings: Sequence[Finding]) -> str:
    number = counts(findings)
    named = {"error": "errors", "warning": "warnings", "note": "notes", "ok": "ok"}
    return ", ".join(f"{number[level]} {name}" for level, name in named.items())

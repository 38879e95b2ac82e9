"""What the command ``prefers`` does: refuses what could not be written, measures, prints the table."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minillm.config import RunConfig
from minillm.errors import visible
from minillm.judge.command import COLUMNS, WIDTH, figure_row, percent
from minillm.own_files import json_file as own_file
from minillm.pair_accuracy import CHANCE, pair_accuracy
from minillm.report_text import plain
from minillm.rows import counted
from minillm.terminal import print_table

FIELDS = {"schema", "model", "reference", "asked", "accuracy", "margin", "pairs", "p"}
"""What every record of such a measurement has."""
SURE = 0.05
"""A smaller p is needed beside the interval, which is too narrow where all of a few prompts agree."""


def run(
    model: str,
    config: RunConfig,
    *,
    reference: str | None,
    per_token: bool,
    limit: int | None,
    json_file: Path | None,
) -> dict[str, Any]:
    """Prints the figures; writes them where a file is named."""
    first = os.environ.get("RANK", "0") == "0"
    own = None
    if json_file is not None:
        own = own_file(json_file, what="the figures of held-out pairs", fits=lambda found: found.keys() >= FIELDS)
        own.require()
    record = pair_accuracy(
        model, config, reference=reference, per_token=per_token, limit=limit,
        say=lambda line: print(visible(line), flush=True) if first else None,
    )  # fmt: skip
    if first:
        tell(record)
    if first and own is not None:
        own.write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    return record


def tell(record: Mapping[str, Any]) -> None:
    """Prints the table and the words."""
    base = "" if record["reference"] is None else f", reference {record['reference']}"
    title = f"{counted(record['pairs'], 'pair')} of {counted(record['prompts'], 'prompt')}: {record['model']}{base}"
    print_table(plain(title), COLUMNS, [tuple(map(plain, row)) for row in table(record)])
    for line in words(record):
        print(textwrap.fill(plain(line), width=WIDTH, subsequent_indent="  "))


def table(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of the table: a label, a figure, an interval over prompts."""
    what, unit = record["asked"]["reward"], " nats a token" if record["asked"]["per_token"] else " nats"
    return [
        figure_row("accuracy", record["accuracy"], scale=100, unit=" %"),
        *(
            figure_row(f"  of {name} ({found['pairs']:,})", found["accuracy"], scale=100, unit=" %")
            for name, found in record.get("sources", {}).items()
        ),
        figure_row("margin", record["margin"], unit=unit),
        figure_row(f"{what} of chosen", record["chosen"], unit=unit),
        figure_row(f"{what} of rejected", record["rejected"], unit=unit),
    ]


def words(record: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the table has to know."""
    higher, length, asked = record["higher"], record["length"], record["asked"]
    ties = f"; {counted(higher['neither'], 'tie')} as half" if higher["neither"] else ""
    yield (
        f"accuracy: share of the pairs whose chosen response has the higher {asked['reward']}{ties}. "
        f"{_against_chance(record)} (exact sign test over prompts: p = {record['p']:.2g})"
    )
    ends = record["chosen"]["ci95"]
    if record["reference"] is not None and ends is not None and ends[1] < 0:
        yield (
            "the chosen responses became less likely than under the reference, and the rejected ones still more so"
            if record["margin"]["mean"] > 0
            else "the chosen responses became less likely than under the reference"
        )
    told = f"length: {length['chosen']:.1f} tokens chosen, {length['rejected']:.1f} rejected, end included"
    if length["longer_chosen"] is not None:
        told += f"; {percent(length['longer_chosen'])} of the unequal pairs have the longer one chosen"
    alone = record["reference"] is None and not asked["per_token"]
    yield told + ("; a log-probability alone favours the shorter" if alone else "")


def _against_chance(record: Mapping[str, Any]) -> str:
    ends = record["accuracy"]["ci95"]
    if ends is None:
        return "Of one prompt nothing can be said about others"
    if record["p"] < SURE and ends[0] > CHANCE:
        return "That is above chance"
    if record["p"] < SURE and ends[1] < CHANCE:
        return "That is below chance"
    return "These pairs cannot tell that from chance, 50 %"

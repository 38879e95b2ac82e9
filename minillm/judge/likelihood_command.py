"""What the command ``win-rate`` does: refuses what could not be written, compares, prints the table."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.errors import visible
from minillm.judge.command import COLUMNS, WIDTH, figure_row, own_json, percent, table
from minillm.judge.likelihood import PER_TOKEN, win_rate
from minillm.judge.run import default_out, require_opponent
from minillm.micro_batches import Limits
from minillm.report_text import plain
from minillm.rows import counted
from minillm.terminal import print_table

FIELDS = {"schema", "mode", "asked", "judge", "win_rate", "unanswered"}
"""What every record of such a comparison has."""


def run(
    folders: tuple[Path, Path | None],
    *,
    by: str,
    against: str | None,
    per_token: bool,
    tie: float,
    seed: int | None,
    temperature: float | None,
    limit: int | None,
    limits: Limits,
    out: Path | None,
    fresh: bool,
    json_file: Path | None,
) -> dict[str, Any]:
    """Prints the figures and where they are kept."""
    first = os.environ.get("RANK", "0") == "0"
    require_opponent(folders[1], against=against, single=False)
    out = default_out(*folders, against=against, what="win-rate") if out is None else out
    if json_file is not None:
        own_json(json_file, out=out, fields=FIELDS).require()
    record = win_rate(
        *folders, by=by, against=against, per_token=per_token, tie=tie, seed=seed, temperature=temperature,
        limit=limit, limits=limits, out=out, fresh=fresh,
        say=lambda line: print(visible(line), flush=True) if first else None,
    )  # fmt: skip
    if first:
        tell(record)
        print(visible(f"{out / 'judge.json'}"))
        if json_file is not None:
            own_json(json_file, out=out, fields=FIELDS).write((json.dumps(record, indent=2) + "\n").encode())
    return record


def tell(record: Mapping[str, Any]) -> None:
    """Prints the table and the words."""
    unit = " nats a token" if record["judge"]["score"] == PER_TOKEN else " nats"
    title = f"{record['prompts']} prompts: which response is likelier under {record['judge']['model']}"
    print_table(plain(title), COLUMNS, [*table(record), figure_row("mean margin of A", record["margin"], unit=unit)])
    for line in words(record):
        print(textwrap.fill(plain(line), width=WIDTH, subsequent_indent="  "))


def words(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    score, length, cut = record["judge"]["score"], record["length"], record["cut"]
    other = "the references" if record["asked"].get("against") else "B"
    advice = "" if score == PER_TOKEN else "; a sum favours the shorter, --per-token takes means"
    lines = [
        f"no judge was asked: it says which response this model would rather write ({score} of the tokens' "
        f"log-probabilities), not which is good; at most {record['judge']['tie']:g} nats apart is a tie",
        f"length: {length['left']:.1f} tokens in A, {length['right']:.1f} in {other}, end included; of decided pairs "
        f"of unequal length the shorter won {percent(length['shorter_wins'])}{advice}",
    ]
    if record["same"]:
        lines.append(f"{counted(record['same'], 'pair')} of equal texts: a tie")
    if cut["left"] or cut["right"]:
        lines.append(
            f"cut at the longest length, so scored without an end: {cut['left']} of A, {cut['right']} of {other}"
        )
    if record["without_reference"]:
        lines.append(f"left out: {counted(record['without_reference'], 'prompt')} without a reference")
    return lines + [f"unjudged: {counted(count, 'pair')}: {reason}" for reason, count in record["unanswered"].items()]

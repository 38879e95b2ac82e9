"""What the command ``judge`` does: refuses what could not be written, judges, prints the table."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from minillm.errors import DataError, visible
from minillm.judge.run import default_out, judge, require_opponent
from minillm.judge.settings import JudgeSettings
from minillm.own_files import OwnFile
from minillm.own_files import json_file as own_file
from minillm.report_text import DASH, MINUS, plain
from minillm.terminal import print_table

FIELDS = {"schema", "mode", "asked", "endpoint", "cost", "unanswered"}
"""What every record of a judging has."""
WIDTH = 80
"""Columns of a line of words, as in a plain terminal."""
OWN = {"judge.json", "judgements.jsonl", "cache.jsonl"}
"""What a judging keeps in its folder."""


def own_json(file: Path, *, out: Path, fields: Collection[str] = FIELDS) -> OwnFile:
    """The file that --json names, known by its ``fields``. ``DataError`` for what a judging keeps for itself, in
    ``out`` or where another one was."""
    anothers = file.name == "judge.json" and (file.parent / "judgements.jsonl").exists()
    if anothers or (file.name in OWN and file.parent.resolve() == out.resolve()):
        raise DataError(f"{file} is what a judging keeps for itself\n  name another file")
    return own_file(file, what="the figures of a judging", fits=lambda found: found.keys() >= set(fields))


def run(
    folders: tuple[Path, Path | None],
    *,
    settings: Mapping[str, Any],
    against: str | None,
    single: bool,
    seed: int | None,
    temperature: float | None,
    limit: int | None,
    template: Path | None,
    out: Path | None,
    fresh: bool,
    json_file: Path | None,
) -> dict[str, Any]:
    """Prints the figures and where they are kept."""
    chosen = JudgeSettings(**settings)
    require_opponent(folders[1], against=against, single=single)
    out = default_out(*folders, single=single, against=against) if out is None else out
    if json_file is not None:
        own_json(json_file, out=out).require()
    record = judge(
        *folders, settings=chosen, against=against, single=single, seed=seed, temperature=temperature, limit=limit,
        template=template, out=out, fresh=fresh, say=lambda line: print(visible(line), flush=True),
    )  # fmt: skip
    names = ", ".join(record["endpoint"]["returned"]) or record["endpoint"]["model"]
    print_table(plain(f"{record['prompts']} prompts, judged by {names}"), COLUMNS, table(record))
    for line in words(record):
        print(textwrap.fill(plain(line), width=WIDTH, subsequent_indent="  "))
    print(visible(f"{out / 'judge.json'}"))
    if json_file is not None:  # last: what is in the way by now costs no line of the above
        own_json(json_file, out=out).write((json.dumps(record, indent=2) + "\n").encode())
    return record


COLUMNS = ("", "figure", "95 % interval")


def table(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The rows of the table: a label, a figure, an interval over prompts."""
    if record["mode"] == "pairwise":
        other = "reference" if record["asked"].get("against") else "B"
        labels = {
            "win": "A wins", "tie": "tie", "lose": f"{other} wins", "net": f"A wins {MINUS} {other} wins",
            "win_rate": "win rate of A, ties as half", "consistency": "both orders agree",
        }  # fmt: skip
        return [
            figure_row(label, record[name], scale=100, unit=" %") for name, label in labels.items() if name in record
        ]
    sides = record.get("sides", [record])
    rows = []
    for letter, side in zip("AB", sides, strict=False):
        rows += [
            figure_row(f"score of {letter}", side["score"]),
            figure_row("  its points, 1 to 10", side["response"]),
            figure_row("  the references' points", side["reference"]),
        ]
        points = side["position"]["points"]
        rows.append(("  points for being first", DASH if points is None else _number(points, signed=True), ""))
    return [*rows, figure_row(f"A {MINUS} B, paired", record["difference"])] if "difference" in record else rows


def words(record: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    lines = []
    if record["mode"] == "single":
        lines.append("score: sum of the responses' points over that of the references', times 100")
    else:
        share = record["position"]["share"]
        lines.append(
            f"position bias: in {percent(share)} of the pairs ({record['position']['disagreements']}) the verdict "
            f"changed with the order; they count as ties ({percent(record['position']['first'])} of the pairs went to "
            f"whatever stood first, {percent(record['position']['second'])} to whatever stood second)"
        )
    for letter, side in zip("AB", record.get("sides", [record]), strict=False):
        if side["unjudged"]:
            whose = f" of {letter}" if "sides" in record else ""
            lines.append(f"unjudged: {side['unjudged']} of {record['prompts']} prompts{whose}, in no figure")
    for reason, count in record["unanswered"].items():
        lines.append(f"  {count} questions: {reason}")
    if record["defused"]:
        lines.append(
            f"{record['defused']} questions held text that looks like a tag or a chat marker of ours; it was defused "
            "(column 'defused' of judgements.jsonl)"
        )
    cost = record["cost"]
    money = "" if cost["money"] is None else f", {cost['money']:g} in money"
    assumed = f" ({cost['assumed_tokens']:,} of them assumed)" if cost["assumed_tokens"] else ""
    lines.append(
        f"cost: {cost['requests']:,} requests ({cost['cached']:,} answers from the cache), {cost['prompt_tokens']:,} "
        f"tokens of prompts and {cost['completion_tokens']:,} of replies{assumed}{money}; {record['seconds']:g} s"
    )
    if cost["stopped_by_limit"]:
        lines.append("stopped by the cost limit; with a higher --max-cost the same command goes on from there")
    return lines + [f"note: {note}" for note in record["notes"]]


def figure_row(label: str, estimate: Mapping[str, Any], *, scale: float = 1, unit: str = "") -> tuple[str, str, str]:
    """A label, a mean and its interval, as a table shows them."""
    mean, ends = estimate["mean"], estimate["ci95"]
    shown = DASH if mean is None else _number(scale * mean) + unit
    return label, shown, DASH if ends is None else f"{_number(scale * ends[0])} to {_number(scale * ends[1])}{unit}"


def _number(value: float, *, signed: bool = False) -> str:
    if round(value, 2) == 0:
        return "0.00"
    return f"{value:{'+' if signed else ''}.2f}".replace("-", MINUS)


def percent(share: float | None) -> str:
    """A share, or a dash where there is none."""
    return DASH if share is None else f"{100 * share:.1f} %"

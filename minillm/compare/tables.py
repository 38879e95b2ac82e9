"""The comparison in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minillm.compare.words import describe, probability
from minillm.measures import MEASURES
from minillm.report_text import DASH, MINUS, figure, interval, plain, reading

if TYPE_CHECKING:
    from rich.console import Console

LONGEST = 300
"""Characters of a prompt or a response that are printed."""
SHOWN = 1
"""Prompts printed in each direction; the page has more."""


def print_comparison(found: Mapping[str, Any], console: Console) -> None:
    """Tables of each pair, its most different prompts, and the words. Fits 80 columns."""
    from rich.text import Text

    several = len(found["names"]) > 2
    for pair in found["comparisons"]:
        title = f"{pair['other']} {MINUS} {pair['base']}, paired, {temperature(pair)}"
        columns = ["", pair["base"], pair["other"], "difference", "95 % interval"]
        _print(console, title, [*columns, "Holm p"] if several else columns, list(_changes(pair, several)))
        if pair["wins"]:
            title = f"Prompts on which {pair['other']} is better / level / worse"
            _print(console, title, ["", "prompts", "shares, %", "net share", "sign test p"], list(_wins(pair)))
        if len(pair["temperatures"]) > 1:
            names = list(pair["wins"])
            heads = ["temperature", *(MEASURES[name].label for name in names)]
            _print(console, "At each temperature (*: the interval excludes 0)", heads, list(_temperatures(pair, names)))
        if pair["groups"]:
            names = list(pair["wins"])
            heads = ["prompts", "", *(MEASURES[name].label for name in names)]
            _print(console, "By kind of prompt (*: the interval excludes 0)", heads, list(_groups(pair, names)))
        for line in _samples(pair):
            console.print(Text(line))
    for heading, sentences in describe(found):
        console.print(Text(plain(heading), style="bold"))
        for sentence in sentences:
            console.print(Text("  " + plain(sentence)))
        console.print()


def temperature(pair: Mapping[str, Any]) -> str:
    """Which temperature the headline is at, in words; both where they are not the same."""
    base, other = pair["at"]
    return f"temperature {base}" if base == other else f"temperatures {other} and {base}"


def starred(change: Mapping[str, Any] | None, name: str) -> str:
    """A difference, with a star where its interval excludes 0."""
    if change is None or change["mean"] is None:
        return DASH
    return figure(change["mean"], name, signed=True) + ("*" if reading(change) == "excludes zero" else " ")


def _print(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Text, not str: a model named "[b]" is a name, not a style.
    table = Table(title=Text(plain(title), style="bold"), box=SIMPLE_HEAD, title_justify="left", padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(Text(plain(column)), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console.print(table)


def _changes(pair: Mapping[str, Any], several: bool) -> Iterator[list[str]]:
    for name, change in pair["changes"].items():
        cells = [figure(change[side], name) for side in ("base", "other")]
        cells += [starred(change, name), interval(change, name, signed=True)]
        if several:
            cells.append(_bare(change.get("holm")))
        yield [MEASURES[name].label, *cells]


def _wins(pair: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, found in pair["wins"].items():
        if found["prompts"]:
            counts = "/".join(str(found[what]) for what in ("wins", "ties", "losses"))
            shares = "/".join(f"{share * 100:.0f}" for share in found["shares"])
            yield [MEASURES[name].label, counts, shares, net_share(found), _bare(found["p"])]


def _bare(value: float | None) -> str:
    """A probability in a column that is named so."""
    return DASH if value is None else probability(value).removeprefix("p ").removeprefix("= ")


def net_share(found: Mapping[str, Any]) -> str:
    """Wins less losses as a share of the prompts, with its interval."""
    text = f"{found['net']:+.0%}"
    if found["ci95"] is not None:
        text += f" ({found['ci95'][0]:+.0%} to {found['ci95'][1]:+.0%})"
    return text.replace("-", MINUS)


def _temperatures(pair: Mapping[str, Any], names: Sequence[str]) -> Iterator[list[str]]:
    for key, changes in pair["temperatures"].items():
        yield [key, *(starred(changes.get(name), name) for name in names)]


def _groups(pair: Mapping[str, Any], names: Sequence[str]) -> Iterator[list[str]]:
    for label, found in pair["groups"].items():
        yield [label, str(found["prompts"]), *(starred(found["changes"].get(name), name) for name in names)]


def _samples(pair: Mapping[str, Any]) -> Iterator[str]:
    for side in ("other", "base"):
        for one in pair["extremes"][side][:SHOWN]:
            yield f"Where {plain(pair[side])} is most ahead: {plain(one['uid'])}"
            texts = [("prompt", one["rows"][0]["prompt"])]
            texts += [("reference", text) for text in (one["rows"][0].get("references") or [])[:1]]
            texts += [
                (name, row["response"]) for name, row in zip((pair["base"], pair["other"]), one["rows"], strict=True)
            ]
            for name, text in texts:
                cut = plain(text)
                yield f"  {plain(name)}: {cut[:LONGEST]}{'…' if len(cut) > LONGEST else ''}"
            yield ""

"""Tables for people, in a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, below: Sequence[Sequence[str]] = ()
) -> None:
    """A title as wide as it needs, and a table, right-aligned but for the first column; ``below`` are further rows
    under a line."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, not str: a model named "[b]" is a name, not a style.
    table = Table(box=SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if place else "left", no_wrap=place == 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    if below:
        table.add_section()
    for row in below:
        table.add_row(*map(Text, row))
    Console().print(Text(title), table, sep="\n", highlight=False)

"""What people read in a terminal: tables, and output that ends no work where it cannot be written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table


class _Lasting(io.FileIO):
    """A descriptor to which what cannot be written is let go of, counted, and told once there is room again."""

    _lost, _why = 0, ""

    def write(self, content: object) -> int:
        left = view = memoryview(content).cast("B")  # type: ignore[arg-type]
        try:
            if self._lost:
                told = f"\nnote: {self._lost:,} bytes of output could not be written ({self._why})\n".encode()
                if super().write(told) != len(told):  # half of it: told again
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                self._lost = 0
            while left:
                taken = super().write(left)
                if taken is None:  # a pipe that is full and does not wait
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
                left = left[taken:]
        except OSError as error:
            self._lost, self._why = self._lost + left.nbytes, os.strerror(error.errno or 0)
        return view.nbytes


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """No work in the block ends because its output goes to a full disk, a closed terminal or a pipe that nobody reads
    any more."""
    out, errors = _lasting(sys.stdout), _lasting(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            yield
        finally:
            for stream in (out, errors):
                if stream is not None:
                    stream.flush()


def _lasting(stream: TextIO | None) -> TextIO | None:
    """Another way to the same descriptor; the stream itself where it has none."""
    if not isinstance(stream, io.TextIOWrapper):  # none at all where the descriptor was closed
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    try:
        raw = _Lasting(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors,
        line_buffering=stream.line_buffering, write_through=stream.write_through,
    )  # fmt: skip


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    below: Sequence[Sequence[str]] = (),
    spare: Sequence[str] = (),
) -> None:
    """A title as wide as it needs, and a table, right-aligned but for the first column; ``below`` are further rows
    under a line. Where the terminal is narrow the columns named in ``spare`` are left out, the first of them first, and
    no word is broken unless there is no other way."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    kept = [*range(len(columns))]
    for name in spare:
        if _width(columns, [*rows, *below], kept) > console.width and name in columns:
            kept.remove(columns.index(name))
    whole = _width(columns, [*rows, *below], kept) <= console.width
    table = _table(columns, rows, below, kept=kept, whole=whole)
    console.print(Text(title), table, sep="\n", highlight=False)


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    below: Sequence[Sequence[str]],
    *,
    kept: Sequence[int],
    whole: bool,
) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Text, not str: a model named "[b]" is a name, not a style.
    table = Table(box=SIMPLE_HEAD)
    for place in kept:
        least = _least(columns, [*rows, *below], place) if whole else None
        table.add_column(
            Text(columns[place]), justify="right" if place else "left", no_wrap=place == 0, overflow="fold",
            min_width=least,
        )  # fmt: skip
    for row in rows:
        table.add_row(*(Text(row[place]) for place in kept))
    if below:
        table.add_section()
    for row in below:
        table.add_row(*(Text(row[place]) for place in kept))
    return table


def _least(columns: Sequence[str], rows: Sequence[Sequence[str]], place: int) -> int:
    """Cells of a column that breaks inside no word; of the first, which is never broken, inside no line."""
    from rich.cells import cell_len

    cells = [columns[place], *(row[place] for row in rows)]
    return max(cell_len(word) for cell in cells for word in ([cell] if place == 0 else cell.split() or [""]))


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]], kept: Sequence[int]) -> int:
    """Cells of the narrowest table in which no word is broken: with a blank on each side of a column and between."""
    return sum(_least(columns, rows, place) + 3 for place in kept) + 1

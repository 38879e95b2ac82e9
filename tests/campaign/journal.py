"""A campaign's memory: one line of JSON for each thing that happened, so that a campaign that was killed goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class Journal:
    """Lines in a file; ``elapsed`` counts the seconds of all processes that worked on the campaign."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.lines: list[dict[str, Any]] = []
        if file.is_file():
            text = file.read_bytes()
            whole = text.rfind(b"\n") + 1  # a line that was being written is written again
            if whole < len(text):
                os.truncate(file, whole)
            self.lines = [json.loads(line) for line in text[:whole].splitlines()]
        self._before = self.lines[-1]["elapsed"] if self.lines else 0.0
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of the campaign so far."""
        return self._before + time.monotonic() - self._began

    def add(self, what: str, **fields: Any) -> dict[str, Any]:
        """Writes a line of a kind ``what``."""
        line = {"what": what, "time": time.strftime("%H:%M:%S"), "elapsed": round(self.elapsed, 1), **fields}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line

    def of(self, what: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of a kind with these fields."""
        return [
            line
            for line in self.lines
            if line["what"] == what and all(line.get(name) == value for name, value in fields.items())
        ]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns side by side, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[place]) for row in cells) for place in range(len(head))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if cell.replace(".", "", 1).isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)

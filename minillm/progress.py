"""What a person sees while something long runs: rate, time left, and the two or three numbers that matter."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from minillm.errors import visible

ROOM_FOR_A_BAR = 120
"""Columns of a terminal from which on a bar fits beside the figures."""
LINE_EVERY_S = 10.0
"""Without a terminal (a log file, a cluster), one line so often instead of a bar."""


class Progress:
    """One line kept up to date on a terminal (with a bar where there is room), a line every ten seconds elsewhere."""

    def __init__(self, title: str, *, total: int, unit: str = "steps", shown: bool = True, before: int = 0) -> None:
        """``before`` of the total were done by an earlier process, and are no part of the rate."""
        title = visible(title)  # a model's folder may be called anything
        self._title, self._total, self._unit, self._shown = title, total, unit, shown
        self._start = self._last_line = time.monotonic()
        self._first: int | None = before or None
        self._bar: Any = None
        if shown and sys.stdout.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

            console = Console()
            # Where there is little room the figures matter more than the bar.
            bar: list[ProgressColumn] = [BarColumn(bar_width=24)] if console.width >= ROOM_FOR_A_BAR else []
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), *bar, TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[rate]}"), TextColumn("left"), TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[numbers]}"), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, rate="", numbers="")
            self._bar.start()

    def advance(self, done: int, numbers: Mapping[str, float]) -> None:
        """``done`` of the total are finished; ``numbers`` are the figures to show, by name."""
        if not self._shown:
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done - 1, now if done > 1 else self._start
        rate = (done - self._first) / max(now - self._start, 1e-9)
        text = "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.3g} {self._unit}/s", numbers=text)
        elif now - self._last_line >= LINE_EVERY_S or done == self._total:
            self._last_line = now
            left = (self._total - done) / max(rate, 1e-9)
            line = f"{self._title} {done}/{self._total}  {rate:.3g} {self._unit}/s  {left:.0f} s left  {text}"
            print(line.rstrip(), flush=True)

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if not self._shown:
            return
        line = visible(line)
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

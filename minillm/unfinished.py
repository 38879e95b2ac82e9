"""What an interrupted evaluation leaves behind so that it can go on: the rows drawn so far, and what was asked.

One file beside the results, ``samples.partial.jsonl``: a first line that says what was asked, then a line for each row.
It is written whole or not at all, by the first rank, and goes when the results are written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minillm.cards import may_differ
from minillm.errors import DataError
from minillm.ranks import Ranks
from minillm.store import UNFINISHED, write_jsonl

EVERY_S = 20.0
"""Seconds between two writings, at least."""
SHARE = 0.05
"""Most of the time that writing may take: very many rows are written less often."""

Key = tuple[int, int, int]
"""Which temperature of those asked for, the sampling seed, which prompt."""
Keyed = tuple[Key, dict[str, Any]]
"""A row of samples.jsonl and where it belongs."""


class Keeper:
    """Keeps the rows of an evaluation that is under way; every rank has one, and the first one writes."""

    def __init__(self, out: Path, *, asked: Mapping[str, Any], ranks: Ranks, say: Callable[[str], None]) -> None:
        self._file, self._asked, self._ranks = out / UNFINISHED, dict(asked), ranks
        # Only the first rank need see the disk.
        told = ranks.of_first(lambda: _kept(self._file, asked, say))
        self._before: float = 0.0 if told is None else told[0]
        self.rows: list[Keyed] = [] if told is None else told[1]
        """What an earlier process drew."""
        self._start = self._written = time.monotonic()
        self._wait = EVERY_S

    @property
    def seconds(self) -> float:
        """Since it was made, and what the rows that it found had taken."""
        return self._before + time.monotonic() - self._start

    def due(self) -> bool:
        """Whether it is time to write: the first rank looks at its clock, and all hear the same answer."""
        return self._ranks.anyone(self._ranks.first and time.monotonic() - self._written >= self._wait)

    def keep(self, rows: list[Keyed]) -> None:
        """Writes all rows that there are."""
        if self._ranks.first:
            began = time.monotonic()
            head = {"asked": self._asked, "seconds": round(self.seconds, 2)}
            write_jsonl(self._file, [head, *({"key": key, "row": row} for key, row in rows)])
            self._written = time.monotonic()
            self._wait = max(EVERY_S, (self._written - began) / SHARE)

    def drop(self) -> None:
        """The results are written: what was kept is no longer needed."""
        if self._ranks.first:
            self._file.unlink(missing_ok=True)


def begin(out: Path, asked: Mapping[str, Any]) -> None:
    """Says beside results that are about to be replaced what by, before any row is drawn."""
    if (out / "results.json").is_file() and not (out / UNFINISHED).is_file():
        write_jsonl(out / UNFINISHED, [{"asked": dict(asked), "seconds": 0.0}])


def asked_before(out: Path) -> dict[str, Any] | None:
    """What the unfinished evaluation in a folder was asked; None where there is none. ``DataError`` for another file of
    that name."""
    file = out / UNFINISHED
    return _read(file)[0]["asked"] if file.is_file() else None


def _kept(file: Path, asked: Mapping[str, Any], say: Callable[[str], None]) -> tuple[float, list[Keyed]] | None:
    """(Seconds that they took, rows) of an unfinished evaluation that was asked the same."""
    if not file.is_file():
        return None
    try:
        head, rows = _read(file)
    except DataError as error:
        say(f"note: starting over, since {str(error).splitlines()[0]}")
        return None
    if differs := ", ".join(differences(asked, head["asked"])):
        say(f"note: {file} is of another evaluation (they differ in: {differs}); starting over")
        return None
    if rows:
        say(f"{file}: going on with an unfinished evaluation, {len(rows):,} responses are there")
    return head["seconds"], rows


def differences(asked: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The names under which two questions are not, or may not be, the same."""
    return [name for name in {**asked, **before} if may_differ(asked.get(name), before.get(name))]


def _read(file: Path) -> tuple[dict[str, Any], list[Keyed]]:
    try:
        with file.open(encoding="utf-8") as text:
            head, *lines = [json.loads(line) for line in text]
        rows = [((turn, seed, place), dict(line["row"])) for line in lines for turn, seed, place in [line["key"]]]
        return {"asked": dict(head["asked"]), "seconds": float(head["seconds"])}, rows
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is not what an unfinished evaluation leaves ({type(error).__name__})\n"
            "  move it away, or give --fresh"
        ) from error

"""What an interrupted evaluation leaves behind so that it can go on: what it drew and read so far, and what was asked.

One file beside the results, ``samples.partial.jsonl``: a first line that says what was asked, then a line for each row
of samples.jsonl and for each piece of what exposure and calibration read. A piece is what a prompt (its sample, its
choice) brought, before anything is summed, with numbers as JSON spells them, which is exact. The file is written whole
or not at all, by the first rank, and goes when the results are written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.cards import may_differ
from minillm.errors import DataError
from minillm.manifests import parsed
from minillm.ranks import Ranks
from minillm.run_log import note
from minillm.store import UNFINISHED, write_jsonl

EVERY_S = 20.0
"""Seconds between two writings, at least."""
SHARE = 0.05
"""Most of the time that writing may take: very many rows are written less often."""

PARTS = {
    "samples": ("responses", 3),
    "exposure": ("pairs of continuations", 2),
    "references": ("references", 1),
    "choices": ("choices", 2),
}
"""What is kept, in the order in which it is made: the word for it, and how many numbers a key has."""
Key = tuple[int, ...]
"""Where something belongs: of a row of samples.jsonl which temperature of those asked for, the sampling seed, which
prompt; of exposure which prompt and sample, of references which prompt, of choices which prompt and choice."""
Keyed = tuple[Key, Any]
"""A row of samples.jsonl, or the numbers that were read, and where it belongs."""


class Keeper:
    """Keeps what an evaluation that is under way has; every rank has one, and the first one writes."""

    def __init__(self, out: Path, *, asked: Mapping[str, Any], ranks: Ranks, say: Callable[[str], None]) -> None:
        self._file, self._asked, self._ranks = out / UNFINISHED, dict(asked), ranks
        # Only the first rank need see the disk.
        told = ranks.of_first(lambda: _kept(self._file, asked, say))
        self._before: float = 0.0 if told is None else told[0]
        self._parts: dict[str, list[Keyed]] = _nothing() if told is None else told[1]
        self._start = self._written = time.monotonic()
        self._wait = EVERY_S

    @property
    def seconds(self) -> float:
        """Since it was made, and what the rows that it found had taken."""
        return self._before + time.monotonic() - self._start

    def kept(self, part: str) -> list[Keyed]:
        """What there is of one of ``PARTS``: first what an earlier process made, then what was held last."""
        return self._parts[part]

    def due(self) -> bool:
        """Whether it is time to write: the first rank looks at its clock, and all hear the same answer."""
        return self._ranks.anyone(self._ranks.first and time.monotonic() - self._written >= self._wait)

    def hold(self, part: str, rows: Sequence[Keyed]) -> None:
        """Takes all that there is of a part, to be written when something is kept next."""
        self._parts[part] = [*rows]

    def keep(self, part: str, rows: Sequence[Keyed]) -> None:
        """Takes all that there is of a part, and writes it with all other parts, or tells why it cannot."""
        self.hold(part, rows)
        if self._ranks.first:
            began = time.monotonic()
            head = {"asked": self._asked, "seconds": round(self.seconds, 2)}
            held = ((part, *keyed) for part, found in self._parts.items() for keyed in found)
            try:
                write_jsonl(self._file, [head, *({"part": part, "key": key, "row": row} for part, key, row in held)])
            except OSError as error:  # it serves an interruption, which may not come
                note(f"{self._file} cannot be written ({error.strerror}); the evaluation goes on, and tries it again")
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


def _nothing() -> dict[str, list[Keyed]]:
    return {part: [] for part in PARTS}


def _kept(
    file: Path, asked: Mapping[str, Any], say: Callable[[str], None]
) -> tuple[float, dict[str, list[Keyed]]] | None:
    """(Seconds that it took, what there is of each part) of an unfinished evaluation that was asked the same."""
    if not file.is_file():
        return None
    try:
        head, parts = _read(file)
    except DataError as error:
        say(f"note: starting over, since {str(error).splitlines()[0]}")
        return None
    if differs := ", ".join(differences(asked, head["asked"])):
        say(f"note: {file} is of another evaluation (they differ in: {differs}); starting over")
        return None
    if there := ", ".join(f"{len(found):,} {PARTS[part][0]}" for part, found in parts.items() if found):
        say(f"{file}: going on with an unfinished evaluation, {there} are there")
    return head["seconds"], parts


def differences(asked: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The names under which two questions are not, or may not be, the same."""
    return [name for name in {**asked, **before} if may_differ(asked.get(name), before.get(name))]


def _key(found: Any, part: str) -> Key:
    """Raises ``ValueError`` where it is no key of this part."""
    if len(found) != PARTS[part][1] or not all(type(number) is int for number in found):
        raise ValueError(found)
    return tuple(found)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, list[Keyed]]]:
    try:
        with file.open(encoding="utf-8") as text:
            head, *lines = [parsed(line) for line in text]
        parts = _nothing()
        for line in lines:
            # Before there were other parts, lines did not name theirs.
            part = line.get("part", "samples")
            parts[part].append((_key(line["key"], part), dict(line["row"]) if part == "samples" else line["row"]))
        return {"asked": dict(head["asked"]), "seconds": float(head["seconds"])}, parts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not what an unfinished evaluation leaves ({type(error).__name__})\n"
            "  move it away, or give --fresh"
        ) from error

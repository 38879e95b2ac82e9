"""Rows of a file of prompts or preferences, or of a corpus, read strictly: a broken row is an error with its line, or
it is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from minillm.errors import DataError
from minillm.pair_records import PairRow, parse_pair
from minillm.records import TEXT_FIELD, Document, Row, RowFault, listed, parse_entry, parse_record, shown
from minillm.released import unfolded
from minillm.row_names import RowNames
from minillm.row_sources import CORPUS, PAIRS, PROMPTS, Kind, Record, Source, locate

Broken = Literal["error", "skip"]
Entry = TypeVar("Entry", bound=Row | Document | PairRow)
SKIP_REMEDY = "mend the row, or leave broken rows out, counted: data.broken: skip and data.max_broken: N (the most)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """One row that ``broken: skip`` left out, and why."""

    where: str
    """'line 5' of a text file, 'row 5' elsewhere; counted from 1, of each file where a source has several."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadReport:
    """What reading found. ``str()`` is the line for the terminal."""

    source: str
    rows: int
    """Rows met, the skipped ones included."""
    skipped: tuple[Skipped, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Fields that are neither text nor number, with how many rows carried them."""

    @property
    def used(self) -> int:
        """Rows handed on."""
        return self.rows - len(self.skipped)

    def __str__(self) -> str:
        parts = [f"{self.source}: {counted(self.rows, 'row')} read"]
        if self.skipped:
            names = [f"{skip.where} ({skip.reason})" for skip in self.skipped]
            parts.append(f"skipped {counted(len(names), 'broken row')}: {listed(names)}")
        if self.ignored:
            names = [f"{shown(name)} (in {counted(count, 'row')})" for name, count in self.ignored.items()]
            parts.append(f"left out {counted(len(names), 'field')} not read here: {listed(names)}")
        return "; ".join(parts)


def read_rows(source: str, *, broken: Broken = "error", max_broken: int = 0) -> tuple[list[Row], ReadReport]:
    """Every row of ``source`` in its order, and the report of what was left out.

    ``broken='error'`` raises ``DataError`` with file, line and column at the first broken row.
    ``broken='skip'`` counts broken rows and raises once there are more than ``max_broken``. A source
    that cannot be read at all, or holds no usable row, is a ``DataError`` in both modes.
    """
    reading = prompt_rows(locate(source, PROMPTS), broken=broken, max_broken=max_broken)
    return list(reading), reading.report()


def read_corpus(
    source: str, *, broken: Broken = "error", max_broken: int = 0
) -> tuple[list[Row] | list[Document], ReadReport]:
    """The same of a corpus: all its documents, or its prompts with their responses. One that holds both is a
    ``DataError``."""
    reading = corpus_rows(locate(source, CORPUS), broken=broken, max_broken=max_broken)
    found = list(of_one_kind(reading))
    rows = [entry for entry in found if isinstance(entry, Row)]
    return rows or [entry for entry in found if isinstance(entry, Document)], reading.report()


def prompt_rows(origin: Source, *, broken: Broken = "error", max_broken: int = 0) -> Reading[Row]:
    """The rows that ``read_rows`` gives, one at a time."""
    return Reading(origin, kind=PROMPTS, parse=parse_record, broken=broken, max_broken=max_broken)


def corpus_rows(origin: Source, *, broken: Broken = "error", max_broken: int = 0) -> Reading[Row | Document]:
    """What stands in a corpus, one at a time, of whatever kind."""
    return Reading(origin, kind=CORPUS, parse=parse_entry, broken=broken, max_broken=max_broken)


def pair_rows(origin: Source, *, broken: Broken = "error", max_broken: int = 0) -> Reading[PairRow]:
    """The pairs of a file of preferences, one at a time."""
    return Reading(origin, kind=PAIRS, parse=parse_pair, broken=broken, max_broken=max_broken)


def of_one_kind(reading: Reading[Row | Document]) -> Iterator[Row | Document]:
    """What a corpus holds, as long as it is of the first one's kind; ``DataError`` at the end where it was not."""
    counts, first = {Row: 0, Document: 0}, dict[type, str]()
    for entry in reading:
        kind = type(entry)
        counts[kind] += 1
        first.setdefault(kind, entry.uid)
        if len(first) == 1:
            yield entry
    if len(first) > 1:
        raise DataError(
            f"{reading.name} holds {counted(counts[Document], 'document')} ({shown(first[Document])} is the first) and "
            f"{counted(counts[Row], 'row')} with a prompt ({shown(first[Row])})\n"
            "  a corpus is of one kind: put the two into files of their own, and choose one"
        )


class Reading(Generic[Entry]):
    """The rows of a source, read once from its beginning to its end, one at a time; then ``report`` says what was
    found."""

    def __init__(
        self, origin: Source, *, kind: Kind, parse: Callable[..., tuple[Entry, list[str]]], broken: Broken,
        max_broken: int,
    ) -> None:  # fmt: skip
        self._origin, self._kind, self._parse = origin, kind, parse
        self._broken, self._max_broken = broken, max_broken
        self._skipped: list[Skipped] = []
        self._ignored: dict[str, int] = {}
        self._names, self._used = RowNames(), 0
        self.part = origin
        """The file that the last row stands in, where the source has several."""
        self.records = 0
        """Lines or rows of the files that were met so far."""

    @property
    def name(self) -> str:
        """The source's."""
        return self._origin.name

    def __iter__(self) -> Iterator[Entry]:
        for part in self._origin.parts:
            before, self.part = self.records, part
            for number, record, default_uid in _unfolded(part, self._kind):
                self.records = before + number
                entry = self._entry(part, number, record, default_uid=default_uid)
                if entry is not None:
                    self._used += 1
                    yield entry

    def report(self) -> ReadReport:
        """What became of all rows; ``DataError`` where none is left."""
        report = ReadReport(
            source=self.name,
            rows=self._used + len(self._skipped),
            skipped=tuple(self._skipped),
            ignored=self._ignored,
        )
        if not self._used:
            what = f"{report}; no row is left" if self._skipped else f"{self.name} is empty: it holds no rows"
            raise DataError(f"{what}\n  wanted {self._kind.row}")
        return report

    def _entry(self, part: Source, number: int, record: Record | RowFault, *, default_uid: str) -> Entry | None:
        """The checked row; None for a broken one that may be left out."""
        where = f"{part.unit} {number}{f' of {part.name}' if self._origin.shards else ''}"
        try:
            if isinstance(record, RowFault):
                raise record
            entry, left_out = self._parse(record, default_uid=default_uid)
            if (first := self._names.first(entry.uid)) is not None:
                raise RowFault(f"id {shown(entry.uid)} already names {first}; ids are unique")
        except RowFault as fault:
            self._skipped.append(Skipped(where=where, reason=fault.reason))
            if len(self._skipped) > (self._max_broken if self._broken == "skip" else 0):
                column = "" if fault.column is None else f", column {fault.column}"
                told = f"{part.name}, {part.unit} {number}{column}: {fault.reason}"
                message = _too_broken(told, skipped=self._skipped, broken=self._broken, max_broken=self._max_broken)
                raise DataError(message) from fault
            return None
        self._names.add(entry.uid, where)
        for name in left_out:
            self._ignored[name] = self._ignored.get(name, 0) + 1
        return entry


def _unfolded(origin: Source, kind: Kind) -> Iterator[tuple[int, Record | RowFault, str]]:
    """Numbered records with the id of a row that has none; several where one record holds several instances."""
    for number, record in origin.records():
        name = f"{origin.stem}-{number}"
        document = kind is CORPUS and not isinstance(record, RowFault) and TEXT_FIELD in record
        if isinstance(record, RowFault) or document:
            yield number, record, name
            continue
        parts = unfolded(record)
        for place, part in enumerate(parts):
            yield number, part, name if len(parts) == 1 else f"{name}#{place}"


def counted(count: int, noun: str) -> str:
    """``'7,473 rows'``, ``'1 row'``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _too_broken(where: str, *, skipped: list[Skipped], broken: Broken, max_broken: int) -> str:
    if broken == "error":
        return f"{where}\n  {SKIP_REMEDY}"
    earlier = [skip.where for skip in skipped[:-1]]
    before = f"; broken before it: {listed(earlier)}" if earlier else ""
    return (
        f"{where}\n  this is broken row {len(skipped):,} and data.max_broken allows {max_broken:,}{before}\n"
        "  mend the file, or raise data.max_broken if losing these rows is right"
    )

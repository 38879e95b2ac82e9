"""Rows of a prompt file or a corpus, read strictly: a broken row is an error with its line, or it is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from minillm.errors import DataError
from minillm.records import TEXT_FIELD, Document, Row, RowFault, listed, parse_entry, parse_record, shown
from minillm.released import unfolded
from minillm.row_sources import CORPUS, PROMPTS, Kind, Record, Source, locate

Broken = Literal["error", "skip"]
Entry = TypeVar("Entry", bound=Row | Document)
SKIP_REMEDY = "mend the row, or leave broken rows out, counted: data.broken: skip and data.max_broken: N (the most)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """One row that ``broken: skip`` left out, and why."""

    where: str
    """'line 5' of a text file, 'row 5' elsewhere; counted from 1."""
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
    return _read(source, kind=PROMPTS, parse=parse_record, broken=broken, max_broken=max_broken)


def read_corpus(
    source: str, *, broken: Broken = "error", max_broken: int = 0
) -> tuple[list[Row] | list[Document], ReadReport]:
    """The same of a corpus: all its documents, or its prompts with their responses. One that holds both is a
    ``DataError``."""
    found, report = _read(source, kind=CORPUS, parse=parse_entry, broken=broken, max_broken=max_broken)
    rows = [entry for entry in found if isinstance(entry, Row)]
    documents = [entry for entry in found if isinstance(entry, Document)]
    if rows and documents:
        raise DataError(
            f"{report.source} holds {counted(len(documents), 'document')} ({shown(documents[0].uid)} is the first) and "
            f"{counted(len(rows), 'row')} with a prompt ({shown(rows[0].uid)})\n"
            "  a corpus is of one kind: put the two into files of their own, and choose one"
        )
    return rows or documents, report


def _read(
    source: str, *, kind: Kind, parse: Callable[..., tuple[Entry, list[str]]], broken: Broken, max_broken: int
) -> tuple[list[Entry], ReadReport]:
    origin = locate(source, kind)
    allowed = max_broken if broken == "skip" else 0
    entries: list[Entry] = []
    skipped: list[Skipped] = []
    ignored: dict[str, int] = {}
    first_seen: dict[str, int] = {}
    for number, record, default_uid in _unfolded(origin, kind):
        try:
            if isinstance(record, RowFault):
                raise record
            entry, left_out = parse(record, default_uid=default_uid)
            if entry.uid in first_seen:
                raise RowFault(
                    f"id {shown(entry.uid)} already names {origin.unit} {first_seen[entry.uid]}; ids are unique"
                )
        except RowFault as fault:
            skipped.append(Skipped(where=f"{origin.unit} {number}", reason=fault.reason))
            if len(skipped) > allowed:
                column = "" if fault.column is None else f", column {fault.column}"
                where = f"{origin.name}, {origin.unit} {number}{column}: {fault.reason}"
                message = _too_broken(where, skipped=skipped, broken=broken, max_broken=max_broken)
                raise DataError(message) from fault
            continue
        first_seen[entry.uid] = number
        entries.append(entry)
        for name in left_out:
            ignored[name] = ignored.get(name, 0) + 1
    met = len(entries) + len(skipped)
    report = ReadReport(source=origin.name, rows=met, skipped=tuple(skipped), ignored=ignored)
    if not entries:
        what = f"{report}; no row is left" if skipped else f"{origin.name} is empty: it holds no rows"
        raise DataError(f"{what}\n  wanted {kind.row}")
    return entries, report


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

"""Where rows come from, as numbered records.

One record per row, from JSON Lines (``.jsonl``, ``.jsonl.gz``), Parquet, several such files of one kind (a folder, a
pattern), a hub data set (``hub:NAME@SPLIT``, ``hub:NAME:CONFIG@SPLIT``), a published set (``set:NAME``) or the
embedded world (``world:SPLIT``); of a corpus also from text (``.txt``), where lines up to a blank one are a document.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from minillm.errors import DataError, did_you_mean
from minillm.hub import asked_once
from minillm.records import TEXT_FIELD, RowFault, decode_line, listed, parse_line, shown
from minillm.released import known_set
from minillm.shards import is_pattern, require_alike, shards_of

Record = Mapping[str, object]
Numbered = Iterator[tuple[int, Record | RowFault]]
FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
TEXT_ENDING = ".txt"
CORPUS_ENDINGS = (*FILE_ENDINGS, TEXT_ENDING)
WORLD_SPLITS = ("train", "validation", "test")
MAX_LINE_BYTES = 16 * 2**20
"""A longer line is broken: it is never a prompt, and it must not fill the memory of every rank. So is a longer document
of a text file."""


PARQUET_ROWS = 1024
"""Rows of a Parquet file that are in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where records come from, and how their places are spoken of."""

    name: str
    stem: str
    """Begins the uid of a row that has none of its own."""
    unit: Literal["line", "row"]
    records: Callable[[], Numbered]
    files: Callable[[], Sequence[Path]] = tuple
    """Those whose bytes decide what the records are; none where the library makes them."""
    count: Callable[[], int] = int
    """Lines or rows that there are; 0 where that cannot be told before reading."""
    shards: tuple[Source, ...] = ()
    """Its files in their order, where it has several; rows are numbered in each."""

    @property
    def parts(self) -> tuple[Source, ...]:
        """What is read one after the other."""
        return self.shards or (self,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of file, as messages speak of it."""

    name: str
    endings: tuple[str, ...]
    row: str
    """What a file of it has to hold at least one of."""


PROMPTS = Kind(
    name="prompt file", endings=FILE_ENDINGS, row="one JSON object a line (or a Parquet row) for each prompt"
)
CORPUS = Kind(
    name="corpus",
    endings=CORPUS_ENDINGS,
    row=f"one JSON object a line (or a Parquet row) for each document, or in a {TEXT_ENDING} file lines of text",
)
PAIRS = Kind(
    name="preference file", endings=FILE_ENDINGS, row="one JSON object a line (or a Parquet row) for each pair"
)


def locate(source: str, kind: Kind) -> Source:
    """Where the records of ``source`` come from; none is read yet. ``DataError`` where it cannot be a source."""
    scheme, _, rest = source.partition(":")
    if scheme == "world":
        return _world(rest)
    if scheme == "hub":
        return _hub(source, rest)
    if scheme == "set":
        return _set(source, rest)
    return _file(source, kind)


def _file(source: str, kind: Kind) -> Source:
    try:
        path = Path(source).expanduser()
        several = path.is_dir() or is_pattern(source)
    except (OSError, RuntimeError) as error:  # longer than any path may be; a home of nobody
        raise DataError(f"{shown(source)} cannot be looked up: {error}") from error
    if several:
        return _several(source, kind)
    if not path.exists():
        raise DataError(f"{source} does not exist{_near_files(path, kind)}")
    suffix = next((end for end in kind.endings if path.name.endswith(end)), None)
    if suffix is None or not path.is_file():
        raise DataError(
            f"{source} is not a kind of {kind.name} known here\n  wanted a {', '.join(kind.endings)} file, a folder of "
            "them, 'world:SPLIT', 'set:NAME' or 'hub:NAME@SPLIT'; JSON Lines holds one JSON object a line"
        )
    return _one(path, name=source, stem=path.name.removesuffix(suffix), suffix=suffix)


def _one(path: Path, *, name: str, stem: str, suffix: str) -> Source:
    if suffix == ".parquet":
        return Source(
            name=name, stem=stem, unit="row", records=lambda: _parquet(path, name), files=lambda: (path,),
            count=lambda: _parquet_rows(path),
        )  # fmt: skip
    records = _text if suffix == TEXT_ENDING else _jsonl
    return Source(
        name=name, stem=stem, unit="line", records=lambda: records(path, name), files=lambda: (path,),
        count=lambda: _lines_in(path),
    )  # fmt: skip


def _several(source: str, kind: Kind) -> Source:
    found = shards_of(source, endings=kind.endings, what=kind.name)
    paths = tuple(shard.path for shard in found)
    if found[0].ending == ".parquet":
        require_alike(paths, source=source)
    each = tuple(_one(shard.path, name=str(shard.path), stem=shard.stem, suffix=shard.ending) for shard in found)
    return Source(
        name=source, stem="", unit=each[0].unit, files=lambda: paths, shards=each,
        records=lambda: itertools.chain.from_iterable(one.records() for one in each),
        count=lambda: sum(one.count() for one in each),
    )  # fmt: skip


def files_of(source: str) -> tuple[Path, ...]:
    """The files that a source names by path: none where it is no path, or nothing is there."""
    try:
        if Path(source).expanduser().is_dir() or is_pattern(source):
            return tuple(shard.path for shard in shards_of(source, endings=CORPUS_ENDINGS, what="source"))
        return tuple(path for path in (Path(source).expanduser(),) if path.is_file())
    except (OSError, RuntimeError, DataError):
        return ()


def _data_files(folder: Path, kind: Kind) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(kind.endings))


def _files_in(folder: Path, kind: Kind) -> str:
    names = _data_files(folder, kind)
    return f"; it holds {listed(names)}" if names else f"; no {' or '.join(kind.endings)} file lies in it"


def _near_files(path: Path, kind: Kind) -> str:
    if not path.parent.is_dir():
        return (
            f"; neither does its folder {path.parent}\n"
            f"  paths start at the working folder {Path.cwd()}; a hub data set is written 'hub:NAME@SPLIT'"
        )
    names = _data_files(path.parent, kind)
    return did_you_mean(path.name, names) or f"; its folder {path.parent} is there{_files_in(path.parent, kind)}"


def _text(path: Path, name: str) -> Numbered:
    """Documents of a text file: runs of lines between blank ones, each under the number of its first line."""
    try:
        with path.open("rb") as stream:
            for blank, lines in itertools.groupby(
                _lines(stream), key=lambda of: of[1] is not None and not of[1].strip()
            ):
                if not blank:
                    yield _document(lines)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}\n  the file is damaged; fetch or write it again") from error


def _document(lines: Iterator[tuple[int, bytes | None]]) -> tuple[int, Record | RowFault]:
    """All of these lines; a fault stands under the number of its own line."""
    begun, size, texts = 0, 0, list[str]()
    fault: tuple[int, RowFault] | None = None
    for number, line in lines:
        begun = begun or number
        size += len(line or b"")
        try:
            if size > MAX_LINE_BYTES:
                raise RowFault("a document longer than 16 MiB begins there; a blank line parts documents")
            texts.append(decode_line(line, first=number == 1).replace("\r\n", "\n"))
        except RowFault as found:
            fault = fault or (begun if size > MAX_LINE_BYTES else number, found)
            texts, size = [], 0
    return fault or (begun, {TEXT_FIELD: "".join(texts).rstrip("\n")})


def _jsonl(path: Path, name: str) -> Numbered:
    """Records of a JSON Lines file; damage to the file as a whole (gzip, disk) is a ``DataError``."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in _lines(stream):
                try:
                    record: Record | RowFault = parse_line(line, first=number == 1)
                except RowFault as fault:
                    record = fault
                yield number, record
    except (OSError, EOFError, zlib.error) as error:
        # A cut or damaged archive may hide any number of rows, so it is never skipped.
        raise DataError(
            f"{name} cannot be read{_beyond('line', number)}: {error}\n  the file is damaged; fetch or write it again"
        ) from error


def _lines(stream: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, bytes | None]]:
    """Numbered lines with their newline; None in place of a line over ``MAX_LINE_BYTES``."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        too_long = len(line) > MAX_LINE_BYTES
        while too_long and line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)
        yield number, None if too_long else line


def _lines_in(path: Path) -> int:
    """How many there are; 0 for a file that cannot be read, which reading tells."""
    found, last = 0, b"\n"
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            while piece := stream.read(2**20):
                found, last = found + piece.count(b"\n"), piece[-1:]
    except (OSError, EOFError, zlib.error):
        return 0
    return found + (last != b"\n")


def _beyond(unit: str, number: int) -> str:
    return f" beyond {unit} {number}" if number else ""


def _parquet(path: Path, name: str) -> Numbered:
    # Heavy, and needed by no other kind of source; so are the next two imports like this one.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        # Row groups may be of any size: without buffers of their own only the pages that are read are in memory.
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**16) as table:
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = str(error).partition("\n")[0]
        raise DataError(
            f"{name} cannot be read as Parquet{_beyond('row', number)}: {first_line}\n  write the file again"
        ) from error


def _parquet_rows(path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError):
        return 0


def _world(split: str) -> Source:
    if split not in WORLD_SPLITS:
        raise DataError(
            f"the embedded world has no split {split!r}{did_you_mean(split, WORLD_SPLITS)}\n"
            f"  wanted one of {', '.join('world:' + name for name in WORLD_SPLITS)}"
        )

    return Source(name=f"world:{split}", stem=split, unit="row", records=lambda: enumerate(_world_rows(split), start=1))


@lru_cache(maxsize=3)
def _world_rows(split: str) -> Sequence[Record]:
    # Making them takes seconds, and a study reads them for every cell.
    from minillm.world import rows

    return tuple(rows(split))


def _hub(source: str, rest: str) -> Source:
    whole, at, split = rest.rpartition("@")
    name, _, config = whole.partition(":")
    if not (at and split and name):
        raise DataError(
            f"{source!r} does not name a hub data set and its split\n"
            "  wanted 'hub:NAME@SPLIT', such as hub:openai/gsm8k:main@train (with the config 'main')"
        )
    table = lru_cache(maxsize=1)(lambda: _hub_table(source, name, config, split))
    return Source(
        name=source, stem=name.rpartition("/")[2], unit="row",
        records=lambda: enumerate(table(), start=1),
        files=lambda: [Path(file["filename"]) for file in table().cache_files],
        count=lambda: len(table()),
    )  # fmt: skip


def _set(source: str, name: str) -> Source:
    """A published set: its one file on the hub. Beside it are text files, which ``datasets`` would read instead."""
    known = known_set(name)

    @lru_cache(maxsize=1)
    def fetched() -> Path:
        from huggingface_hub import hf_hub_download

        try:
            with asked_once():
                return Path(hf_hub_download(known.repository, known.file, repo_type="dataset"))
        except Exception as error:  # as below: what network and cache raise is one fault to the user
            raise DataError(
                f"{source} could not be loaded: {_reason(error)}\n  check the network, or name a copy of {known.file} "
                f"of the data set {known.repository}"
            ) from error

    return Source(
        name=source, stem=name, unit="line", records=lambda: _jsonl(fetched(), source), files=lambda: (fetched(),),
        count=lambda: _lines_in(fetched()),
    )  # fmt: skip


def _hub_table(source: str, name: str, config: str, split: str) -> Any:
    import datasets

    try:
        with asked_once():
            return datasets.load_dataset(name, config or None, split=split)
    # The library raises what its network, cache and format readers raise; all of it is one fault to the user.
    except Exception as error:
        raise DataError(
            f"{source} could not be loaded: {_reason(error)}\n"
            "  check name, split and network; a data set with several configs is named hub:NAME:CONFIG@SPLIT"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])

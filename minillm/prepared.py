"""Rows and texts of a source made ready for the models: a small source in memory, a large one in the data cache.

Both ways read the source one row at a time and give the same rows with the same ids and the same hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.corpus import Block, Blocks, Cutting, in_batches
from minillm.data_cache import DataCache, Made
from minillm.disk import Sink
from minillm.errors import DataError
from minillm.progress import Progress
from minillm.prompt_table import BATCH_ROWS, open_table, record_batch, schema
from minillm.prompts import ENCODE_ROWS, DataHash, OverLong, Preparing, data_hash
from minillm.records import Document, Row
from minillm.row_sources import Source
from minillm.rows import Broken, Reading, corpus_rows, of_one_kind, prompt_rows
from minillm.templates import Template
from minillm.types import Prompt
from minillm.vocabulary import identity, real_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGE_ROWS, LARGE_BYTES = 10_000, 16 * 2**20
"""A source of more rows or bytes is large. At this size reading takes about as long as looking into the cache."""
DATA_FORMAT = 1
"""Of what is kept: to be raised where rows become other prompts, or tables look otherwise, than in the last version."""
_VERSIONS = ("transformers", "tokenizers", "jinja2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How the rows of a source are to become prompts."""

    origin: Source
    corpus: bool
    """Whether it is read as a corpus."""
    name: str
    broken: Broken
    max_broken: int
    limit: int | None
    """The first so many rows alone."""
    responses: int | None
    """The responses of the first so many rows alone."""
    template: Template
    max_prompt_tokens: int
    over_long: OverLong
    max_response_tokens: int
    eos_id: int
    need_response: bool

    def rows(self) -> Reading[Row] | Reading[Row | Document]:
        """The source, opened."""
        opened = corpus_rows if self.corpus else prompt_rows
        return opened(self.origin, broken=self.broken, max_broken=self.max_broken)

    def preparing(self, tokenizer: PreTrainedTokenizerBase) -> Preparing:
        """Template, tokenizer and limits."""
        return Preparing(
            tokenizer=tokenizer, template=self.template, max_prompt_tokens=self.max_prompt_tokens,
            over_long=self.over_long, max_response_tokens=self.max_response_tokens, eos_id=self.eos_id,
            need_response=self.need_response, name=self.name,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Prompts that are ready, and what there is to be told."""

    prompts: Sequence[Prompt]
    sha256: str
    words: tuple[str, ...]
    report: str
    """What was dropped and cut."""
    place: str = ""
    """A line that says where the cache has them; "" where they are in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedBlocks:
    """The blocks of a corpus, and what there is to be told."""

    blocks: Blocks
    sha256: str
    words: tuple[str, ...]
    report: str
    place: str = ""


def is_large(origin: Source) -> bool:
    """Whether a source is kept in the cache."""
    files = origin.files()
    return bool(files) and (sum(file.stat().st_size for file in files) > LARGE_BYTES or origin.count() > LARGE_ROWS)


def prepared_prompts(wanted: Wanted, tokenizer: PreTrainedTokenizerBase, *, cache: DataCache) -> Prepared:
    """The prompts of a source, in memory or mapped.

    Raises ``DataError`` where a row breaks the policy or none is left, ``DiskError`` where the cache cannot be written.
    """
    if not is_large(wanted.origin):
        prompts: list[Prompt] = []
        words = _prepare(wanted, tokenizer, keep=prompts.append)
        return Prepared(prompts=prompts, sha256=data_hash(prompts), words=words[:-1], report=words[-1])

    def make(_: Path, sink: Sink) -> Made:
        digest = DataHash()
        with _TableWriter(sink) as table, closing(_Told(wanted.origin, wanted.name)) as told:

            def keep(prompt: Prompt) -> None:
                digest.add(prompt)
                table.add(prompt)

            words = _prepare(wanted, tokenizer, keep=keep, told=told)
        return Made(data_sha256=str(digest), words=words)

    asked = {"what": "prompts", **_of_source(wanted, cache=cache), **_of_tokenizer(tokenizer)}
    settings = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted)}
    asked |= {name: value for name, value in settings.items() if name != "origin"}
    if wanted.template == "chat":
        asked["chat"] = _chat(tokenizer)
    found = cache.entry(asked, make=_unchanged(make, wanted.origin), opened=open_table, name=wanted.name)
    *words_of, report = found.made.words
    return Prepared(
        prompts=found.data, sha256=found.made.data_sha256, words=tuple(words_of), report=report, place=found.word
    )


def prepared_blocks(
    wanted: Wanted, tokenizer: PreTrainedTokenizerBase, *, ends: Sequence[int], length: int, cache: DataCache
) -> PreparedBlocks:
    """The documents of a corpus in blocks of ``length`` tokens, in memory or mapped; of ``wanted`` source, name and
    what is done about broken rows count. Raises as ``prepared_prompts`` does."""
    name = wanted.name
    if not is_large(wanted.origin):
        tokens = array("i")
        words = _cut(wanted, tokenizer, ends=ends, keep=tokens.extend)
        blocks = Blocks(tokens, length=length, name=name)
        return PreparedBlocks(blocks=blocks, sha256=data_hash(blocks), words=words[:-1], report=words[-1])
    import numpy

    kind = "uint16" if max(real_ids(tokenizer), max(ends) + 1) <= 2**16 else "uint32"

    def make(file: Path, sink: Sink) -> Made:
        with closing(_Told(wanted.origin, name)) as told:
            words = _cut(
                wanted, tokenizer, ends=ends, told=told,
                keep=lambda ids: sink.write(numpy.asarray(ids, dtype=kind).tobytes()),
            )  # fmt: skip
        return Made(data_sha256=_hash_of_blocks(file, kind, length=length, name=name), words=words)

    asked = {
        "what": "blocks", **_of_source(wanted, cache=cache), **_of_tokenizer(tokenizer), "broken": wanted.broken,
        "max_broken": wanted.max_broken, "name": name, "ends": list(ends), "length": length, "kind": kind,
    }  # fmt: skip
    found = cache.entry(
        asked, make=_unchanged(make, wanted.origin), name=name,
        opened=lambda file: numpy.memmap(file, dtype=kind, mode="r"),
    )  # fmt: skip
    *words_of, report = found.made.words
    return PreparedBlocks(
        blocks=Blocks(found.data, length=length, name=name), sha256=found.made.data_sha256, words=tuple(words_of),
        report=report, place=found.word,
    )  # fmt: skip


def holds_text(wanted: Wanted) -> bool:
    """Whether a corpus is of documents, as its first row is, and not of prompts with responses."""
    return any(isinstance(entry, Document) for entry in _first(wanted.rows()))


def _first(entries: Iterable[Row | Document]) -> Iterator[Row | Document]:
    for entry in entries:
        yield entry
        return


def _prepare(
    wanted: Wanted, tokenizer: PreTrainedTokenizerBase, *, keep: Callable[[Prompt], None], told: _Told | None = None
) -> tuple[str, ...]:
    """Hands every prompt to ``keep``, in order; what there is to be told, the report last."""
    reading, preparing = wanted.rows(), wanted.preparing(tokenizer)
    some: list[Row] = []
    for number, row in enumerate(of_one_kind(reading) if wanted.corpus else reading):  # type: ignore[arg-type]
        if wanted.limit is not None and number >= wanted.limit:
            continue  # the rest is read, too: a broken row there counts as everywhere
        assert isinstance(row, Row), "a corpus of documents is cut into blocks"
        beyond = wanted.responses is not None and number >= wanted.responses
        some.append(dataclasses.replace(row, responses=()) if beyond else row)
        if len(some) == ENCODE_ROWS:
            for prompt in preparing.take(some):
                keep(prompt)
            some.clear()
            if told is not None:
                told.at(reading.records)
    for prompt in preparing.take(some):
        keep(prompt)
    return (*_words(wanted, reading), str(preparing.report()))


def _words(wanted: Wanted, reading: Reading[Any]) -> list[str]:
    """What was skipped and what limits left of the rows."""
    report, name, limit, kept = reading.report(), wanted.name, wanted.limit, wanted.responses
    words, rows = [str(report)] if report.skipped else [], report.used
    if limit is not None and limit < rows:
        words.append(f"{name}: the first {limit:,} of {rows:,} rows (limit set by data.{name}_limit)")
        rows = limit
    if kept is not None and kept < rows:
        words.append(f"{name}: the responses of the first {kept:,} rows (set by data.train_responses)")
    return words


def _cut(
    wanted: Wanted, tokenizer: PreTrainedTokenizerBase, *, ends: Sequence[int],
    keep: Callable[[tuple[int, ...]], object], told: _Told | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """Hands the ids of every document to ``keep``, in order; what there is to be told, the report last."""
    reading = corpus_rows(wanted.origin, broken=wanted.broken, max_broken=wanted.max_broken)
    cutting = Cutting(tokenizer=tokenizer, ends=ends, name=wanted.name)
    documents = (entry for entry in of_one_kind(reading) if isinstance(entry, Document))
    for some in in_batches(documents):
        for ids in cutting.take(some):
            keep(ids)
        if told is not None:
            told.at(reading.records)
    return (*_words(wanted, reading), str(cutting.report()))


class _TableWriter:
    """Writes prompts as the Arrow stream that ``prompt_table`` maps, a record batch at a time."""

    def __init__(self, sink: Sink) -> None:
        import pyarrow  # type: ignore[import-untyped]

        self._some: list[Prompt] = []
        self._stream = pyarrow.ipc.new_stream(_File(sink), schema())

    def __enter__(self) -> _TableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._put()
            self._stream.close()

    def add(self, prompt: Prompt) -> None:
        """One more."""
        self._some.append(prompt)
        if len(self._some) == BATCH_ROWS:
            self._put()

    def _put(self) -> None:
        if self._some:
            self._stream.write_batch(record_batch(self._some))
            self._some.clear()


class _File:
    """A sink as Arrow wants its files."""

    closed = False

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, content: Any) -> int:
        before = self._sink.bytes
        self._sink.write(content)
        return self._sink.bytes - before

    def tell(self) -> int:
        return self._sink.bytes

    def flush(self) -> None:
        """All is written at once."""

    def close(self) -> None:
        """Who made the sink closes its file."""


class _Told:
    """The progress of reading a large source, on the terminal of the one process that reads it."""

    def __init__(self, origin: Source, name: str) -> None:
        self._total = origin.count()
        self._progress = Progress(f"{name}: tokenising", total=self._total, unit=f"{origin.unit}s")

    def at(self, records: int) -> None:
        """So many were read."""
        self._progress.advance(records, {})

    def close(self) -> None:
        """Leaves it as it stands."""
        self._progress.close()


def _hash_of_blocks(file: Path, kind: str, *, length: int, name: str) -> str:
    """``data_hash`` of all blocks of a file of tokens, which is read piece by piece: mapped, all of it would count as
    memory of this process."""
    import numpy

    def blocks() -> Iterator[Block]:
        at, size = 0, int(kind[4:]) // 8
        with file.open("rb") as stream:
            while piece := stream.read(length * size * 1024):
                for block in Blocks(numpy.frombuffer(piece, dtype=kind), length=length, name=name):
                    yield dataclasses.replace(block, uid=f"{name}-{at}")
                    at += 1

    return data_hash(blocks())


def _of_source(wanted: Wanted, *, cache: DataCache) -> dict[str, Any]:
    """What decides the rows: names (which are in their ids) and bytes of all files."""
    files = [(part.stem, file) for part in wanted.origin.parts for file in part.files()]
    return {"source": wanted.origin.name, "files": [[stem, file.name, cache.sha256_of(file)] for stem, file in files]}


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the ids of a text: all that the tokenizer is, and the libraries that run it."""
    if tokenizer.is_fast:
        core = tokenizer.backend_tokenizer
        core.no_truncation()  # as at each call; both are no part of what is read
        core.no_padding()
        whole = core.to_str()
    else:
        whole = json.dumps([type(tokenizer).__name__, tokenizer.init_kwargs], default=str, sort_keys=True)
    return {
        "tokenizer": [identity(tokenizer), hashlib.sha256(whole.encode()).hexdigest()],
        "data_format": DATA_FORMAT, "versions": {name: version(name) for name in _VERSIONS},
    }  # fmt: skip


def _chat(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    """What decides the text of a chat; some templates write the day's date."""
    day = date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else ""
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {"template": tokenizer.chat_template, "tokens": tokens, "day": day}


def _unchanged(make: Callable[[Path, Sink], Made], origin: Source) -> Callable[[Path, Sink], Made]:
    """The same, but ``DataError`` where a file changed while it was read: its sum was taken before."""

    def stands() -> list[tuple[int, ...]]:
        return [(at.st_ino, at.st_size, at.st_mtime_ns) for at in map(Path.stat, origin.files())]

    before = stands()

    def watched(file: Path, sink: Sink) -> Made:
        made = make(file, sink)
        if stands() != before:
            raise DataError(f"{origin.name} changed while it was read\n  start again when it is whole")
        return made

    return watched

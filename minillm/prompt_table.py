"""Prompts in an Arrow file that is mapped into memory: each is made when it is asked for, and millions take as little
memory as a few.

The file is a stream of Arrow record batches, as the ``datasets`` library keeps its own:
``datasets.Dataset.from_file`` opens it. Reading it runs no code out of it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from minillm.types import Prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCH_ROWS = 1024
"""Rows of each record batch but the last, so that a row is found by a division."""
RELEASE_EVERY = 16
"""Record batches between two times that pages are given back while a file is opened."""
_COLUMNS = {
    "uid": "string", "text": "string", "ids": "list<int32>", "responses": "list<string>",
    "response_ids": "list<int32>", "choices": "list<string>", "extra": "string", "prompt_tokens": "int32",
    "response_tokens": "int32",
}  # fmt: skip
"""``extra`` is JSON; the last two are lengths, so that nobody need read the ids for them."""


def schema() -> Any:
    """The Arrow schema of a table of prompts."""
    import pyarrow  # type: ignore[import-untyped]

    kinds = {
        "string": pyarrow.large_string(), "int32": pyarrow.int32(),
        "list<int32>": pyarrow.list_(pyarrow.int32()), "list<string>": pyarrow.list_(pyarrow.large_string()),
    }  # fmt: skip
    return pyarrow.schema([pyarrow.field(name, kinds[kind], nullable=False) for name, kind in _COLUMNS.items()])


def record_batch(prompts: Sequence[Prompt]) -> Any:
    """Prompts as an Arrow record batch."""
    import pyarrow

    columns = {
        "uid": [prompt.uid for prompt in prompts],
        "text": [prompt.text for prompt in prompts],
        "ids": [prompt.ids for prompt in prompts],
        "responses": [prompt.responses for prompt in prompts],
        "response_ids": [prompt.response_ids for prompt in prompts],
        "choices": [prompt.choices for prompt in prompts],
        "extra": [json.dumps(dict(prompt.extra)) for prompt in prompts],
        "prompt_tokens": [len(prompt.ids) for prompt in prompts],
        "response_tokens": [len(prompt.response_ids) for prompt in prompts],
    }
    kinds = schema()
    return pyarrow.record_batch([pyarrow.array(columns[field.name], field.type) for field in kinds], schema=kinds)


class PromptTable(Sequence[Prompt]):
    """The prompts of a mapped file, or some of them in their order."""

    def __init__(
        self, batches: Sequence[Any], *, prompt_tokens: NDArray[Any], response_tokens: NDArray[Any],
        rows: NDArray[Any] | None = None,
    ) -> None:  # fmt: skip
        """``batches`` are Arrow record batches of ``BATCH_ROWS`` rows each but the last; ``rows`` those of their rows
        that are meant, all where it is None, and the lengths are theirs."""
        self._batches, self._rows = batches, rows
        self.prompt_tokens = prompt_tokens
        """How long each prompt is, [rows]."""
        self.response_tokens = response_tokens
        """How many ids each response to learn from has, its closing one included, [rows]; 0 for a row without."""

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @overload
    def __getitem__(self, index: int, /) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice, /) -> list[Prompt]: ...

    def __getitem__(self, index: int | slice, /) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        batch, at = divmod(place if self._rows is None else int(self._rows[place]), BATCH_ROWS)
        return _prompts(self._batches[batch].slice(at, 1))[0]

    def __iter__(self) -> Iterator[Prompt]:
        if self._rows is not None:
            yield from (self[place] for place in range(len(self)))
            return
        for batch in self._batches:
            yield from _prompts(batch)

    def answered(self) -> PromptTable:
        """Those with a response to learn from."""
        import numpy

        if bool(self.response_tokens.all()):
            return self
        places = numpy.flatnonzero(self.response_tokens).astype("int32" if len(self) < 2**31 else "int64")
        return PromptTable(
            self._batches, prompt_tokens=self.prompt_tokens[places], response_tokens=self.response_tokens[places],
            rows=places if self._rows is None else self._rows[places],
        )  # fmt: skip

    def named(self, uids: Set[str]) -> dict[str, Prompt]:
        """Those of these ids, by id."""
        import pyarrow
        import pyarrow.compute  # type: ignore[import-untyped]

        wanted, found = pyarrow.array(sorted(uids), pyarrow.large_string()), dict[str, Prompt]()
        for batch in self._batches:
            some = batch.filter(pyarrow.compute.is_in(batch.column("uid"), value_set=wanted))
            found.update((prompt.uid, prompt) for prompt in _prompts(some))
        return found


def open_table(file: Path) -> PromptTable:
    """The table in a file; ``ValueError`` where it is none, or a part of one. ``OSError`` where it cannot be read."""
    import numpy
    import pyarrow

    batches = list[Any]()
    lengths = {"prompt_tokens": list[Any](), "response_tokens": list[Any]()}
    try:
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        with pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped)) as stream:
            if not stream.schema.equals(schema()):
                raise ValueError("its columns are not those of prompts")
            for batch in stream:
                batch.validate()
                batches.append(batch)
                for name, own in lengths.items():
                    own.append(batch.column(name).to_numpy().copy())
                if len(batches) % RELEASE_EVERY == 0:
                    _release(mapped)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; Arrow's own have no number
        raise ValueError(str(error).partition("\n")[0]) from error
    if not batches or any(batch.num_rows != BATCH_ROWS for batch in batches[:-1]):
        raise ValueError("its rows are not cut as ours are")
    _release(mapped)
    return PromptTable(batches, **{name: numpy.concatenate(own) for name, own in lengths.items()})


def _release(mapped: mmap.mmap) -> None:
    """Gives back the pages that were looked at: they count as memory of this process, and the next look has them from
    the file again."""
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _prompts(batch: Any) -> list[Prompt]:
    # Their offsets and their text, too: of rows that are asked for and not of the file, which would be read whole.
    batch.validate(full=True)
    return [
        Prompt(
            uid=row["uid"],
            text=row["text"],
            ids=tuple(row["ids"]),
            responses=tuple(row["responses"]),
            response_ids=tuple(row["response_ids"]),
            choices=tuple(row["choices"]),
            extra=json.loads(row["extra"]),
        )
        for row in batch.to_pylist()
    ]


def answered(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Those that have a response to learn from."""
    if isinstance(prompts, PromptTable):
        return prompts.answered()
    return [prompt for prompt in prompts if prompt.response_ids]


def lengths_of(prompts: Sequence[Prompt]) -> Sequence[int]:
    """Tokens of each prompt and its response together; no prompt of a table is made for it."""
    if isinstance(prompts, PromptTable):
        lengths: Sequence[int] = prompts.prompt_tokens + prompts.response_tokens
        return lengths
    return [len(prompt.ids) + len(prompt.response_ids) for prompt in prompts]


def named(prompts: Sequence[Prompt], uids: Set[str]) -> dict[str, Prompt]:
    """Those of these ids, by id."""
    if isinstance(prompts, PromptTable):
        return prompts.named(uids)
    return {prompt.uid: prompt for prompt in prompts if prompt.uid in uids}

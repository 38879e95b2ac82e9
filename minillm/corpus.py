"""Running text to learn a language from: documents end to end, each closed with the end-of-text token, in blocks of one
length.

A token in a block is predicted from all before it in that block, those of earlier documents included.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from minillm.data_config import LEAST_BLOCK
from minillm.prompts import ENCODE_ROWS, Fate, Fates, PrepareReport, encode, require_used
from minillm.records import Document
from minillm.rows import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODE_LETTERS = 2**21
"""Characters of documents from which on no more are tokenised together."""


class Tokens(Protocol):
    """An array of token ids."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> Any:
        """Some of them, as an array with ``tolist``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A stretch of the corpus, of which all tokens but the first are learnt."""

    uid: str
    ids: tuple[int, ...]
    """The first token."""
    response_ids: tuple[int, ...]
    """All others."""


class Blocks:
    """All blocks of a corpus in its order. What is kept is two or four bytes a token, in memory or in a mapped file; a
    block is made when it is asked for."""

    def __init__(self, tokens: Tokens, *, length: int, name: str) -> None:
        assert length >= LEAST_BLOCK, f"blocks of {length} tokens"
        self._tokens, self._length, self._name = tokens, length, name

    def __len__(self) -> int:
        whole, rest = divmod(len(self._tokens), self._length)
        return whole + (rest >= LEAST_BLOCK)

    def __getitem__(self, index: int, /) -> Block:
        assert 0 <= index < len(self), f"block {index} of {len(self)}"
        first, *others = self._tokens[index * self._length : (index + 1) * self._length].tolist()
        return Block(uid=f"{self._name}-{index}", ids=(first,), response_ids=tuple(others))

    def __iter__(self) -> Iterator[Block]:
        return (self[index] for index in range(len(self)))

    def __str__(self) -> str:
        rest = len(self._tokens) % self._length
        if len(self) == 1 and rest >= LEAST_BLOCK:
            return f"1 block of {rest:,} tokens"
        last = f", the last of {rest:,}" if rest >= LEAST_BLOCK else ""
        left = "; left out 1 token at the end" if rest == 1 else ""
        return f"{counted(len(self), 'block')} of {self._length:,} tokens{last}{left}"


def blocks_of(
    documents: Sequence[Document], *, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], length: int, name: str
) -> tuple[Blocks, PrepareReport]:
    """The documents in blocks of ``length`` tokens, the last one of what is left over, and the report of what was
    dropped.

    The first of ``ends`` closes each document. One that holds any of them already is dropped, as a response is: what
    stands behind it could never be written. Raises ``DataError`` where nothing is left.
    """
    cutting = Cutting(tokenizer=tokenizer, ends=ends, name=name)
    tokens = array("i")
    for some in in_batches(documents):
        for ids in cutting.take(some):
            tokens.extend(ids)
    report = cutting.report()
    return Blocks(tokens, length=length, name=name), report


class Cutting:
    """Token ids of documents that come some at a time, and what was dropped of all of them."""

    def __init__(self, *, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], name: str) -> None:
        self._tokenizer, self._end, self._forbidden, self._name = tokenizer, ends[0], set(ends), name
        self._documents, self._dropped = 0, Fates()

    def take(self, documents: Sequence[Document]) -> Iterator[tuple[int, ...]]:
        """Of each of the next documents that stays its ids, with the end token."""
        texts, uids = [document.text for document in documents], [document.uid for document in documents]
        for document, ids in zip(documents, encode(texts, self._tokenizer, uids=uids), strict=True):
            self._documents += 1
            if not ids or not document.text.strip():
                self._dropped.add(Fate.BLANK_DOCUMENT, document.uid)
            elif not self._forbidden.isdisjoint(ids):
                self._dropped.add(Fate.ENDED_DOCUMENT, document.uid)
            else:
                yield (*ids, self._end)

    def report(self) -> PrepareReport:
        """What became of them; ``DataError`` where nothing is left."""
        used = self._documents - self._dropped.count
        dropped = self._dropped.groups()
        report = PrepareReport(name=self._name, rows=self._documents, used=used, dropped=dropped, noun="document")
        require_used(report, what="document")
        return report


def in_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """As many together as keep a tokenizer busy, and no more text than fits in memory easily."""
    some, letters = list[Document](), 0
    for document in documents:
        some.append(document)
        letters += len(document.text)
        if len(some) == ENCODE_ROWS or letters >= ENCODE_LETTERS:
            yield some
            some, letters = [], 0
    if some:
        yield some

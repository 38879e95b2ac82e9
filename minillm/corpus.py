"""Running text to learn a language from: documents end to end, each closed with the end-of-text token, in blocks of one
length.

A token in a block is predicted from all before it in that block, those of earlier documents included.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minillm.data_config import LEAST_BLOCK
from minillm.prompts import ENCODE_ROWS, Fate, PrepareReport, encode, groups, require_used
from minillm.records import Document
from minillm.rows import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A stretch of the corpus, of which all tokens but the first are learnt."""

    uid: str
    ids: tuple[int, ...]
    """The first token."""
    response_ids: tuple[int, ...]
    """All others."""


class Blocks:
    """All blocks of a corpus in its order. What is kept is four bytes a token; a block is made when it is asked for."""

    def __init__(self, tokens: array[int], *, length: int, name: str) -> None:
        assert length >= LEAST_BLOCK, f"blocks of {length} tokens"
        self._tokens, self._length, self._name = tokens, length, name

    def __len__(self) -> int:
        whole, rest = divmod(len(self._tokens), self._length)
        return whole + (rest >= LEAST_BLOCK)

    def __getitem__(self, index: int, /) -> Block:
        assert 0 <= index < len(self), f"block {index} of {len(self)}"
        first, *others = self._tokens[index * self._length : (index + 1) * self._length]
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
    tokens, forbidden = array("i"), set(ends)
    dropped: dict[Fate, list[str]] = {}
    for start in range(0, len(documents), ENCODE_ROWS):
        some = documents[start : start + ENCODE_ROWS]
        encoded = encode([document.text for document in some], tokenizer, uids=[document.uid for document in some])
        for document, ids in zip(some, encoded, strict=True):
            if not ids or not document.text.strip():
                dropped.setdefault(Fate.BLANK_DOCUMENT, []).append(document.uid)
            elif not forbidden.isdisjoint(ids):
                dropped.setdefault(Fate.ENDED_DOCUMENT, []).append(document.uid)
            else:
                tokens.extend((*ids, ends[0]))
    used = len(documents) - sum(map(len, dropped.values()))
    report = PrepareReport(name=name, rows=len(documents), used=used, dropped=groups(dropped), noun="document")
    require_used(report, what="document")
    return Blocks(tokens, length=length, name=name), report

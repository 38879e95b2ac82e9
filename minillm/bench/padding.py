"""How many of the places that training computes hold no token, for the lengths of given rows.

Counted, not timed: nothing here depends on the machine. A *place* is one position that a forward computes
(``micro_batches``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from minillm.cards import load_card
from minillm.errors import DataError
from minillm.micro_batches import Limits, cut, places
from minillm.order import GlobalOrder
from minillm.packing import Reads
from minillm.prompts import encode, read_rows
from minillm.records import Row, shown
from minillm.templates import is_blank, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNITS = {"tokens": "tokens", "words": "words between white space", "bytes": "lots of four bytes"}
"""What a length counts; without a tokenizer for the text, words, or bytes in lots of about an English token's size."""
BATCHES = (16, 64, 256)
"""Rows in a batch."""
VARIANTS = ("padded", "padded_cut", "packed")
"""To the longest row of the batch; the same within micro-batches of rows of similar length; as training does it, in
lines within the micro-batches of packed rows."""
SEED = 0
READS = Reads(hidden=256)
"""The model that reads packed rows: narrower ones keep narrower lines, with more left over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """What was counted over many random batches of one size: shares of the places, and micro-batches in a batch."""

    rows: int
    empty: dict[str, float]
    """Share of the places that hold no token, by variant."""
    micro_batches: dict[str, float]
    """How many a batch is cut into, on average, by variant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingFigures:
    """The lengths of one source of rows (prompt, response and the token that ends it), and what they cost."""

    source: str
    rows: int
    left_out: int
    """Rows without a prompt or without a response."""
    mean: float
    longest: int
    batches: list[Batches] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest share of empty places as training does it."""
        return max(one.empty["packed"] for one in self.batches)


def measure_padding(
    source: str, *, unit: str, tokenizer: str, micro_tokens: int, batches: int, sizes: Sequence[int] = BATCHES
) -> PaddingFigures:
    """Counts for ``batches`` random batches of each size over the rows that ``data.train`` would read from here.

    Prompts are those of the template 'plain', the shortest: a longer one makes lengths more alike. ``tokenizer`` is
    'world' or what a card may be, and is read for the unit 'tokens' only.
    """
    rows, _ = read_rows(source)
    whole = [row for row in rows if not is_blank(row) and row.responses and row.responses[0].strip()]
    if not whole:
        raise DataError(f"{source}: none of its rows has a prompt and a response\n  name a file that can be trained on")
    lengths = lengths_of(whole, count=_counter(unit, tokenizer))
    return PaddingFigures(
        source=source,
        rows=len(whole),
        left_out=len(rows) - len(whole),
        mean=sum(lengths) / len(lengths),
        longest=max(lengths),
        batches=[measure_batches(lengths, size=size, micro_tokens=micro_tokens, batches=batches) for size in sizes],
    )


def measure_batches(lengths: Sequence[int], *, size: int, micro_tokens: int, batches: int) -> Batches:
    """Counts for random batches of one size, drawn as a stage draws them: epoch by epoch."""
    order, limits = GlobalOrder(len(lengths), SEED), Limits(places=micro_tokens)
    tokens, forwards = 0, dict.fromkeys(VARIANTS, 0)
    computed = dict.fromkeys(VARIANTS, 0)
    for number in range(batches):
        batch = [lengths[row] for row in order.take(number * size, size)]
        tokens += sum(batch)
        for variant in VARIANTS:
            reads = READS if variant == "packed" else None
            cuts = cut(batch, limits=Limits() if variant == "padded" else limits, reads=reads)
            forwards[variant] += len(cuts)
            computed[variant] += sum(places([batch[row] for row in rows], reads=reads) for rows in cuts)
    return Batches(
        rows=size,
        empty={variant: 1 - tokens / computed[variant] for variant in VARIANTS},
        micro_batches={variant: forwards[variant] / batches for variant in VARIANTS},
    )


Counter = Callable[[Sequence[str], Sequence[str]], list[int]]
"""The lengths of texts, given the names of their rows."""


def lengths_of(rows: Sequence[Row], *, count: Counter) -> list[int]:
    """Of each row: prompt, first response and one token that ends it."""
    uids = [row.uid for row in rows]
    # Of the templates only 'chat' asks the tokenizer.
    texts = [render(row, template="plain", tokenizer=None) for row in rows]  # type: ignore[arg-type]
    responses = count([row.responses[0] for row in rows], uids)
    return [prompt + response + 1 for prompt, response in zip(count(texts, uids), responses, strict=True)]


def _counter(unit: str, tokenizer: str) -> Counter:
    if unit == "words":
        return lambda texts, uids: [len(text.split()) for text in texts]
    if unit == "bytes":
        return lambda texts, uids: [-(-len(text.encode()) // 4) for text in texts]
    assert unit == "tokens", unit
    opened = _open(tokenizer)

    def tokens(texts: Sequence[str], uids: Sequence[str]) -> list[int]:
        try:
            return [len(ids) for ids in encode(texts, opened, uids=uids)]
        except DataError as error:
            raise DataError(
                f"{error}\n  name its model with --tokenizer, or count --unit words or --unit bytes; "
                f"the tokenizer was {shown(tokenizer)}"
            ) from error

    return tokens


def _open(name: str) -> PreTrainedTokenizerBase:
    if name == "world":
        from minillm.world import build_tokenizer

        return build_tokenizer()
    from minillm.loading import inspect

    return inspect(load_card(name, kind="students")).tokenizer

"""How likely a frozen model holds given responses: one log-probability for each, summed over its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from minillm.errors import NonFinite
from minillm.gold import read_gold
from minillm.micro_batches import Limits
from minillm.ranks import Ranks
from minillm.teacher_engine import Teacher
from minillm.types import Ids, PreferencePair

TokenIds = tuple[int, ...]
"""Of a prompt or of a response."""
PairIds = tuple[TokenIds, TokenIds, TokenIds]
"""Of a prompt and of two responses to it."""


class _Row(NamedTuple):
    """A ``types.Example``."""

    uid: str
    ids: TokenIds
    response_ids: TokenIds


def sequence_logps(
    rows: Sequence[tuple[TokenIds, TokenIds]], *, model: Teacher, ids: Ids, ranks: Ranks, limits: Limits
) -> list[float]:
    """log p(response | prompt) of each (prompt ids, response ids) in nats: a sum over the response's ids, the closing
    EOS among them.

    In the rows' order, and the same list on every rank: rows are shared out, those of similar length together, as many
    at a time as ``limits`` let a rank hold, and each is read once. Log-probabilities are over the model's real ids, in
    fp32 (float64 where the model is) and made tile by tile; they are added up in float64. To be called on all ranks.

    Raises ``NonFinite``, on all of them, where the model forbids a token or says no number; it names the row's place.
    """
    read = [_Row(str(place), *row) for place, row in enumerate(rows)]
    assert all(row.ids and row.response_ids for row in read), "a row without prompt or response has no log-probability"
    golds = read_gold(model.reader, read, pad_id=ids.pad, limits=limits, ranks=ranks)
    found = [-gold.nats for gold in golds if gold is not None]
    for place, value in enumerate(found):
        if not math.isfinite(value):
            raise NonFinite(
                f"row {place} of {len(read):,}: its response has a log-probability of {value:g}; look at the model's "
                "dtype (fp16 overflows), and whether it forbids an id of the response"
            )
    return found


def ids_of(pair: PreferencePair) -> PairIds:
    """Those of a pair, the chosen response first."""
    return pair.prompt.ids, pair.chosen_ids, pair.rejected_ids


def pair_logps(
    pairs: Iterable[PairIds], *, model: Teacher, ids: Ids, ranks: Ranks, limits: Limits
) -> list[tuple[float, float]]:
    """The log-probabilities of both responses to each prompt, in their order, as ``sequence_logps`` has them."""
    rows = [(prompt, response) for prompt, *both in pairs for response in both]
    found = sequence_logps(rows, model=model, ids=ids, ranks=ranks, limits=limits)
    return list(zip(found[::2], found[1::2], strict=True))

"""Which rows of a rank go through one forward together: as few micro-batches as keep each within its limits.

A *place* is one position that a forward computes, whether a token lies there or not: lines times their width where rows
are packed (``packing``), rows times the longest row where they are padded. Results do not depend on how rows are cut,
because losses are divided by the counts of the whole step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.packing import lay_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one forward may hold; 0 sets no limit."""

    rows: int = 0
    places: int = 0


def places(lengths: Sequence[int], *, hidden: int) -> int:
    """What one forward over rows of these lengths computes: packed for a model of this hidden width, padded for 0."""
    return lay_out(lengths, hidden=hidden).places if hidden else len(lengths) * max(lengths, default=0)


def cut(lengths: Sequence[int], *, limits: Limits, hidden: int) -> list[list[int]]:
    """Every row, by its index, in one of the micro-batches; one that is empty where there are no rows.

    All are within both limits, but for a row of more than ``limits.places`` tokens, which is a micro-batch of its own.
    ``hidden`` is the model's hidden width where it packs rows, 0 where it pads them. Packed rows are dealt so that long
    and short ones meet, which fill lines better than rows of one length; padded rows stay with those of similar length.
    """
    if not lengths or limits == Limits():
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return _dealt(order, lengths, limits, hidden=hidden) if hidden else _in_runs(order, lengths, limits)


def _in_runs(order: Sequence[int], lengths: Sequence[int], limits: Limits) -> list[list[int]]:
    """Longest first, the next rows for as long as they fit: a micro-batch is as wide as its first."""
    cuts: list[list[int]] = []
    for row in order:
        grown = len(cuts[-1]) + 1 if cuts else 0
        if not grown or 0 < limits.rows < grown or 0 < limits.places < grown * lengths[cuts[-1][0]]:
            cuts.append([])
        cuts[-1].append(row)
    return cuts


def _dealt(order: Sequence[int], lengths: Sequence[int], limits: Limits, *, hidden: int) -> list[list[int]]:
    """As few micro-batches of about equally many tokens as are all within the limits."""
    long = [row for row in order if 0 < limits.places < lengths[row]]
    rest = order[len(long) :]
    alone = [[row] for row in long]
    if not rest:
        return alone
    count = 1
    if limits.rows:
        count = -(-len(rest) // limits.rows)
    if limits.places:
        count = max(count, -(-sum(lengths[row] for row in rest) // limits.places))
    # It ends: with a micro-batch for each row, all fit.
    while True:
        cuts = _shared_out(rest, lengths, count=count, most=limits.rows or len(rest))
        if not limits.places or all(
            places([lengths[row] for row in rows], hidden=hidden) <= limits.places for rows in cuts
        ):
            return alone + cuts
        count += 1


def _shared_out(order: Sequence[int], lengths: Sequence[int], *, count: int, most: int) -> list[list[int]]:
    """Each row, longest first, to the one of ``count`` micro-batches that has the fewest tokens, of those with fewer
    than ``most`` rows."""
    cuts: list[list[int]] = [[] for _ in range(count)]
    open_ones = [(0, number) for number in range(count)]
    for row in order:
        tokens, number = heapq.heappop(open_ones)
        cuts[number].append(row)
        if len(cuts[number]) < most:
            heapq.heappush(open_ones, (tokens + lengths[row], number))
    return cuts

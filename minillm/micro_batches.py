"""Which rows of a rank go through one forward together: as few micro-batches as keep each within its limits.

A *place* is one position that a forward computes, whether a token lies there or not: lines times their width where rows
are packed (``packing``), rows times the longest row where they are padded. Results do not depend on how rows are cut,
because losses are divided by the counts of the whole step.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.packing import Reads, lay_out

TIGHT = 8
"""A limit below this many of the longest rows: dealing then leaves much over, and runs are tried too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one forward may hold; 0 sets no limit."""

    rows: int = 0
    places: int = 0


def places(lengths: Sequence[int], *, reads: Reads | None) -> int:
    """What one forward over rows of these lengths computes: packed as a model reads lines, padded for None."""
    return len(lengths) * max(lengths, default=0) if reads is None else lay_out(lengths, reads=reads).places


def alike(lengths: Sequence[int], *, limits: Limits, ranks: int = 1, more: int = 0) -> list[list[list[int]]]:
    """For each rank its batches of rows, by index, that are only drawn or read: rows of similar length together.

    The longest come first, so that what does not fit in memory shows at once, and each rank has every n-th of them. A
    batch has as many rows as both limits allow, at least one; each counts with the length of the longest and ``more``
    tokens that will be written after it. All ranks have as many batches, since all make the same calls of a sharded
    model: the last ones may be empty.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    found: list[list[list[int]]] = []
    for rank in range(ranks):
        left, cuts = order[rank::ranks], []
        while left:
            fitting = limits.places // max(1, lengths[left[0]] + more) if limits.places else len(left)
            count = max(1, min(fitting, limits.rows or len(left)))
            cuts.append(left[:count])
            left = left[count:]
        found.append(cuts)
    most = max(map(len, found))
    return [[*cuts, *([[]] * (most - len(cuts)))] for cuts in found]


def cut(lengths: Sequence[int], *, limits: Limits, reads: Reads | None) -> list[list[int]]:
    """Every row, by its index, in one of the micro-batches; one that is empty where there are no rows.

    All are within both limits, but for a row of more than ``limits.places`` tokens, which is a micro-batch of its own.
    ``reads`` says how the model reads packed rows; None pads them. Padded rows stay with those of similar length.
    Packed ones are dealt so that long and short ones meet, which fills lines better; where the limit is of a few of the
    longest rows they are also cut in runs, and the fewer micro-batches are taken.
    """
    if not lengths or limits == Limits():
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    if reads is None:
        return _in_runs(order, lengths, limits, reads=None)
    dealt = _dealt(order, lengths, limits, reads=reads)
    if not 0 < limits.places < TIGHT * lengths[order[0]]:
        return dealt

    def cost(cuts: list[list[int]]) -> tuple[int, int]:
        return len(cuts), sum(places([lengths[row] for row in rows], reads=reads) for rows in cuts)

    return min(dealt, _in_runs(order, lengths, limits, reads=reads), key=cost)


def cut_pairs(lengths: Sequence[tuple[int, int]], *, limits: Limits, reads: Reads | None) -> list[list[int]]:
    """Every pair of rows, by its index, in one of the micro-batches; one that is empty where there are no pairs.

    ``limits.rows`` counts pairs. All are within both limits, but for a pair of more than ``limits.places``, which is a
    micro-batch of its own. Those with the longest rows come first.
    """
    order = sorted(range(len(lengths)), key=lambda pair: (-max(lengths[pair]), pair))
    cuts: list[list[int]] = []
    for pair in order:
        grown = [*cuts[-1], pair] if cuts else []
        full = 0 < limits.rows < len(grown)
        if not full and grown and limits.places:
            rows = [length for one in grown for length in lengths[one]]
            full = places(rows, reads=reads) > limits.places
        if full or not grown:
            cuts.append([])
        cuts[-1].append(pair)
    return cuts or [[]]


def _in_runs(order: Sequence[int], lengths: Sequence[int], limits: Limits, *, reads: Reads | None) -> list[list[int]]:
    """Longest first, the next rows for as long as they fit."""
    cuts: list[list[int]] = []
    for row in order:
        grown = [*cuts[-1], row] if cuts else []
        full = 0 < limits.rows < len(grown)
        if not full and grown and limits.places:
            full = places([lengths[one] for one in grown], reads=reads) > limits.places
        if full or not grown:
            cuts.append([])
        cuts[-1].append(row)
    return cuts


def _dealt(order: Sequence[int], lengths: Sequence[int], limits: Limits, *, reads: Reads) -> list[list[int]]:
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
            places([lengths[row] for row in rows], reads=reads) <= limits.places for rows in cuts
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

"""Micro-batches hold every row once and keep within their limits, and packed ones leave few places over."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from minillm import micro_batches
from minillm.micro_batches import Limits, alike, cut, cut_pairs, places
from minillm.packing import Reads, pack

WORLD = [12, 14, 18, 20, 22, 24, 26, 48, 50]
"""Lengths spread as the embedded world's."""
READS = Reads(hidden=170)
"""The model that packs them."""


def computed(lengths: Sequence[int], *, packed: bool) -> int:
    """Places of a forward, counted on the tensors that it reads."""
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pack(mask_BL.long(), mask_BL, reads=READS).ids_RW.numel() if packed else mask_BL.numel()


def cases() -> Iterator[tuple[list[int], Limits]]:
    """Rows and limits of all sizes, from one row a micro-batch to all at once."""
    source = random.Random(0)
    for _ in range(150):
        longest = source.choice([1, 5, 60])
        lengths = [source.randint(1, longest) for _ in range(source.randint(1, 40))]
        yield lengths, Limits(rows=source.choice([0, 1, 3, 16]), places=source.choice([0, 1, 30, 70, 200, 1000]))


def broken(lengths: Sequence[int], limits: Limits, cuts: Sequence[Sequence[int]], *, packed: bool) -> list[str]:
    """What is wrong with these cuts; [] where nothing is."""
    found = []
    if sorted(row for rows in cuts for row in rows) != list(range(len(lengths))):
        found.append("rows")
    for rows in cuts:
        if limits.rows and len(rows) > limits.rows:
            found.append("too many rows")
        sizes = [lengths[row] for row in rows]
        if limits.places and computed(sizes, packed=packed) > limits.places and len(rows) > 1:
            found.append("too many places")
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_every_row_is_in_one_micro_batch_and_all_are_within_the_limits(packed: bool) -> None:
    for lengths, limits in cases():
        assert (
            broken(lengths, limits, cut(lengths, limits=limits, reads=READS if packed else None), packed=packed) == []
        )


def test_what_counts_as_places_is_what_a_forward_reads() -> None:
    for lengths, _ in cases():
        for packed in (False, True):
            assert places(lengths, reads=READS if packed else None) == computed(lengths, packed=packed)


@pytest.mark.parametrize("packed", [False, True])
def test_a_limit_that_is_not_looked_at_would_be_seen(packed: bool) -> None:
    """Negative control: cut by one limit, the other is broken; cut for padding, so is that of packing no more."""
    for ignored in ("rows", "places"):
        kept = [limits for _, limits in cases() if limits.rows and limits.places]
        wrong = 0
        for lengths, limits in cases():
            if limits in kept:
                less = Limits(rows=limits.rows) if ignored == "places" else Limits(places=limits.places)
                wrong += bool(
                    broken(lengths, limits, cut(lengths, limits=less, reads=READS if packed else None), packed=packed)
                )
        assert wrong > 5, ignored


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_beyond_the_limit_goes_alone(packed: bool) -> None:
    cuts = cut([3, 90, 4, 80, 5], limits=Limits(places=20), reads=READS if packed else None)
    assert [1] in cuts and [3] in cuts and sorted(map(sorted, cuts))[0] == [0, 2, 4]


@pytest.mark.parametrize("packed", [False, True])
def test_without_limits_all_rows_go_at_once_in_their_order(packed: bool) -> None:
    assert cut([3, 9, 4], limits=Limits(), reads=READS if packed else None) == [[0, 1, 2]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("limits", [Limits(), Limits(rows=2), Limits(places=7)])
def test_no_row_at_all_is_one_empty_micro_batch(limits: Limits, packed: bool) -> None:
    assert cut([], limits=limits, reads=READS if packed else None) == [[]]


def test_padded_rows_stay_with_those_of_similar_length() -> None:
    assert cut([2, 9, 3, 8, 1], limits=Limits(rows=2), reads=None) == [[1, 3], [2, 0], [4]]
    assert cut([2, 9, 3, 8, 1], limits=Limits(places=18), reads=None) == [[1, 3], [2, 0, 4]]


def test_there_are_few_micro_batches() -> None:
    """Packed: hardly more than would hold the tokens without any padding."""
    source = random.Random(1)
    for rows in (16, 64, 256):
        lengths = [source.choice(WORLD) for _ in range(rows)]
        for limit in (400, 2000):
            cuts = cut(lengths, limits=Limits(places=limit), reads=READS)
            assert len(cuts) <= -(-1.12 * sum(lengths) // limit)
        assert len(cut(lengths, limits=Limits(rows=8), reads=READS)) == rows // 8


def left_over(cuts: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Share of the places that hold no token."""
    used = sum(places([lengths[row] for row in rows], reads=READS) for rows in cuts)
    return 1 - sum(lengths) / used


def test_long_and_short_rows_together_leave_few_places_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: rows of one length fill lines badly, so runs sorted by length leave more."""
    source = random.Random(2)
    lengths = [source.choice(WORLD) for _ in range(128)]
    limits = Limits(places=1000)
    assert left_over(cut(lengths, limits=limits, reads=READS), lengths) < 0.05
    in_runs = micro_batches._in_runs
    monkeypatch.setattr(
        micro_batches, "_dealt", lambda order, lengths, limits, **_: in_runs(order, lengths, limits, reads=None)
    )
    assert left_over(cut(lengths, limits=limits, reads=READS), lengths) > 0.05


def test_long_rows_under_a_tight_limit_take_few_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: dealt alone, one that does not fit makes all be dealt again, and far more are needed."""
    source = random.Random(3)
    lengths = [source.randint(20, 1500) for _ in range(256)]
    limits, reads = Limits(places=4096), Reads(hidden=1024)
    few = cut(lengths, limits=limits, reads=reads)
    assert len(few) <= 1.2 * sum(lengths) / 4096
    assert sorted(row for rows in few for row in rows) == list(range(256))
    assert all(places([lengths[row] for row in rows], reads=reads) <= 4096 for rows in few)
    monkeypatch.setattr(micro_batches, "TIGHT", 0)
    assert len(cut(lengths, limits=limits, reads=reads)) > len(few)


def loose(lengths: Sequence[int], limits: Limits, cuts: Sequence[Sequence[int]], *, more: int) -> list[str]:
    """What is wrong with the batches of one rank, counted row by row; [] where nothing is."""
    found = []
    held = [[lengths[row] + more for row in rows] for rows in cuts if rows]
    for rows, after in zip(held, [*held[1:], []][: len(held)], strict=True):
        size = len(rows) * max(rows)
        if len(rows) > 1 and ((limits.rows and len(rows) > limits.rows) or (limits.places and size > limits.places)):
            found.append("too much")
        grown = len(rows) + 1
        full = (limits.rows and grown > limits.rows) or (limits.places and grown * max(rows) > limits.places)
        if after and not full:
            found.append("too little")
        if min(rows) < max(after, default=0):
            found.append("order")
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_of_similar_length_fill_batches_within_their_limits(ranks: int) -> None:
    for number, (lengths, limits) in enumerate(cases()):
        more = number % 3 * 20
        shares = alike(lengths, limits=limits, ranks=ranks, more=more)
        assert len({len(cuts) for cuts in shares}) == 1, "every rank makes the same calls"
        assert sorted(row for cuts in shares for rows in cuts for row in rows) == list(range(len(lengths)))
        assert all(loose(lengths, limits, cuts, more=more) == [] for cuts in shares)
        sizes = [sum(len(rows) for rows in cuts) for cuts in shares]
        assert max(sizes) - min(sizes) <= 1


def test_what_is_to_be_written_counts_too() -> None:
    """The example: at most 60 tokens are three prompts of 5 with 15 more each, and 12 that are only read."""
    limits, lengths = Limits(rows=256, places=60), [5] * 12
    assert [len(rows) for rows in alike(lengths, limits=limits, more=15)[0]] == [3] * 4
    assert [len(rows) for rows in alike(lengths, limits=limits)[0]] == [12]
    assert alike([99, 1], limits=limits, more=15) == [[[0], [1]]], "a row beyond the limit is alone"
    assert alike([], limits=limits, ranks=2) == [[], []]


def test_control_batches_that_forget_what_is_to_be_written_are_found() -> None:
    lengths, limits = [5] * 12, Limits(places=60)
    assert "too much" in loose(lengths, limits, alike(lengths, limits=limits)[0], more=15)
    assert "too little" in loose(lengths, limits, [[row] for row in range(12)], more=15)
    assert "order" in loose([1, 2, 3], Limits(rows=1), [[0], [1], [2]], more=15)


@pytest.mark.parametrize("packed", [False, True])
def test_every_pair_is_whole_in_one_micro_batch_and_all_are_within_the_limits(packed: bool) -> None:
    reads, wrong = READS if packed else None, 0
    for lengths, limits in cases():
        both = [*zip(lengths, lengths[::-1], strict=True)]
        for asked in (limits, Limits()):  # the second is the control
            cuts = cut_pairs(both, limits=asked, reads=reads)
            assert sorted(pair for pairs in cuts for pair in pairs) == [*range(len(both))]
            rows = [[length for pair in pairs for length in both[pair]] for pairs in cuts]
            over = [
                (limits.rows and len(sizes) > 2 * limits.rows)
                or (limits.places and len(sizes) > 2 and computed(sizes, packed=packed) > limits.places)
                for sizes in rows
            ]
            assert asked == Limits() or not any(over)
            wrong += any(over)
    assert wrong > 50
    assert cut_pairs([], limits=Limits(), reads=reads) == [[]]

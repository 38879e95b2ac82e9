"""The order of rows. Promises:

1. every row is drawn once per epoch, and what a step draws is a pure function of seed and position;
2. for every number of ranks the shares are the step, no row twice and none lost, sizes within one;
3. windows give batches of nearly equal lengths, and with them less padding;
4. nothing depends on Python's hash seed;
5. a million rows have an order in a few bytes each, and it is the order that Python's own numbers give.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest

from minillm.order import GlobalOrder, WindowedOrder, occurrences, permutation, share

WORLDS = range(1, 9)
SHAPES = [(1, 1, 1), (1, 3, 2), (5, 2, 1), (7, 3, 2), (12, 4, 3), (3, 8, 2), (50, 8, 4), (64, 8, 4), (97, 10, 100)]


def lengths_of(count: int) -> list[int]:
    source = random.Random(0)
    return [source.randint(1, 200) for _ in range(count)]


def padding(batches: list[list[int]], lengths: list[int]) -> float:
    """Share of positions that are padding."""
    room = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / room


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_every_row_comes_once_per_epoch(count: int) -> None:
    order = GlobalOrder(count, 3)
    for epoch in range(4):
        assert sorted(order.take(epoch * count, count)) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [permutation(100, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert permutation(100, seed=1, epoch=11) != permutation(100, seed=11, epoch=1)


def test_a_draw_does_not_depend_on_the_draws_before_it() -> None:
    whole = GlobalOrder(10, 5).take(0, 100)
    asked = list(range(100))
    random.Random(1).shuffle(asked)
    order = GlobalOrder(10, 5)
    assert {draw: order.row(draw) for draw in asked} == dict(enumerate(whole))


def test_steps_laid_end_to_end_are_the_run() -> None:
    order = GlobalOrder(10, 5)
    assert [row for step in range(9) for row in order.take(step * 7, 7)] == GlobalOrder(10, 5).take(0, 63)


def test_every_order_of_three_rows_is_about_equally_likely() -> None:
    counts = Counter(tuple(permutation(3, seed=seed, epoch=0)) for seed in range(6000))
    assert len(counts) == 6 and all(850 < count < 1150 for count in counts.values())  # 1000 ± 5 deviations


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("count", [1, 7, 8, 24, 25])
def test_shares_side_by_side_are_the_step_in_order(ranks: int, count: int) -> None:
    rows, lengths = GlobalOrder(40, 2).take(0, count), lengths_of(40)
    shares = [share(rows, lengths=lengths, rank=rank, ranks=ranks, window=1) for rank in range(ranks)]
    assert [shares[place % ranks][place // ranks] for place in range(count)] == rows
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("window", [0, 1, 5, 8])
def test_shares_hold_every_row_of_the_step_once(ranks: int, window: int) -> None:
    rows, lengths = GlobalOrder(40, 2).take(0, 25), lengths_of(40)
    shares = [share(rows, lengths=lengths, rank=rank, ranks=ranks, window=window) for rank in range(ranks)]
    assert sorted(row for part in shares for row in part) == sorted(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_share_that_forgets_its_rank_would_be_seen() -> None:
    """Negative control: the same check fails for ranks that all read rank 0's rows."""
    rows = GlobalOrder(40, 2).take(0, 24)
    shares = [share(rows, lengths=lengths_of(40), rank=0, ranks=3) for _ in range(3)]
    assert sorted(row for part in shares for row in part) != sorted(rows)


def test_ranks_meet_similar_lengths_at_the_same_time() -> None:
    rows, lengths = list(range(64)), lengths_of(64)
    shares = [share(rows, lengths=lengths, rank=rank, ranks=4) for rank in range(4)]
    ordered = sorted(lengths)
    for place, together in enumerate(zip(*shares, strict=True)):
        assert sorted(lengths[row] for row in together) == ordered[4 * place : 4 * place + 4]


@pytest.mark.parametrize(("count", "batch", "window"), SHAPES)
def test_windowed_batches_are_full_and_draw_every_row_once_per_epoch(count: int, batch: int, window: int) -> None:
    order = WindowedOrder(lengths_of(count), batch, window, seed=4)
    batches = [order.batch(step) for step in range(3 * count)]
    assert {len(one) for one in batches} == {batch}
    drawn = [row for one in batches for row in one]
    for epoch in range(len(drawn) // count):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


@pytest.mark.parametrize(("count", "batch", "window"), SHAPES)
def test_a_windowed_batch_does_not_depend_on_the_steps_before_it(count: int, batch: int, window: int) -> None:
    lengths = lengths_of(count)
    order = WindowedOrder(lengths, batch, window, seed=4)
    steps = list(range(20))
    whole = [order.batch(step) for step in steps]
    assert [WindowedOrder(lengths, batch, window, seed=4).batch(step) for step in reversed(steps)] == whole[::-1]


def test_a_window_of_one_is_the_global_order() -> None:
    order = WindowedOrder(lengths_of(10), 4, 1, seed=6)
    assert [row for step in range(9) for row in order.batch(step)] == GlobalOrder(10, 6).take(0, 36)


def test_windows_make_lengths_nearly_equal_and_save_padding() -> None:
    lengths = lengths_of(1000)
    steps = range(3 * 1000 // 8)  # over three epochs; 1000 is 125 batches of 8
    windowed, plain = WindowedOrder(lengths, 8, 16, seed=0), WindowedOrder(lengths, 8, 1, seed=0)
    sorted_share = padding([windowed.batch(step) for step in steps], lengths)
    random_share = padding([plain.batch(step) for step in steps], lengths)
    assert random_share > 0.40  # lengths 1 .. 200 at random: the longest of 8 is about 8/9 of 200
    assert sorted_share < 0.06
    spread = [max(lengths[row] for row in one) - min(lengths[row] for row in one) for one in map(windowed.batch, steps)]
    assert sum(spread) / len(spread) < 200 / 16 + 3


def test_windows_stay_aligned_when_epochs_do_not_divide_into_batches() -> None:
    lengths = lengths_of(1001)
    windowed = WindowedOrder(lengths, 8, 16, seed=0)
    assert padding([windowed.batch(step) for step in range(5 * 1001 // 8)], lengths) < 0.07


def test_batches_of_a_window_do_not_run_from_short_to_long() -> None:
    lengths = lengths_of(800)
    order = WindowedOrder(lengths, 8, 100, seed=0)
    means = [sum(lengths[row] for row in order.batch(step)) for step in range(100)]
    rising = sum(one < other for one, other in itertools.pairwise(means))
    assert 30 < rising < 70


def test_twins_in_a_step_are_told_apart() -> None:
    assert occurrences([3, 1, 3, 2, 3, 1]) == [0, 0, 1, 0, 2, 1]
    rows = GlobalOrder(3, 0).take(0, 8)
    assert len(set(zip(rows, occurrences(rows), strict=True))) == 8
    assert len(set(rows)) < 8  # the control: without the count there are twins


def test_the_order_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "import json; from minillm.order import GlobalOrder, WindowedOrder;"
        "print(json.dumps([GlobalOrder(9, 1).take(0, 20), WindowedOrder(range(9), 2, 2, 1).batch(3), hash('a')]))"
    )
    got = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        got.append(json.loads(done.stdout))
    assert got[0][:2] == got[1][:2] == [GlobalOrder(9, 1).take(0, 20), WindowedOrder(range(9), 2, 2, 1).batch(3)]
    assert got[0][2] != got[1][2]  # the control: hash() itself does differ


def test_the_order_is_the_one_of_earlier_releases() -> None:
    """Golden: a run that was begun with another version resumes with the same rows."""
    assert permutation(8, seed=7, epoch=0) == [7, 2, 0, 4, 6, 3, 5, 1]


def by_python(count: int, *, seed: int, epoch: int, purpose: str) -> list[int]:
    """The order as it is defined: rows by the numbers of Python's generator."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{epoch}".encode(), digest_size=16).digest()
    source = random.Random(int.from_bytes(digest, "big"))
    key = [source.random() for _ in range(count)]
    return sorted(range(count), key=key.__getitem__)


@pytest.mark.parametrize("count", [1, 2, 17, 1000, 12_345])
def test_the_order_is_that_of_pythons_own_numbers(count: int) -> None:
    for seed, epoch in ((0, 0), (5, 3)):
        wanted = by_python(count, seed=seed, epoch=epoch, purpose="rows")
        assert permutation(count, seed=seed, epoch=epoch) == wanted
        assert GlobalOrder(count, seed).take(epoch * count, count) == wanted
        assert WindowedOrder([1] * count, batch=1, window=1, seed=seed).batch(epoch * count) == wanted[:1]
    assert count < 17 or permutation(count, seed=0, epoch=0) != by_python(count, seed=0, epoch=0, purpose="other")


def test_rows_sorted_by_length_in_windows_are_those_of_a_plain_sort() -> None:
    for count, batch, window in ((10, 3, 2), (7, 9, 3), (100, 8, 4), (101, 8, 5), (3, 8, 2), (8, 8, 4)):
        lengths = lengths_of(count)
        order = WindowedOrder(lengths, batch=batch, window=window, seed=3)
        drawn = list(itertools.chain.from_iterable(order.batch(step) for step in range(4 * count // batch + 1)))
        for epoch in range(3):
            rows = by_python(count, seed=3, epoch=epoch, purpose="rows")
            head = min(count, -epoch * count % batch)
            whole = (count - head) // batch
            batches: list[list[int]] = []
            for first in range(0, whole, window):
                begin, size = head + first * batch, min(window, whole - first) * batch
                some = sorted(rows[begin : begin + size], key=lengths.__getitem__)
                batches += [some[at : at + batch] for at in range(0, size, batch)]
            places = by_python(whole, seed=3, epoch=epoch, purpose="rows/batches")
            wanted = rows[:head] + [row for place in places for row in batches[place]] + rows[head + whole * batch :]
            assert drawn[epoch * count : (epoch + 1) * count] == wanted


def test_an_order_of_many_rows_is_kept_in_a_few_bytes_each() -> None:
    count = 200_000
    order = GlobalOrder(count, 1)
    order.row(0)  # numpy is imported by now
    tracemalloc.start()
    try:
        order.row(count)
        (kept, most), _ = tracemalloc.get_traced_memory(), tracemalloc.reset_peak()
        listed = permutation(count, seed=1, epoch=1)
        as_list, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 8 * count and most < 32 * count
    assert as_list - kept > 30 * count and len(listed) == count  # the test of the test: numbers of Python's own

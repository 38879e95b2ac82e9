"""Which rows a step reads: pure functions of seed and position, so a restart needs one number.

Nothing here depends on how many ranks there are. A *draw* is one row of the endless stream of
epochs; every row comes once per epoch. Rows are indices into the list of prompts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[Any]


def permutation(count: int, *, seed: int, epoch: int, purpose: str = "rows") -> list[int]:
    """0 .. count-1 in an order that is a pure function of the arguments, the same in every process."""
    return [int(row) for row in _permuted(count, seed=seed, epoch=epoch, purpose=purpose)]


def _permuted(count: int, *, seed: int, epoch: int, purpose: str) -> Rows:
    """The same as an array: a few bytes a row, where a list of Python's numbers takes forty."""
    import numpy

    # hashlib, not hash(): strings hash differently in every interpreter.
    digest = hashlib.blake2b(f"{purpose}/{seed}/{epoch}".encode(), digest_size=16).digest()
    # Sorting by random() rather than shuffle(): of the two, Python promises only random() never to change. Numpy draws
    # the same numbers from the same state of the same generator.
    _, (*words, place), _ = random.Random(int.from_bytes(digest, "big")).getstate()
    source = numpy.random.RandomState()
    source.set_state(("MT19937", numpy.array(words, dtype=numpy.uint32), place, 0, 0.0))
    return numpy.argsort(source.random_sample(count), kind="stable").astype(_kind(count))


def _kind(count: int) -> str:
    return "int32" if count < 2**31 else "int64"


def parts(count: int, pieces: int, *, seed: int, epoch: int, purpose: str) -> list[list[int]]:
    """0 .. count-1 in ``pieces`` lots as equal as can be, dealt from the permutation of these names; all in one lot
    stay in their order."""
    if pieces == 1:
        return [list(range(count))]
    dealt = permutation(count, seed=seed, epoch=epoch, purpose=purpose)
    return [dealt[piece::pieces] for piece in range(pieces)]


@dataclass(frozen=True, slots=True)
class GlobalOrder:
    """The order in which a whole run draws its ``n`` rows."""

    n: int
    seed: int
    purpose: str = "rows"
    """Tells apart the orders of one run: a stage's name, and what its rows are for."""
    _epochs: dict[int, Rows] = field(default_factory=dict, repr=False, compare=False)
    """The last permutations made; a cache, never state."""

    def __post_init__(self) -> None:
        assert self.n > 0, "an order needs at least one row"

    def row(self, draw: int) -> int:
        """The row of the draw-th draw of the run, counted from 0."""
        epoch, place = divmod(draw, self.n)
        if epoch not in self._epochs:
            made = _permuted(self.n, seed=self.seed, epoch=epoch, purpose=self.purpose)
            _remember(self._epochs, epoch, made)
        return int(self._epochs[epoch][place])

    def take(self, start: int, count: int) -> list[int]:
        """Rows of draws ``start`` .. ``start + count - 1``.

        A row can stand there twice where the draws cross into a new epoch; ``occurrences`` tells such twins apart.
        """
        return [self.row(draw) for draw in range(start, start + count)]


class WindowedOrder:
    """Batches of nearly equal lengths, so that little is padded, from an order that is still random.

    Within an epoch, runs of ``window`` batches of the random order are sorted by length and cut into batches, and the
    batches are shuffled. Every batch has ``batch`` rows: where rows are left over at the end of an epoch, one
    batch takes them and fills up from the next epoch. ``window=1`` leaves the random order as it is.
    """

    def __init__(self, lengths: Sequence[int], batch: int, window: int, seed: int, *, purpose: str = "rows") -> None:
        assert len(lengths) > 0, "an order needs at least one row"
        assert batch > 0 and window > 0, "a batch and a window hold at least one row and one batch"
        self._count = len(lengths)
        # Needed by no order of one batch a window.
        self._lengths: Rows | None = None
        if window > 1:
            import numpy

            self._lengths = numpy.array(lengths, dtype="int32")
        self._batch = batch
        self._window = window
        self._seed = seed
        self._purpose = purpose
        self._epochs: dict[int, Rows] = {}

    def batch(self, step: int) -> list[int]:
        """Rows of one step, counted from 0: a pure function of (lengths, batch, window, seed, step)."""
        start, count = step * self._batch, self._count
        return [int(self._epoch(draw // count)[draw % count]) for draw in range(start, start + self._batch)]

    def _epoch(self, epoch: int) -> Rows:
        if epoch not in self._epochs:
            _remember(self._epochs, epoch, self._arranged(epoch))
        return self._epochs[epoch]

    def _arranged(self, epoch: int) -> Rows:
        count, batch = self._count, self._batch
        rows = _permuted(count, seed=self._seed, epoch=epoch, purpose=self._purpose)
        if self._lengths is None:
            return rows
        # The first rows fill the last epoch's open batch; only after them does a batch of this epoch begin.
        head = min(count, -epoch * count % batch)
        whole = (count - head) // batch
        middle = rows[head : head + whole * batch].copy()
        for begin in range(0, len(middle), self._window * batch):
            window = middle[begin : begin + self._window * batch]
            window[:] = window[self._lengths[window].argsort(kind="stable")]
        order = _permuted(whole, seed=self._seed, epoch=epoch, purpose=f"{self._purpose}/batches")
        rows[head : head + whole * batch] = middle.reshape(whole, batch)[order].reshape(-1)
        return rows


def share(rows: Sequence[int], *, lengths: Sequence[int], rank: int, ranks: int, window: int = 0) -> list[int]:
    """The rows of one step that ``rank`` of ``ranks`` reads; shares differ by at most one row.

    The step's rows are sorted by length within runs of ``window`` rows (0: one run of all, 1: the order stays), and
    rank r takes every ``ranks``-th from the r-th on, so that all ranks meet similar lengths at the same time. Laid side
    by side again, the shares are the whole step. With fewer rows than ranks some shares are empty. ``lengths`` is
    indexed by row.
    """
    assert 0 <= rank < ranks, f"rank {rank} is not one of {ranks}"
    size = window or max(len(rows), 1)
    runs = (sorted(rows[at : at + size], key=lengths.__getitem__) for at in range(0, len(rows), size))
    return [row for run in runs for row in run][rank::ranks]


def occurrences(rows: Sequence[int]) -> list[int]:
    """How often each row stood earlier in ``rows``: 0 everywhere unless the step crosses into a new epoch.

    Keyed random numbers know a row by its name, so twins in one rollout need different sample indices.
    """
    seen: dict[int, int] = {}
    earlier = []
    for row in rows:
        earlier.append(seen.get(row, 0))
        seen[row] = earlier[-1] + 1
    return earlier


def _remember(epochs: dict[int, Rows], epoch: int, made: Rows) -> None:
    # Two epochs are enough: a step crosses from one to the next. More only where a batch spans several.
    for old in [key for key in epochs if abs(key - epoch) > 1]:
        del epochs[old]
    epochs[epoch] = made

"""Times in turns, A B A B …, so that what changes on the machine meanwhile meets both; ratios of neighbours."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """The middle of some measurements, and the two ends."""

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """Median, least and greatest of at least one value."""
    assert len(values) > 0, "nothing was measured"
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def in_turns(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds by the clock of each variant, ``repeats`` times in turns, after one unmeasured turn of each."""
    assert repeats > 0 and variants, "nothing to measure"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, run in variants.items():
            _finish(device)
            began = clock()
            run()
            _finish(device)
            if turn:
                seconds[name].append(clock() - began)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """``above`` over ``below``, turn by turn."""
    return spread_of([one / other for one, other in zip(above, below, strict=True)])


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch on this many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

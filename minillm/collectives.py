"""What collectives cost this rank: calls, bytes and seconds by kind, DeepSpeed's and our own.

A second is one that this rank spent in a collective, waiting for other ranks included. On a CPU that is the clock of
the process; on a GPU, where a call only queues the work, the time for which the stream that made the call was held up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = {
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "inference_all_reduce": "all_reduce",
    "reduce": "reduce",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_coalesced": "all_gather",
    "broadcast": "broadcast",
    "barrier": "barrier",
}
"""The calls of DeepSpeed's backend that are counted, and what they are counted as."""


HELD = 4096
"""Stretches of a stream that are kept to be measured together, at most."""


@dataclass(slots=True)
class Spent:
    """What one kind of collective has cost."""

    calls: int = 0
    bytes: int = 0
    """Of the whole result on this rank: what an all-gather fills, what an all-reduce leaves, what goes into a
    reduce-scatter."""
    seconds: float = 0.0


class _Ledger:
    """What was spent since the process began."""

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = {}
        self.deep = 0
        """How many counted calls stand around the present one: a call that makes another is counted once."""
        self.held: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        """Stretches of a stream whose length is not known yet."""

    def of(self, kind: str) -> Spent:
        return self.spent.setdefault(kind, Spent())


_ledger = _Ledger()


def spent() -> dict[str, Spent]:
    """What this rank has spent so far, by kind of collective. Waits for the GPU, if there is one."""
    if _ledger.held:
        torch.cuda.synchronize()
        for kind, start, end in _ledger.held:
            _ledger.of(kind).seconds += start.elapsed_time(end) / 1000.0
        _ledger.held.clear()
    return {kind: Spent(one.calls, one.bytes, one.seconds) for kind, one in _ledger.spent.items()}


def seconds() -> float:
    """Seconds of all of them."""
    return sum(one.seconds for one in spent().values())


@contextmanager
def counted(kind: str, result: Tensor | Sequence[Tensor] = ()) -> Iterator[None]:
    """Counts what the block does as one collective with this result."""
    if _ledger.deep:
        yield
        return
    one = _ledger.of(kind)
    one.calls += 1
    one.bytes += _size(result)
    _ledger.deep += 1
    try:
        with _timed(kind):
            yield
    finally:
        _ledger.deep -= 1


@contextmanager
def _timed(kind: str) -> Iterator[None]:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        try:
            yield
        finally:
            end.record()
            _ledger.held.append((kind, start, end))
            if len(_ledger.held) >= HELD:  # an evaluation of hours asks for no figures
                spent()
        return
    begun = time.perf_counter()
    try:
        yield
    finally:
        _ledger.of(kind).seconds += time.perf_counter() - begun


def _size(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.numel() * result.element_size()
    return sum(_size(part) for part in result) if isinstance(result, Sequence) else 0


class _Work:
    """A collective that was begun: it is counted, and its time is that of waiting for it."""

    def __init__(self, work: Any, kind: str) -> None:
        self._work, self._kind = work, kind

    def wait(self, *arguments: Any, **named: Any) -> Any:
        with _timed(self._kind):
            return self._work.wait(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def watch() -> None:
    """Counts the collectives of DeepSpeed from now on; to be called once it has begun to communicate. Again does
    nothing."""
    from deepspeed.comm import comm

    backend = comm.cdb
    if backend is None or getattr(backend, "_counted", False):
        return
    for name, kind in KINDS.items():
        if callable(call := getattr(backend, name, None)):
            setattr(backend, name, _counting(call, kind))
    backend._counted = True


def _counting(call: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The same call, counted. Of what goes in and comes out the larger is the whole."""

    def counting(*arguments: Any, **named: Any) -> Any:
        whole = max((*arguments, *named.values()), key=_size)
        with counted(kind, whole):
            work = call(*arguments, **named)
        return _Work(work, kind) if hasattr(work, "wait") else work  # one that was waited for gives nothing

    return counting

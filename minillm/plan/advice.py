"""Whether a plan fits, the largest batch that would, and the cheapest change that makes it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from minillm.errors import ConfigError
from minillm.plan.memory import memory_of
from minillm.plan.sizes import Work

RESERVE = 0.06
"""Share of a GPU's memory that is left to the driver, libraries and what the allocator cannot use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What follows from a plan and the memory of a GPU and of a node."""

    fits: bool
    usable: int
    """Bytes of a GPU that may be planned with."""
    largest_rows: int
    """Responses of a rollout that fit, all GPUs together, the other settings as they are; 0: not even one for each."""
    change: tuple[str, ...] = ()
    """The cheapest changes, together, with which it fits; none where it fits already or nothing was found."""
    changed: Work | None = None


def advise(work: Work, *, gpu_bytes: int, host_bytes: int | None = None) -> Advice:
    """Candidates are tried in order of what they cost in time, first one after the other, then added up."""
    usable = int(gpu_bytes * (1 - RESERVE))

    def fits(one: Work) -> bool:
        memory = memory_of(one)
        return memory.peak <= usable and (host_bytes is None or sum(memory.host.values()) <= host_bytes)

    rows = _largest(work, fits)
    if fits(work):
        return Advice(fits=True, usable=usable, largest_rows=rows)
    words, changed = _cheapest(work, fits)
    return Advice(fits=False, usable=usable, largest_rows=rows, change=words, changed=changed)


def _largest(work: Work, fits: Callable[[Work], bool]) -> int:
    """By doubling and halving; memory grows with the rows."""
    each = work.gpus

    def good(many: int) -> bool:
        return fits(work.but(rows=many * each))

    if not good(1):
        return 0
    low = 1
    while good(2 * low) and low < 2**16:
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low * each


def _cheapest(work: Work, fits: Callable[[Work], bool]) -> tuple[tuple[str, ...], Work | None]:
    words: list[str] = []
    now = work
    for told, change in candidates(work):
        try:
            alone, together = change(work), change(now)
        except ConfigError:
            continue
        if alone != work and fits(alone):
            return (told,), alone
        if together != now:
            now, words = together, [*words, told]
            if fits(now):
                return _without_spare(work, words, fits)
    return (), None


def _without_spare(work: Work, words: list[str], fits: Callable[[Work], bool]) -> tuple[tuple[str, ...], Work | None]:
    """The changes less those, the dearest first, without which it fits too."""
    known = dict(candidates(work))
    kept = [*words]

    def made(names: list[str]) -> Work:
        now = work
        for name in names:
            now = known[name](now)
        return now

    for name in reversed(words):
        fewer = [one for one in kept if one != name]
        if fewer and fits(made(fewer)):
            kept = fewer
    return tuple(kept), made(kept)


def _to(**changes: Any) -> Callable[[Work], Work]:
    return lambda work: work.but(**changes)


def candidates(work: Work) -> Iterator[tuple[str, Callable[[Work], Work]]]:
    """Changes in order of cost: smaller forwards, recomputing, more sharding, host memory, fewer weights,
    smaller rollouts, more GPUs."""
    rows = work.forward_rows
    while rows > 1:
        rows //= 2
        yield f"micro_batch: {rows}", _to(micro_batch=rows)
    yield "activation checkpointing", _to(recompute=True)
    if work.gpus > 1:
        for stage in ("zero1", "zero2", "zero3"):
            if int(stage[4]) > work.stage and not work.offloads:
                yield f"engine.student: {stage}", _to(engine=stage)
        if work.placement == "replicated":
            yield "teacher placement: zero3", _to(placement="zero3")
    if not work.offloads:
        offloaded = "zero3-offload" if work.stage == 3 else "zero2-offload"
        yield f"engine.student: {offloaded}", _to(engine=offloaded)
    if work.placement != "offload":
        yield "teacher placement: offload", _to(placement="offload")
    if work.stage == 3 and work.gather == "rollout":
        yield "engine.gather: forward", _to(gather="forward")
    if not work.lora:
        yield "LoRA of rank 16", _to(lora=16)
    many = work.rows // 2
    while many >= work.gpus:
        yield f"batch: {many}", _to(rows=many)
        many //= 2
    for times in (2, 4, 8, 16, 32):
        gpus = times * work.gpus
        if gpus <= work.rows:
            yield f"{gpus} GPUs", _to(gpus=gpus)

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
class Change:
    """One change, in the words of a run's file."""

    words: str
    option: str
    """The same as an option of ``minillm plan``."""
    setting: str | None
    """The same as KEY=VALUE for a run's file; None where the file does not decide it."""
    make: Callable[[Work], Work]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What follows from a plan and the memory of a GPU and of a node."""

    fits: bool
    usable: int
    """Bytes of a GPU that may be planned with."""
    largest_rows: int
    """Responses of a rollout that fit, all GPUs together, the other settings as they are; 0: not even one for each."""
    change: tuple[Change, ...] = ()
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
    change, changed = _cheapest(work, fits)
    return Advice(fits=False, usable=usable, largest_rows=rows, change=change, changed=changed)


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


def _cheapest(work: Work, fits: Callable[[Work], bool]) -> tuple[tuple[Change, ...], Work | None]:
    taken: list[Change] = []
    now = work
    for change in candidates(work):
        try:
            alone, together = change.make(work), change.make(now)
        except ConfigError:
            continue
        if alone != work and fits(alone):
            return (change,), alone
        if together != now:
            now, taken = together, [*taken, change]
            if fits(now):
                return _without_spare(work, taken, fits)
    return (), None


def _without_spare(
    work: Work, taken: list[Change], fits: Callable[[Work], bool]
) -> tuple[tuple[Change, ...], Work | None]:
    """The changes less those, the dearest first, without which it fits too."""
    kept = [*taken]

    def made(changes: list[Change]) -> Work:
        now = work
        for change in changes:
            now = change.make(now)
        return now

    for change in reversed(taken):
        fewer = [one for one in kept if one is not change]
        if fewer and fits(made(fewer)):
            kept = fewer
    return tuple(_last_of_each(kept)), made(kept)


def _last_of_each(changes: list[Change]) -> Iterator[Change]:
    """Of several values of one setting the one that counts."""
    last = {change.option.split()[0]: change for change in changes}
    yield from (change for change in changes if last[change.option.split()[0]] is change)


def _change(words: str, *, option: str, setting: str | None = None, **changes: Any) -> Change:
    return Change(words=words, option=option, setting=setting, make=lambda work: work.but(**changes))


def candidates(work: Work) -> Iterator[Change]:
    """Changes in order of cost: smaller forwards, recomputing, more sharding, host memory, fewer weights,
    smaller rollouts, more GPUs."""
    stage = f"stages.{work.at or 0}"
    rows = work.forward_rows
    while rows > 1:
        rows //= 2
        yield _change(
            f"micro_batch: {rows}", option=f"--micro-batch {rows}", setting=f"{stage}.micro_batch={rows}",
            micro_batch=rows,
        )  # fmt: skip
    yield _change(
        "engine.activation_checkpointing: true", option="--activation-checkpointing",
        setting="engine.activation_checkpointing=true", recompute=True,
    )  # fmt: skip
    if work.gpus > 1:
        for name in ("zero1", "zero2", "zero3"):
            if int(name[4]) > work.stage and not work.offloads:
                yield _engine(name)
        if work.placement == "replicated":
            yield _placement("zero3")
    if not work.offloads:
        yield _engine("zero3-offload" if work.stage == 3 else "zero2-offload")
    if work.placement != "offload":
        yield _placement("offload")
    if work.stage == 3 and work.gather == "rollout":
        yield _change(
            "engine.gather: forward", option="--gather forward", setting="engine.gather=forward", gather="forward"
        )
    yield from _smaller(work, stage)


def _engine(name: str) -> Change:
    return _change(f"engine.student: {name}", option=f"--stage {name}", setting=f"engine.student={name}", engine=name)


def _placement(name: str) -> Change:
    return _change(f"placement: {name} in the teacher's card", option=f"--placement {name}", placement=name)


def _smaller(work: Work, stage: str) -> Iterator[Change]:
    """What changes the run itself, or takes more hardware."""
    rank = min(16, work.student.smallest_side)
    if not work.frozen:
        yield _change(f"lora: {{rank: {rank}}}", option=f"--lora {rank}", setting=f"lora.rank={rank}", lora=rank)
    prompts = work.rows // work.samples_per_prompt // 2
    while prompts and (many := prompts * work.samples_per_prompt) >= work.gpus:
        yield _change(f"prompts: {prompts}", option=f"--batch {many}", setting=f"{stage}.prompts={prompts}", rows=many)
        prompts //= 2
    for times in (2, 4, 8, 16, 32):
        gpus = times * work.gpus
        if gpus <= work.rows and (gpus <= work.gpus_per_node or gpus % work.gpus_per_node == 0):
            yield _change(f"{gpus} GPUs", option=f"--gpus {gpus}", gpus=gpus)

"""A plan for people, and for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from minillm.plan.advice import Advice
from minillm.plan.memory import Memory, memory_of
from minillm.plan.sizes import GIB, Work
from minillm.plan.traffic import Rates, Traffic

_WIDTH = 40


def print_plan(
    work: Work, memory: Memory, traffic: Traffic, rates: Rates, advice: Advice, *, command: str = ""
) -> None:
    """The tables, a bar for each phase, the verdict, and what a step moves and takes. ``command`` is the plan with the
    change that is advised."""
    from minillm.terminal import print_table

    unit = _unit(memory.peak)
    names = dict.fromkeys(name for items in memory.phases.values() for name in items)
    table = [[name, *([_number(size, unit)] * len(memory.phases))] for name, size in memory.standing.items()]
    for name in names:
        sizes = [items.get(name) for items in memory.phases.values()]
        table.append([name, *(_number(size, unit) if size else "" for size in sizes)])
    peaks = memory.peaks
    print_table(
        f"{work.teacher.name} → {work.student.name} on {gpus(work.gpus)}, {work.engine}, teacher {work.placement}, "
        f"{work.precision}: {unit} of each GPU",
        ["", *memory.phases],
        table,
        below=[["together", *(_number(peak, unit) for peak in peaks.values())]],
    )
    most = max(advice.usable, memory.peak)
    for name, peak in peaks.items():
        mark = "" if peak <= advice.usable else "  over"
        print(f"{name:>9} {'█' * max(1, round(_WIDTH * peak / most)):<{_WIDTH}} {_size(peak):>10}{mark}")
    print(f"{'usable':>9} {'░' * round(_WIDTH * advice.usable / most):<{_WIDTH}} {_size(advice.usable):>10}")
    told = ", ".join(f"{name} {_size(size)}" for name, size in memory.host.items()) or "nothing"
    print(f"\nhost, each node: {told}")
    print("\n".join(_verdict(work, memory, advice, command=command)))
    rows = [
        [name, _size(size), f"{traffic.calls[name]:,}", _seconds(size / rates.bandwidth)]
        for name, size in traffic.sent.items()
    ]
    if rows:
        print_table("Sent by each GPU in a step", ["", "bytes", "calls", "time"], rows)
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in traffic.seconds.items())
    tokens = work.rows * work.new_tokens / traffic.step_s
    print(f"a step takes about {_seconds(traffic.step_s)} ({parts}), {tokens:,.0f} new tokens/s; {rates.source}")


def _verdict(work: Work, memory: Memory, advice: Advice, *, command: str) -> list[str]:
    lines = [
        f"{'fits' if advice.fits else 'does not fit'}: {_size(memory.peak)} in the phase '{memory.worst}' of "
        f"{_size(advice.usable)} that may be used"
    ]
    if advice.largest_rows:
        lines.append(
            f"largest batch that fits as it is: {advice.largest_rows:,} responses of a rollout ({work.rows:,} now)"
        )
    else:
        lines.append("no batch fits as it is, not one response for each GPU")
    if advice.changed is not None:
        words = " and ".join(change.words for change in advice.change)
        lines.append(f"cheapest change that makes it fit: {words}; then {_size(memory_of(advice.changed).peak)}")
        lines += [f"  {command}"] if command else []
    elif not advice.fits:
        lines.append("no change that was tried makes it fit: a smaller model, or shorter rows")
    return lines


def as_json(
    work: Work, memory: Memory, traffic: Traffic, rates: Rates, advice: Advice, *, command: str = ""
) -> dict[str, Any]:
    """Everything that ``print_plan`` says; sizes in bytes."""
    settings = dataclasses.asdict(work)
    for role in ("student", "teacher"):
        settings[role] = {name: settings[role][name] for name in ("name", "parameters", "layers", "hidden")}
    return {
        "settings": settings,
        "standing": memory.standing,
        "phases": memory.phases,
        "peaks": memory.peaks,
        "host": memory.host,
        "fits": advice.fits,
        "usable": advice.usable,
        "largest_batch": advice.largest_rows,
        "change": [change.words for change in advice.change],
        "changed_peak": None if advice.changed is None else memory_of(advice.changed).peak,
        "command": command,
        "sent": traffic.sent,
        "calls": traffic.calls,
        "seconds": traffic.seconds,
        "rates": dataclasses.asdict(rates),
    }


def gpus(many: int) -> str:
    """``1 GPU``, ``8 GPUs``."""
    return f"{many:,} GPU{'' if many == 1 else 's'}"


def _unit(size: int) -> str:
    return "GiB" if size >= GIB / 10 else "MiB"


def _number(size: int, unit: str) -> str:
    """With as many digits as say something."""
    value = size / (GIB if unit == "GiB" else GIB / 1024)
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _size(size: int) -> str:
    return f"{_number(size, _unit(size))} {_unit(size)}"


def _seconds(seconds: float) -> str:
    if seconds < 0.001:
        return f"{1e6 * seconds:.0f} µs"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"

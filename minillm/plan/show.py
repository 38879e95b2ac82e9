"""A plan for people, and for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from minillm.plan.advice import Advice
from minillm.plan.memory import Memory
from minillm.plan.sizes import GIB, Work
from minillm.plan.traffic import Rates, Traffic

_WIDTH = 40


def print_plan(work: Work, memory: Memory, traffic: Traffic, rates: Rates, advice: Advice) -> None:
    """The tables, a bar for each phase, the verdict, and what a step moves and takes."""
    from minillm.terminal import print_table

    names = dict.fromkeys(name for items in memory.phases.values() for name in items)
    table = [[name, *([_gib(size)] * len(memory.phases))] for name, size in memory.standing.items()]
    for name in names:
        sizes = [items.get(name) for items in memory.phases.values()]
        table.append([name, *(_gib(size) if size else "" for size in sizes)])
    peaks = memory.peaks
    print_table(
        f"{work.teacher.name} → {work.student.name} on {work.gpus} GPUs, {work.engine}, teacher {work.placement}, "
        f"{work.precision}: GiB of each GPU",
        ["", *memory.phases],
        table,
        below=[["together", *map(_gib, peaks.values())]],
    )
    most = max(advice.usable, memory.peak)
    for name, peak in peaks.items():
        mark = "" if peak <= advice.usable else "  over"
        print(f"{name:>9} {'█' * max(1, round(_WIDTH * peak / most)):<{_WIDTH}} {_gib(peak):>7} GiB{mark}")
    print(f"{'usable':>9} {'░' * round(_WIDTH * advice.usable / most):<{_WIDTH}} {_gib(advice.usable):>7} GiB")
    told = ", ".join(f"{name} {_gib(size)} GiB" for name, size in memory.host.items()) or "nothing"
    print(f"\nhost, each node: {told}")
    print("\n".join(_verdict(work, memory, advice)))
    rows = [
        [name, _gib(size), str(traffic.calls[name]), f"{size / rates.bandwidth:.2f}"]
        for name, size in traffic.sent.items()
    ]
    if rows:
        print_table("Sent by each GPU in a step", ["", "GiB", "calls", "seconds"], rows)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in traffic.seconds.items())
    tokens = work.rows * work.new_tokens / traffic.step_s
    print(f"a step takes about {traffic.step_s:.1f} s ({parts}), {tokens:,.0f} new tokens/s; {rates.source}")


def _verdict(work: Work, memory: Memory, advice: Advice) -> list[str]:
    lines = [
        f"{'fits' if advice.fits else 'does not fit'}: {_gib(memory.peak)} GiB in the phase '{memory.worst}' of "
        f"{_gib(advice.usable)} GiB that may be used"
    ]
    if advice.largest_rows:
        lines.append(
            f"largest batch that fits as it is: {advice.largest_rows} responses of a rollout ({work.rows} now)"
        )
    else:
        lines.append("no batch fits as it is, not one response for each GPU")
    if advice.change:
        lines.append(f"cheapest change that makes it fit: {' and '.join(advice.change)}")
    elif not advice.fits:
        lines.append("no change that was tried makes it fit: a smaller model, or shorter rows")
    return lines


def as_json(work: Work, memory: Memory, traffic: Traffic, rates: Rates, advice: Advice) -> dict[str, Any]:
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
        "change": list(advice.change),
        "sent": traffic.sent,
        "calls": traffic.calls,
        "seconds": traffic.seconds,
        "rates": dataclasses.asdict(rates),
    }


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"

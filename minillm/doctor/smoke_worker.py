"""One rank of the smoke test: collectives on tensors whose sum is known, timed. ``python -m … FILE``; rank 0 writes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from minillm.ranks import Ranks
from minillm.store import write_text

SIZES = (1 << 16, 1 << 22)
"""Elements of 4 bytes: a small message, whose time is that of a call, and a large one, whose time is its bytes'."""
REPEATS = 5
LIMIT_S = 30.0
"""Seconds that a rank waits for the others."""


def measure(ranks: Ranks) -> dict[str, object]:
    """Whether sums and gathered parts are right, and millions of bytes a second of each collective by bytes."""
    by_size = {4 * elements: _measured(ranks, elements) for elements in SIZES}
    wrong = ranks.anyone(not all(right for right, _ in by_size.values()))
    names = ("all_reduce", "all_gather")
    speed = {name: {size: speeds[name] for size, (_, speeds) in by_size.items()} for name in names}
    return {
        "ranks": ranks.size,
        "device": ranks.device.type,
        "backend": dist.get_backend(),
        "right": not wrong,
        "mb_per_s": speed,
    }


def _measured(ranks: Ranks, elements: int) -> tuple[bool, dict[str, float]]:
    """Both collectives on so many elements: whether they are right here, and how fast."""
    mine = torch.full((elements,), float(ranks.rank + 1), device=ranks.device)
    total, parts = mine.clone(), [torch.empty_like(mine) for _ in range(ranks.size)]
    dist.all_reduce(total)
    dist.all_gather(parts, mine)
    right = bool((total == ranks.size * (ranks.size + 1) / 2).all())
    right = right and all(bool((part == rank + 1).all()) for rank, part in enumerate(parts))
    reduced = mine.nbytes / _seconds(lambda: dist.all_reduce(total), ranks)
    gathered = mine.nbytes * ranks.size / _seconds(lambda: dist.all_gather(parts, mine), ranks)
    return right, {"all_reduce": reduced / 1e6, "all_gather": gathered / 1e6}


def _seconds(collective: Callable[[], object], ranks: Ranks) -> float:
    """Of one call, on the mean of a few."""
    ranks.barrier()
    began = time.perf_counter()
    for _ in range(REPEATS):
        collective()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return max(time.perf_counter() - began, 1e-9) / REPEATS


def main() -> None:
    """Entry point of each rank."""
    ranks = Ranks(threads=1, limit_s=LIMIT_S)
    found = measure(ranks)
    if ranks.first:
        write_text(Path(sys.argv[1]), json.dumps(found))
    ranks.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

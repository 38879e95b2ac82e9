"""What a fresh process measures of its own memory; it imports little, for that is most of what it does."""

from __future__ import annotations

import torch

from minillm.bench.memory import extra_peak

MIB = 2**20


def peak_of(mebibytes: int) -> int:
    """One tensor that is freed at once beside 64 MiB that stood before."""
    before = torch.ones(64 * MIB // 4)
    found = extra_peak(lambda: torch.ones(mebibytes * MIB // 4).sum(), device=torch.device("cpu"))
    assert before.numel() > 0
    return found

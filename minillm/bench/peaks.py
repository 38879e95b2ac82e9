"""What the machine can do at best: matrix products and reading of memory, as floors for what models take on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_TRIES = 5
_SQUARE = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
_READ_BYTES = {"cpu": 2**28, "cuda": 2**32}
"""Far more than any cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """The best of some tries."""

    flops_per_s: float
    """Of a product of two large square matrices, counting 2 n^3."""
    bytes_per_s: float
    """Read by a sum over much memory."""

    def seconds_to_read(self, size: int) -> float:
        """To read so many bytes once: no decode step takes less for its weights."""
        return size / self.bytes_per_s

    def seconds_to_multiply(self, parameters: int, tokens: int) -> float:
        """A forward over so many tokens, two operations for each weight; attention is left out."""
        return 2 * parameters * tokens / self.flops_per_s


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """A second or two on a laptop."""
    side = _SQUARE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    memory = torch.ones(_READ_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    return Peaks(
        flops_per_s=2 * side**3 / _best(lambda: left @ right, device),
        bytes_per_s=memory.numel() * 4 / _best(memory.sum, device),
    )


def _best(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(_TRIES + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])

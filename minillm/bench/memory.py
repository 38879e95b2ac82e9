"""The most memory that a piece of work takes beyond what stood before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from minillm.errors import ConfigError

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def extra_peak(work: Callable[[], object], *, device: torch.device) -> int:
    """Bytes at the highest point of ``work`` less those before it: torch's allocator on a GPU, else the resident set.

    On a CPU the answer is only right in a process that has not freed large tensors to its own allocator before; so
    measure one piece of work in each process. Raises ``ConfigError`` where the system does not tell (Linux does).
    """
    forget_peak(device)
    before = standing_now(device)
    work()
    return peak_now(device) - before


def standing_now(device: torch.device) -> int:
    """Bytes that are taken at present."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.memory_allocated(device))
    return _resident("VmRSS")


def peak_now(device: torch.device) -> int:
    """Bytes at the highest point since it was last forgotten."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    return _resident("VmHWM")


def forget_peak(device: torch.device) -> None:
    """The highest point counts from here. Raises ``ConfigError`` where the system does not tell it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError as error:
        raise ConfigError(
            f"memory is measured through {_CLEAR}, which cannot be used here: {error.strerror}\n"
            "  run the benchmark on Linux, or on a GPU"
        ) from error


def _resident(field: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise AssertionError(f"no {field} in {_STATUS}")

"""How many floating-point operations the models of this rank have done, and how many its device could do.

Counted are the products with weights: 2 operations for each weight and token of a forward, 4 more where gradients are
made (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B). Attention's own products, padding and what
activation checkpointing does again are left out, so a share of the device's rate is that of useful work (MFU).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FORWARD, TRAINED = 2, 6
"""Operations for a weight and token: in a forward, and with a backward pass."""
PEAKS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}
"""Dense bf16 operations a second, by a part of the device's name, from NVIDIA's data sheets."""


class _Ledger:
    done: float = 0.0
    waiting: list[Tensor]

    def __init__(self) -> None:
        self.waiting = []


_ledger = _Ledger()


def add(tokens: Tensor | int, weights: int, *, each: int) -> None:
    """So many tokens went through so many weights, with ``each`` operations for one of either. A tensor of a GPU is
    read later, so that nobody waits for it now."""
    if isinstance(tokens, Tensor) and tokens.is_cuda:
        _ledger.waiting.append(tokens.double() * (weights * each))
    else:
        _ledger.done += float(tokens) * weights * each


def done() -> float:
    """Operations of this process so far."""
    if _ledger.waiting:
        _ledger.done += float(torch.stack(_ledger.waiting).sum())
        _ledger.waiting.clear()
    return _ledger.done


def weights_in(module: nn.Module, *, beside: Tensor) -> int:
    """Weights of a module that tokens are multiplied by: its matrices, without tables that are only looked up in, and
    without the one ``beside``."""
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)} | {id(beside)}
    shapes = {id(p): getattr(p, "ds_shape", p.shape) for p in module.parameters() if id(p) not in looked_up}
    return sum(shape[0] * shape[1] for shape in shapes.values() if len(shape) > 1)


def peak(device: torch.device) -> float | None:
    """bf16 operations a second that this device is sold with; None where it is not known, as of any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)

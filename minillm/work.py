"""How many floating-point operations the models of this rank have done, and how many its device could do.

Counted are the products with weights: 2 operations for each weight and token of a forward; with a backward pass 2 more
for the gradient of what goes in, and 2 more for that of the weight, where it is trained (Kaplan et al. 2020, section
2.1; Chowdhery et al. 2022, appendix B). Attention's own products, padding and what activation checkpointing does again
are left out, so a share of the device's rate is that of useful work (MFU).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

FORWARD, FROZEN, TRAINED = 2, 4, 6
"""Operations for a weight and token: in a forward; with a backward pass, through a frozen weight and a trained one."""
PEAKS: dict[str, float] = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A40": 150e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}
"""Dense bf16 operations a second, by words of the device's name, from NVIDIA's data sheets."""
_WAITING = 4096
"""Tensors of a GPU that are kept to be read together, at most."""


class Weights(NamedTuple):
    """How many a token is multiplied by."""

    frozen: int
    trained: int

    def operations(self, *, backward: bool) -> int:
        """For each token."""
        if not backward:
            return FORWARD * (self.frozen + self.trained)
        return FROZEN * self.frozen + TRAINED * self.trained


class _Ledger:
    def __init__(self) -> None:
        self.done = 0.0
        self.waiting: list[Tensor] = []


_ledger = _Ledger()


def add(tokens: Tensor | int, operations: int) -> None:
    """So many tokens took so many operations each. A tensor of a GPU is read later, so that nobody waits for it now."""
    if isinstance(tokens, Tensor) and tokens.is_cuda:
        _ledger.waiting.append(tokens.double() * operations)
        if len(_ledger.waiting) >= _WAITING:  # still on the GPU: nobody waits, and the list stays short
            _ledger.waiting = [torch.stack(_ledger.waiting).sum()]
    else:
        _ledger.done += float(tokens) * operations


def done() -> float:
    """Operations of this process so far."""
    if _ledger.waiting:
        _ledger.done += float(torch.stack(_ledger.waiting).sum())
        _ledger.waiting.clear()
    return _ledger.done


def weights_in(module: nn.Module, *, beside: Tensor) -> Weights:
    """Weights of a module that tokens are multiplied by: its matrices, without tables that are only looked up in, and
    without the one ``beside``."""
    looked_up = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)} | {id(beside)}
    return weights_of(*{id(p): p for p in module.parameters() if id(p) not in looked_up}.values())


def weights_of(*parameters: Tensor) -> Weights:
    """Those of the matrices among these, cut into shards or not."""
    sizes = {True: 0, False: 0}
    for parameter in parameters:
        shape = getattr(parameter, "ds_shape", parameter.shape)
        sizes[parameter.requires_grad] += shape[0] * shape[1] if len(shape) > 1 else 0
    return Weights(frozen=sizes[False], trained=sizes[True])


def peak(device: torch.device) -> float | None:
    """bf16 operations a second that this device is sold with; None where it is not known, as of any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for words, rate in PEAKS.items() if re.search(rf"\b{words}\b", name.replace("-", " "))), None)

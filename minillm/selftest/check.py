"""What a check is: a name, and a function that finds one figure and the most that it may be.

Legend: any shapes. Figures are errors, so smaller is better, and a NaN is never small enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-12
"""Limit of a figure that is 0 but for rounding in float64."""


class Found(NamedTuple):
    """What a check found."""

    figure: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the figure is within the limit."""
        return self.figure <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One promise and how to see whether it holds here."""

    name: str
    run: Callable[[], Found]


def device() -> torch.device:
    """Where models and sampling are checked: where runs would be. Mathematics in float64 stays on the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def worst(*errors: float | Tensor) -> float:
    """The largest of these errors, of tensors the largest entry; NaN if one is."""
    tensors = [torch.as_tensor(error, dtype=torch.float64).detach().cpu() for error in errors]
    return float(torch.stack([tensor.max() for tensor in tensors]).max())


def gap(got: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where the shapes are not the same."""
    return worst((got.detach().double() - want.detach().double()).abs()) if got.shape == want.shape else math.inf


def relative(got: Tensor, want: Tensor) -> float:
    """Length of the difference over the length of what is wanted; no number, which is no success, where that is 0."""
    return float((got - want).detach().norm() / want.detach().norm())


def differing(got: Tensor, want: Tensor) -> float:
    """How many entries are not the same; infinite where the shapes are not."""
    return float((got != want).sum()) if got.shape == want.shape else math.inf


def rough(*shape: int, seed: int = 0) -> Tensor:
    """Float64 numbers within ±1.5 that look random: a chirp, so that they are the same with any version of torch."""
    place = torch.arange(math.prod(shape), dtype=torch.float64)
    return 1.5 * torch.sin(0.7 * place * place + 1.3 * seed * place + seed).reshape(shape)


def log(*probabilities: float) -> Tensor:
    """Logarithms of probabilities, one row [1, V] in float64."""
    return torch.tensor([probabilities], dtype=torch.float64).log()

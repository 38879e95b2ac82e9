"""Muon: momentum whose matrices are made nearly orthogonal before each step (Jordan et al., 2024).

torch has one too (``torch.optim.Muon``), which always multiplies in bfloat16: on a processor without bfloat16
arithmetic that took 325 of the 436 ms of a 355k model's step (docs/LOG.md). This one computes in 32 bits unless the
weights are on a GPU, and takes matrices of one shape together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of x -> ax + bx^3 + cx^5, which lifts small singular values fastest."""
ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon over matrices, with Nesterov momentum and steps of AdamW's usual size (0.2 per entry, Liu et al. 2025)."""

    def __init__(self, matrices: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for every matrix that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.device].append(parameter)
            for (shape, _), parameters in alike.items():
                size = 0.2 * math.sqrt(max(shape)) * group["lr"]
                for parameter, direction in zip(parameters, self._directions(parameters), strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(direction, alpha=-size)
        return loss

    def _directions(self, parameters: list[Tensor]) -> Tensor:
        """The orthogonalised updates of K matrices of one shape, [K, rows, columns]."""
        ahead = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter.grad)
            state["momentum"].lerp_(parameter.grad, 1.0 - MOMENTUM)
            ahead.append(parameter.grad.lerp(state["momentum"], MOMENTUM))
        update = torch.stack(ahead)
        computed = orthogonalised(update.bfloat16() if update.is_cuda else update)
        return computed.to(update.dtype)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Each of [K, rows, columns] with its singular values moved towards 1 (to about 0.7 to 1.2), in the given dtype."""
    a, b, c = QUINTIC
    turned = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if turned else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if turned else x

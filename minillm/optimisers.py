"""Optimisers and schedules by name, from the run's configuration and not from an engine file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import OptimiserConfig
from minillm.muon import Muon


def learning_rate_factor(update: int, *, total: int, schedule: str, warmup: int, final_fraction: float) -> float:
    """Share of the configured rate for update 0 .. total-1: a pure function, so that a schedule has no state to lose.

    Linear from 1/warmup over the warm-up updates, then ``constant``, ``linear`` or ``cosine`` down to
    ``final_fraction`` at the last.
    """
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = (update - warmup) / max(total - 1 - warmup, 1)
    left = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return final_fraction + (1.0 - final_fraction) * max(left, 0.0)


def build_optimiser(root: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices inside the layers with AdamW for the rest, with each group's rate under
    ``base_lr``.

    Weight decay acts on matrices only (gains, biases and position tables of one dimension stay free).
    """
    matrices, vectors, hidden = _split(root)
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        groups = [
            {"params": hidden + matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimiser: torch.optim.Optimizer = torch.optim.AdamW([group for group in groups if group["params"]], **adam)
    else:
        optimiser = MuonWithAdamW(
            Muon(
                hidden,
                lr=config.muon_lr if config.muon_lr is not None else config.lr,
                weight_decay=config.weight_decay,
            ),
            torch.optim.AdamW(
                [
                    {"params": matrices, "weight_decay": config.weight_decay},
                    {"params": vectors, "weight_decay": 0.0},
                ],
                **adam,
            ),
        )
    for group in optimiser.param_groups:
        group["base_lr"] = group["lr"]
    return optimiser


def set_learning_rate(optimiser: Any, factor: float) -> float:
    """Sets every group to its base rate times ``factor``; returns the first group's rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor
    rate: float = optimiser.param_groups[0]["lr"]
    return rate


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) and AdamW behind one optimiser's face: one list of groups, one state, one step.

    Muon orthogonalises whole matrices, so it must see them unsharded: ZeRO stage 0 only (the configuration refuses
    others).
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self.parts: tuple[torch.optim.Optimizer, ...] = (muon, adamw)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # One list, the same group objects: a rate set here is the rate the parts step with.
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:stop]
            start = stop

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both parts; ``closure`` is evaluated once, before either."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both parts' states in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both parts; the groups stay shared with this optimiser's list."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def _split(root: nn.Module) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(embedding-like matrices, vectors, matrices inside the layers); a tied weight counts once, as an embedding."""
    outer = {id(p) for module in root.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    outer |= {id(p) for name, p in root.named_parameters() if name.startswith("head.")}
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    hidden: list[Tensor] = []
    for parameter in _trainable(root.parameters()):
        # ``ds_shape`` is the whole shape of a parameter that ZeRO-3 has already cut into flat shards.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        if dimensions < 2:
            vectors.append(parameter)
        else:
            (matrices if id(parameter) in outer else hidden).append(parameter)
    return matrices, vectors, hidden


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]

"""Activation checkpointing: between the passes a layer keeps its input alone, and computes the rest again when the
backward pass comes to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from minillm.errors import UnsupportedCombination
from minillm.meta_models import meta_model


def recompute_layers(module: nn.Module) -> int:
    """Makes every layer of a transformers model keep its input alone wherever a gradient is wanted; how many there are.

    transformers' own switch works only in training mode, which turns dropout on; a student that learns on its own text
    has it off. Without gradient, as in rollouts, and with a cache nothing changes. Numbers and gradients are the same,
    masks of dropout too.
    """
    layers = _layers(module)
    for layer in layers:
        layer.forward = _Recomputed(layer.forward)
    return len(layers)


def require_layers(config: PretrainedConfig, *, name: str) -> None:
    """Raise ``UnsupportedCombination`` where a model of this configuration has no layers that can be computed again."""
    model = meta_model(config)
    if not _layers(model):
        raise UnsupportedCombination(
            f"engine.activation_checkpointing with student {name}: of {type(model).__name__} transformers names no "
            "layer that can be computed again; set engine.activation_checkpointing: false"
        )


def _layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


class _Recomputed:
    """A layer's forward; the module's hooks, which gather its weights under ZeRO-3, stay outside."""

    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled() or more.get("past_key_values") is not None:
            return self._forward(*inputs, **more)
        # Not the reentrant kind: that finds no gradient to give where neither inputs nor embeddings are trained.
        return checkpoint(self._forward, *inputs, use_reentrant=False, **more)

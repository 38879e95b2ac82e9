"""A model of some of another's layers: the warm start of a student from its teacher.

A layer keeps its weights; its number, by which attention finds its keys and values in a cache, is that of its new
place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.errors import ModelError
from minillm.meta_models import meta_model

COUNT = "num_hidden_layers"
"""transformers' own name, to which GPT-2's n_layer and others are led."""


def picked_config(config: PreTrainedConfig, layers: Sequence[int], *, name: str) -> PreTrainedConfig:
    """The configuration of a model of these layers; ``ModelError`` where it has no such layer, or is not known to be
    a single stack of them."""
    whole = getattr(config, COUNT, None)
    if not isinstance(whole, int) or config.is_encoder_decoder:
        raise ModelError(f"{name}: a {config.model_type} does not say how many layers it has; leave 'layers' out")
    if beyond := [layer for layer in layers if layer >= whole]:
        raise ModelError(f"{name}: layers: it has no layer {beyond[0]}; wanted numbers from 0 to {whole - 1}")
    found = copy.deepcopy(config)
    setattr(found, COUNT, len(layers))
    for field, value in config.to_dict().items():
        if isinstance(value, list | tuple) and len(value) == whole and field != "architectures":
            setattr(found, field, [value[layer] for layer in layers])
    return found


def keep_layers(model: PreTrainedModel, config: PreTrainedConfig, layers: Sequence[int], *, name: str) -> None:
    """Leaves a loaded model these layers, in this order; ``config`` is ``picked_config`` of its own. ``ModelError``
    where the result is not the model of that configuration."""
    whole = getattr(model.config, COUNT)
    stacks = [
        (parent, key, child)
        for parent in model.base_model.modules()
        for key, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == whole
    ]
    if len(stacks) == 1:
        parent, key, stack = stacks[0]
        setattr(parent, key, nn.ModuleList([stack[layer] for layer in layers]))
        for place, layer in enumerate(getattr(parent, key)):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place
        _adopt(model.config, config)
    plain = meta_model(config)
    shapes = [{key: tuple(p.shape) for key, p in each.named_parameters()} for each in (plain, model)]
    if len(stacks) != 1 or shapes[0] != shapes[1]:
        raise ModelError(
            f"{name}: minillm cannot pick layers of a {type(model).__name__}: they are not one list of like blocks.\n"
            "  leave 'layers' out, or write a folder of those layers yourself and name it"
        )


def _adopt(config: PreTrainedConfig, other: PreTrainedConfig) -> None:
    """Modules hold the configuration that they were made with, so it is changed in place."""
    for field in (COUNT, *other.to_dict()):
        if field in config.to_dict() or field == COUNT:
            value = getattr(other, field, None)
            if getattr(config, field, None) != value:
                setattr(config, field, value)

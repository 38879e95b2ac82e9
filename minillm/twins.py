"""A twin of a sharded model, without weights and without an engine's hooks: it runs on weights that are gathered for
a while."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from minillm.adaptation import Adaptation
from minillm.meta_models import meta_model
from minillm.models import CausalLM


def meta_twin(model: PreTrainedModel, *, real_ids: int, adaptation: Adaptation | None = None) -> CausalLM:
    """The same architecture on no device, in evaluation mode, with the adapter's modules where there is one."""
    bare = meta_model(model.config)
    with torch.device("meta"):
        if adaptation is not None:
            adaptation.put_on_twin(bare)
        twin = CausalLM(bare)
    twin.head.real_ids = real_ids
    return twin.eval()


def adopt(twin: nn.Module, owner: nn.Module) -> None:
    """Points the twin's parameters and buffers at the owner's present storage."""
    modules = dict(owner.named_modules())
    for name, module in twin.named_modules():
        source = modules[name]
        for key, value in source._parameters.items():
            module._parameters[key] = None if value is None else nn.Parameter(value.data, requires_grad=False)
        for key, buffer in source._buffers.items():
            module._buffers[key] = buffer


def disown(twin: nn.Module) -> None:
    """Takes the gathered weights from the twin again, so that they can be freed."""
    for module in twin.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = nn.Parameter(torch.empty(0), requires_grad=False)

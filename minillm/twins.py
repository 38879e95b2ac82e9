"""A twin of a sharded model, without weights and without an engine's hooks: it runs on weights that are gathered for
a while."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from minillm.adaptation import Adaptation
from minillm.meta_models import meta_model
from minillm.models import CausalLM


def meta_twin(config: PreTrainedConfig, *, real_ids: int, adaptation: Adaptation | None = None) -> CausalLM:
    """The same architecture on no device, in evaluation mode, with the adapter's modules where there is one."""
    bare = meta_model(config)
    with torch.device("meta"):
        if adaptation is not None:
            adaptation.put_on_twin(bare)
        twin = CausalLM(bare)
    twin.head.real_ids = real_ids
    return twin.eval()


def adopt(twin: nn.Module, owner: nn.Module, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Points the twin's parameters and buffers at the owner's present storage; or its parameters at ``weights``, by the
    owner's names, where a weight that is tied has the first of them."""
    modules = dict(owner.named_modules())
    names = {id(value): name for name, value in owner.named_parameters()}
    for name, module in twin.named_modules():
        source = modules[name]
        for key, value in source._parameters.items():
            module._parameters[key] = None
            if value is not None:
                data = value.data if weights is None else weights[names[id(value)]]
                module._parameters[key] = nn.Parameter(data, requires_grad=False)
        for key, buffer in source._buffers.items():
            module._buffers[key] = buffer


def disown(twin: nn.Module) -> None:
    """Takes the gathered weights from the twin again, so that they can be freed."""
    for module in twin.modules():
        for key, value in module._parameters.items():
            if value is not None:
                module._parameters[key] = nn.Parameter(torch.empty(0), requires_grad=False)

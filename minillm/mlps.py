"""The MLPs of a transformer as lists of hidden units: of which architectures we know them, and how they become wider.

Legend: H hidden width of the model, W units of an MLP, S units that are added. A unit is a row of each matrix that
reads, and a column of the one that writes.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minillm.errors import UnsupportedCombination

MARK = "bottleneck"
"""Name of the module beside an MLP's own that holds the units that are added."""


class Form(NamedTuple):
    """How an MLP is made: write(act(read(x))), or write(act(read(x)) * other(x)) where two layers read."""

    reads: tuple[str, ...]
    """Names of the linear layers from H to W, in the order in which they are called."""
    writes: str
    """Name of the one from W to H."""
    act: str
    """Name of the activation."""
    width: str
    """What the configuration calls W."""


_GATED = Form(("gate_proj", "up_proj"), "down_proj", "act_fn", "intermediate_size")
FORMS: dict[str, Form] = {
    "gpt2": Form(("c_fc",), "c_proj", "act", "n_inner"),
    "opt": Form(("fc1",), "fc2", "activation_fn", "ffn_dim"),
    "gpt_neox": Form(("dense_h_to_4h",), "dense_4h_to_h", "act", "intermediate_size"),
    "phi": Form(("fc1",), "fc2", "activation_fn", "intermediate_size"),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3"), _GATED
    ),
}
"""By the configuration's ``model_type``. Each is tried in the tests: an activation that is applied to more than one
number at a time, or a scale that depends on W, would make a wider MLP another function."""


def form_of(config: PreTrainedConfig) -> Form:
    """How the MLPs of such a model are made; ``UnsupportedCombination`` where we do not know."""
    form = FORMS.get(config.model_type)
    if form is None:
        raise UnsupportedCombination(
            f"{MARK}: the MLPs of a {config.model_type} are not among those that minillm can make wider: "
            f"{', '.join(FORMS)}.\n  take lora, which adapts any linear layer, or a student of one of these; blocks of "
            "experts have no one MLP"
        )
    return form


def width_of(config: PreTrainedConfig) -> int:
    """Units of each MLP of a model whose form is known."""
    found = getattr(config, form_of(config).width)
    return int(4 * config.hidden_size if found is None else found)  # GPT-2's way to say four times


def wider_config(config: PreTrainedConfig, by: int) -> PreTrainedConfig:
    """The same configuration with so many units more in each MLP."""
    found = copy.deepcopy(config)
    setattr(found, form_of(config).width, width_of(config) + by)
    return found


def mlps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that hold the layers of an MLP, by name, whole or in shards; ``UnsupportedCombination`` unless each
    block has one of the width that the configuration says."""
    form = form_of(model.config)
    parts = (*form.reads, form.writes)
    found = {
        name: module for name, module in model.named_modules()
        if all(isinstance(module._modules.get(part), nn.Linear | Conv1D) for part in parts)
        and name.rpartition(".")[2] != MARK
    }  # fmt: skip
    sides = (model.config.hidden_size, width_of(model.config))
    blocks = model.config.num_hidden_layers
    for module in found.values():
        got = [ends(getattr(module, part)) for part in parts]
        if got != [*[sides] * len(form.reads), sides[::-1]]:
            found = {}
    if len(found) != blocks:
        raise UnsupportedCombination(
            f"{MARK}: wanted an MLP of {sides[1]:,} units in each of {blocks} blocks of a {type(model).__name__}, and "
            f"found {len(found)}\n  take lora, which adapts any linear layer"
        )
    return found


def ends(layer: Any) -> tuple[int, int]:
    """(Inputs, outputs) of a linear layer of either kind, whole or in shards."""
    return (layer.nx, layer.nf) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def widened(own: Tensor, added: Tensor, *, writes: bool, turned: bool) -> Tensor:
    """A weight or bias of a layer with that of further units appended, in the dtype of its own: rows where the layer
    reads, columns where it ``writes``. ``turned`` where it keeps its weight as [inputs, outputs]."""
    more = added.to(own)
    return torch.cat([own, more.T if turned and own.dim() > 1 else more], dim=int(own.dim() > 1 and writes != turned))


@torch.no_grad()
def widen_layer(layer: Any, added: dict[str, Tensor], *, writes: bool) -> None:
    """Appends units to a linear layer in place; ``added`` is by the names of its parameters."""
    turned = isinstance(layer, Conv1D)
    for name, more in added.items():
        own = getattr(layer, name)
        setattr(layer, name, nn.Parameter(widened(own, more, writes=writes, turned=turned), own.requires_grad))
    names = ("nx", "nf") if turned else ("in_features", "out_features")
    sides = layer.weight.shape if turned else layer.weight.shape[::-1]
    for name, side in zip(names, sides, strict=True):
        setattr(layer, name, int(side))

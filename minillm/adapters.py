"""A LoRA adapter as a folder in peft's format: read without running anything in it, written, and merged into weights.

Legend: R rank, I inputs of a layer, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minillm.adapter_files import base_weights, json_object, tensors_of, write_base
from minillm.errors import ModelError
from minillm.model_files import few, require_own_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
"""What peft puts before the name of every module."""
_CONVERT = "convert it where you trust it: PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)"
_PLAIN: dict[str, tuple[Any, ...]] = {"peft_type": ("LORA",), "bias": ("none", None)}
_UNUSED = (
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
    "megatron_config", "modules_to_save", "monteclora_config", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
)  # fmt: skip
"""What peft's record may ask for that makes it more than W + scaling B A."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin (``init_lora_weights``) that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take out
of its weights what the adapter begins with, so that what they train is no addition to the model that the record names.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What an adapter adds to a model: ``scaling`` times B A for each adapted layer."""

    base: str
    """The model that it was trained on, as its record calls it; "" where it does not say."""
    scaling: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """By the layer's name in the model: A [R, I] and B [O, R]."""
    source: Path
    base_weights: str = ""
    """Fingerprint (``loading.fingerprint``) of that model; "" where nobody wrote it down."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What peft's own record of it is to say, where it is to be written."""
    record_file: ClassVar[str] = CONFIG

    def write(self, folder: Path) -> None:
        """Makes its folder as ``PeftModel.from_pretrained`` reads it."""
        write_adapter(folder, self, self.record)

    def merged_config(self, config: PreTrainedConfig, *, name: str) -> PreTrainedConfig:
        """The configuration itself: sums have the shape of what is added to."""
        return config

    def merge_into(self, model: PreTrainedModel, *, name: str) -> None:
        """Adds what it adds to the weights of the model ``name``; ``ModelError`` where it does not fit."""
        require_fit(self, model, name=name)
        merge(self, model)

    @property
    def changes(self) -> int:
        """How many layers of a model it changes."""
        return len(self.pairs)


def read_adapter(folder: Path) -> Adapter:
    """An adapter from its folder: safetensors and JSON only, by plain LoRA only; ``ModelError`` for anything else."""
    if folder.is_dir():
        require_own_files(folder)  # before any of them is read
    record = json_object(folder / CONFIG)
    for name, wanted in _PLAIN.items():
        if record.get(name) not in wanted:
            raise _unfit(folder, f"{name} is {record.get(name)!r}")
    if extra := [name for name in _UNUSED if record.get(name)]:
        raise _unfit(folder, f"its record asks for {few(extra)}")
    start = record.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _PLAIN_STARTS):
        raise _unfit(folder, f"init_lora_weights is {few([repr(start)])}, which changes the base that it is put on")
    tensors = tensors_of(folder, WEIGHTS, convert=_CONVERT)
    pairs = {}
    for name, found in tensors.items():
        if not name.startswith(ROOT) or not name.endswith((".lora_A.weight", ".lora_B.weight")) or found.dim() != 2:
            raise _unfit(folder, f"it holds {few([name])} of shape {list(found.shape)}")
    for name in sorted(name for name in tensors if name.endswith(".lora_A.weight")):
        layer = name.removesuffix(".lora_A.weight")
        a_RI, b_OR = tensors[name], tensors.get(f"{layer}.lora_B.weight")
        if b_OR is None or b_OR.shape[1] != a_RI.shape[0] or a_RI.shape[0] != record.get("r"):
            raise _unfit(
                folder, f"the two matrices of {few([layer.removeprefix(ROOT)])} do not fit rank {record.get('r')!r}"
            )
        pairs[layer.removeprefix(ROOT)] = (a_RI, b_OR)
    if not pairs or 2 * len(pairs) != len(tensors):
        raise _unfit(folder, f"{len(tensors):,} tensors make {len(pairs):,} pairs of A and B")
    scaling = _scaling(folder, record)
    return Adapter(
        base=str(record.get("base_model_name_or_path") or ""), scaling=scaling, pairs=pairs, source=folder,
        base_weights=base_weights(folder),
    )  # fmt: skip


def require_fit(adapter: Adapter, model: nn.Module, *, name: str) -> None:
    """``ModelError`` unless the model has every layer that the adapter adapts, in its shape."""
    modules = dict(model.named_modules())
    for layer, (a_RI, b_OR) in adapter.pairs.items():
        module = modules.get(layer)
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(
                f"{adapter.source}: adapts {few([layer])}, which is no linear layer of {name}.\n"
                "  it is of another model; name the one that it was trained on"
            )
        got, wanted = (b_OR.shape[0], a_RI.shape[1]), _sizes(module)
        if got != wanted:
            raise ModelError(
                f"{adapter.source}: adapts {few([layer])} from {got[1]:,} to {got[0]:,}, and that of {name} is from "
                f"{wanted[1]:,} to {wanted[0]:,}.\n  it is of another model; name the one that it was trained on"
            )


@torch.no_grad()
def merge(adapter: Adapter, model: nn.Module) -> None:
    """Adds what an adapter that fits adds to the model's own weights; sums in 32 bits at least."""
    for layer, (a_RI, b_OR) in adapter.pairs.items():
        module = model.get_submodule(layer)
        weight = module.weight
        assert isinstance(weight, Tensor) and weight.is_floating_point(), (layer, weight)  # else these are codes
        weight.copy_(merged_weight(weight, a_RI, b_OR, scaling=adapter.scaling, turned=isinstance(module, Conv1D)))


def merged_weight(weight: Tensor, a_RI: Tensor, b_OR: Tensor, *, scaling: float, turned: bool) -> Tensor:
    """W + scaling B A in 32 bits at least; ``turned`` where the layer keeps its weight as [I, O]."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    added_OI = (b_OR.to(wide) @ a_RI.to(wide)) * scaling
    return weight.to(wide) + (added_OI.T if turned else added_OI)


def write_adapter(folder: Path, adapter: Adapter, record: Mapping[str, Any]) -> None:
    """An adapter's folder as ``PeftModel.from_pretrained`` reads it; ``record`` is peft's own."""
    folder.mkdir()
    halves = {
        f"{ROOT}{layer}.lora_{half}.weight": pair[half == "B"] for layer, pair in adapter.pairs.items() for half in "AB"
    }
    save_file({name: tensor.contiguous() for name, tensor in halves.items()}, folder / WEIGHTS, {"format": "pt"})
    text = json.dumps({**record, "base_model_name_or_path": adapter.base}, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    write_base(folder, adapter.base_weights)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(Outputs, inputs) of a linear layer of either kind."""
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])


def _scaling(folder: Path, record: Mapping[str, Any]) -> float:
    rank, alpha = record.get("r"), record.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise _unfit(folder, f"r is {rank!r} and lora_alpha {alpha!r}")
    return float(alpha / (rank**0.5 if record.get("use_rslora") else rank))


def _unfit(folder: Path, found: str) -> ModelError:
    return ModelError(
        f"{folder}: {found}; wanted plain LoRA of linear layers and nothing else.\n"
        "  merge it where you trust it, with peft's merge_and_unload, and give the merged folder"
    )

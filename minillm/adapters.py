"""A LoRA adapter as a folder in peft's format: read without running anything in it, written, and merged into weights.

Legend: R rank, I inputs of a layer, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from minillm.cards import name_only
from minillm.errors import ModelError
from minillm.manifests import parsed
from minillm.model_files import few, in_short, require_own_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"
"""Names the weights that an adapter of ours was trained on; of a further name in its own record peft would warn."""
FOLDER = "adapter"
"""Where a student's folder has its adapter."""
ROOT = "base_model.model."
"""What peft puts before the name of every module."""
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


def holds_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's and no model's."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def read_adapter(folder: Path) -> Adapter:
    """An adapter from its folder: safetensors and JSON only, by plain LoRA only; ``ModelError`` for anything else."""
    if folder.is_dir():
        require_own_files(folder)  # before any of them is read
    record = _record(folder)
    for name, wanted in _PLAIN.items():
        if record.get(name) not in wanted:
            raise _unfit(folder, f"{name} is {record.get(name)!r}")
    if extra := [name for name in _UNUSED if record.get(name)]:
        raise _unfit(folder, f"its record asks for {few(extra)}")
    start = record.get("init_lora_weights")
    if not any(start is known or (isinstance(start, str) and start == known) for known in _PLAIN_STARTS):
        raise _unfit(folder, f"init_lora_weights is {few([repr(start)])}, which changes the base that it is put on")
    tensors = _tensors(folder)
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
        base_weights=_base_weights(folder),
    )  # fmt: skip


def require_base(adapter: Adapter, name: str, *, weights: Callable[[], str]) -> None:
    """``ModelError`` unless an adapter was trained on the model of this name, as far as its folder says.

    ``weights`` is the model's fingerprint, looked up where the folder has one of its own to compare: two of folders, or
    the commits of two hub models. Otherwise two folders that are there must be one; of anything else the last part of
    the name must be the same, since folders are moved and hubs have owners.
    """
    same = _same_weights(adapter.base_weights, weights()) if adapter.base_weights else None
    if same is False:
        raise ModelError(
            f"{adapter.source}: was trained on other weights ({adapter.base!r}) than those of {name!r}: {BASE} says so."
            f"\n  name the model that it was trained on; if only texts beside the weights were changed, remove {BASE}"
        )
    if same is None and adapter.base and not _same_name(adapter.base, name):
        raise ModelError(
            f"{adapter.source}: was trained on {adapter.base!r}, and is to be put on {name!r}.\n"
            f"  name that model; if the two are the same, say so in {CONFIG} (base_model_name_or_path)"
        )


def _same_weights(one: str, other: str) -> bool | None:
    """Whether two fingerprints are of the same weights; None where one is of a folder and the other of a hub model, or
    says no commit."""
    kinds = ["@" in each for each in (one, other)]
    if kinds[0] != kinds[1] or name_only(one) or name_only(other):
        return None
    return one.rpartition("@")[2] == other.rpartition("@")[2]


def _same_name(one: str, other: str) -> bool:
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).samefile(other)
    return Path(one).name.lower() == Path(other).name.lower()


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
    if adapter.base_weights:
        (folder / BASE).write_text(json.dumps({"weights": adapter.base_weights}) + "\n", encoding="utf-8")


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(Outputs, inputs) of a linear layer of either kind."""
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])


def _base_weights(folder: Path) -> str:
    if not (folder / BASE).exists():
        return ""
    found = _object(folder / BASE)
    if found.keys() != {"weights"} or not isinstance(found["weights"], str):
        raise ModelError(
            f"{folder / BASE}: wanted one entry, the text 'weights'\n  copy the adapter again, or remove this file"
        )
    return found["weights"]


def _record(folder: Path) -> dict[str, Any]:
    return _object(folder / CONFIG)


def _object(file: Path) -> dict[str, Any]:
    try:
        found = parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file}: cannot be read as JSON: {in_short(error)}\n  wanted the folder of an adapter that peft wrote"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds a {type(found).__name__}, wanted a JSON object")
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only pickled weights ({few(pickles)})" if pickles else "no weights"
        raise ModelError(
            f"{folder}: {found}; wanted {WEIGHTS}, because a pickle runs code when it is read.\n"
            "  convert it where you trust it: PeftModel.from_pretrained(BASE, FOLDER).save_pretrained(NEW_FOLDER)"
        )
    try:
        with safe_open(file, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a whole safetensors file: {in_short(error)}\n  fetch or write it again"
        ) from error


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

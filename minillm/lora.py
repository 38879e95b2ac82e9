"""A student that learns by a low-rank adapter: put on by peft, its own weights frozen, merged where it is handed on.

Legend: R rank, I inputs of a layer, O outputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minillm.adapters import Adapter, merged_weight, read_adapter
from minillm.errors import ConfigError, UnsupportedCombination, did_you_mean
from minillm.lora_config import LoraConfig
from minillm.meta_models import meta_model

_NAME = "default"
"""peft's own name of the only adapter on a model."""
_MARKS = (".lora_A.", ".lora_B.")


def peft_library() -> ModuleType:
    """The library that adapts models. Raises ``ConfigError`` where it is not installed."""
    # peft imports it where it is there, and it tells everybody what of its 4 bits a CPU lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError:
        raise ConfigError("lora needs peft, which is not installed\n  pip install 'minillm[lora]'") from None
    module: ModuleType = peft
    return module


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(mark in parameter for mark in _MARKS)


def adapted_layers(model: PreTrainedModel, targets: tuple[str, ...] | None) -> list[str]:
    """Names of the linear layers that get an adapter: those of the blocks, or of them and around them what ``targets``
    name by the ends of their names.

    ``ConfigError`` for a target that names none; ``UnsupportedCombination`` for the embedding and the head.
    """
    prefix = f"{model.base_model_prefix}."
    linear = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.startswith(prefix)
    ]  # fmt: skip
    if targets is None:
        blocks = [name for name in linear if any(part.isdigit() for part in name.split("."))]
        if not blocks:
            raise ConfigError(
                f"lora: a {type(model).__name__} has no linear layers in blocks; name some in lora.targets"
            )
        return blocks
    outside = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    found: list[str] = []
    for target in targets:
        hits = [name for name in linear if _ends(name, target)]
        if not hits:
            for name, module in model.named_modules():
                if _ends(name, target) and id(module) in outside:
                    raise UnsupportedCombination(
                        f"lora.targets: {target!r} is the {outside[id(module)]}: the two may be one matrix, and the "
                        "head is read tile by tile without its layer, which an adapter would need; leave it out"
                    )
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"lora.targets: {target!r} names no linear layer of a {type(model).__name__}"
                f"{did_you_mean(target, ends)}; there are {', '.join(ends)}"
            )
        found += hits
    return sorted(set(found), key=linear.index)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A low-rank adapter (``adaptation.Adaptation``)."""

    settings: LoraConfig
    seed: int
    """Key of the first matrices, whose products with the second, all 0, are 0."""
    base: str
    """The model that it is put on, as the adapter's record is to call it."""
    base_weights: str = ""
    """Fingerprint of that model, which is written beside the record; "" writes none."""
    start: Path | None = None
    """Folder of an adapter of the same model to go on from."""

    def require(self, config: PreTrainedConfig) -> None:
        """``ConfigError`` unless a model of this configuration has what the settings adapt; no weight is read."""
        adapted_layers(meta_model(config), self.settings.targets)

    def parameters(self, config: PreTrainedConfig) -> int:
        """Weights of the adapter of a model of this configuration; no weight is read."""
        model = meta_model(config)
        layers: list[Any] = [model.get_submodule(name) for name in adapted_layers(model, self.settings.targets)]
        return self.settings.rank * sum(sum(layer.weight.shape) for layer in layers)

    def is_adapter(self, parameter: str) -> bool:
        """Whether a parameter of this name belongs to the adapter."""
        return is_adapter(parameter)

    def words(self, config: PreTrainedConfig) -> str:
        """What a student's card says of its adapter; ``config`` is that of the base."""
        return f"lora: rank {self.settings.rank}, added to the merged weights; by itself in `adapter/`"

    def put_on(self, model: PreTrainedModel) -> None:
        """Freezes a model's weights, whole or sharded, and puts an adapter on that trains."""
        layers = self._inject(model)
        if self.start is not None:
            self._go_on(model, read_adapter(self.start), layers)
            return
        for name in layers:
            a_RI, b_OR = self._pair(model, name)
            draw = torch.Generator().manual_seed(_key(self.seed, name))
            bound = 1 / math.sqrt(a_RI.shape[1])  # Kaiming's, as peft draws it: uniform, a = sqrt 5
            fresh_RI = torch.empty(a_RI.shape).uniform_(-bound, bound, generator=draw)
            with torch.no_grad():
                a_RI.copy_(fresh_RI)
                b_OR.zero_()

    def put_on_twin(self, model: PreTrainedModel) -> None:
        """The same modules on a model without weights, under ``torch.device("meta")``."""
        self._inject(model)

    def merged(self, state: Mapping[str, Tensor], root: nn.Module) -> dict[str, Tensor]:
        """Whole weights by a root's names, adapters merged into what they adapt, by the names of a root without
        adapters: in 32 bits, since what an adapter adds is often less than a step of 16."""
        modules = dict(root.named_modules())
        found = {}
        for name, weight in state.items():
            if is_adapter(name):
                continue
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if name.endswith(".base_layer.weight"):
                layer = name.removesuffix(".base_layer.weight")
                a_RI, b_OR = (state[f"{layer}.lora_{half}.{_NAME}.weight"] for half in "AB")
                turned = isinstance(modules[f"{layer}.base_layer"], Conv1D)
                wide = merged_weight(wide, a_RI, b_OR, scaling=self._scaling, turned=turned)
            found[name.replace(".base_layer.", ".")] = wide
        return found

    def merged_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration itself: sums have the shape of what is added to."""
        return config

    def adapter(self, state: Mapping[str, Tensor], *, prefix: str, config: PreTrainedConfig) -> Adapter:
        """The adapter among a root's whole weights; ``prefix`` is the model's own name of its backbone."""
        layers = [name.removesuffix(f".lora_A.{_NAME}.weight") for name in state if ".lora_A." in name]
        pairs = {
            f"{prefix}{layer.removeprefix('backbone')}": tuple(
                state[f"{layer}.lora_{half}.{_NAME}.weight"].float() for half in "AB"
            )
            for layer in layers
        }
        return Adapter(
            base=self.base, scaling=self._scaling, pairs=pairs, source=Path(),  # type: ignore[arg-type]
            base_weights=self.base_weights, record=self._record(list(pairs), config),
        )  # fmt: skip

    def _record(self, layers: list[str], config: PreTrainedConfig) -> dict[str, Any]:
        """``adapter_config.json`` as peft writes it."""
        made = self._peft_config(meta_model(config), layers, inference_mode=True).to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in made.items()}

    @property
    def _scaling(self) -> float:
        return self.settings.alpha / self.settings.rank

    def _inject(self, model: PreTrainedModel) -> list[str]:
        layers = adapted_layers(model, self.settings.targets)
        config = self._peft_config(model, layers, inference_mode=False)
        # peft draws first values from the stream that all share; ours follow.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft_library().inject_adapter_in_model(config, model, adapter_name=_NAME)
        put = [name for name in layers if hasattr(model.get_submodule(name), "base_layer")]
        assert put == layers and all(p.requires_grad == is_adapter(name) for name, p in model.named_parameters())
        return layers

    def _peft_config(self, model: PreTrainedModel, layers: list[str], *, inference_mode: bool) -> Any:
        turned = {isinstance(_plain(model.get_submodule(name)), Conv1D) for name in layers}
        return peft_library().LoraConfig(
            r=self.settings.rank, lora_alpha=self.settings.alpha, lora_dropout=self.settings.dropout,
            target_modules=_short(layers, model), bias="none", fan_in_fan_out=turned == {True},
            task_type="CAUSAL_LM", inference_mode=inference_mode,
        )  # fmt: skip

    def _go_on(self, model: PreTrainedModel, adapter: Adapter, layers: list[str]) -> None:
        assert sorted(adapter.pairs) == sorted(layers) and adapter.scaling == self._scaling, self.start
        for name, pair in adapter.pairs.items():
            for mine, theirs in zip(self._pair(model, name), pair, strict=True):
                with torch.no_grad():
                    mine.copy_(theirs)

    def _pair(self, model: PreTrainedModel, name: str) -> tuple[Tensor, Tensor]:
        layer: Any = model.get_submodule(name)
        return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


def _plain(module: nn.Module) -> nn.Module:
    inner = getattr(module, "base_layer", module)
    assert isinstance(inner, nn.Module)
    return inner


def _short(layers: list[str], model: nn.Module) -> list[str]:
    """The last parts of the layers' names where those mean these layers and no others, as people write them."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    meant = {name for name, _ in model.named_modules() if any(_ends(name, end) for end in ends)}
    return ends if meant == set(layers) else layers


def _ends(name: str, target: str) -> bool:
    """As peft reads a list of targets."""
    return name == target or name.endswith(f".{target}")


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"lora/{seed}/{name}".encode(), digest_size=7).digest(), "big")

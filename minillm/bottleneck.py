"""A student that learns by a small MLP beside that of each block: its own weights frozen, wider where it is handed on.

y = MLP(x) + U act(D x), with the MLP's own form: U (act(Dg x) * (Du x)) where that is gated, D's bias where that has
one. A sum over units is what an MLP is, so MLP and adapter together are an MLP of more units, but for the order of sums
(parallel adapters: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning"; adapters: Houlsby
et al. 2019).

Legend: H hidden width of the model, S units of the adapter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minillm.bottleneck_adapters import BottleneckAdapter, read_bottleneck
from minillm.bottleneck_config import BottleneckConfig
from minillm.meta_models import meta_model
from minillm.mlps import MARK, Form, form_of, mlps, widened, wider_config, width_of


class Units(nn.Module):
    """Hidden units beside those of an MLP. They hear what its layers read, and what they say is added to what it says
    before anything else (dropout, say) is done to that, as if they were units of its own."""

    def __init__(self, mlp: nn.Module, form: Form, *, hidden: int, size: int) -> None:
        super().__init__()
        self.form = form
        for part in form.reads:
            own: Any = getattr(mlp, part)
            self.add_module(part, _empty(hidden, size, bias=own.bias is not None, like=own))
        self.add_module(form.writes, _empty(size, hidden, bias=False, like=getattr(mlp, form.writes)))
        self._act: tuple[nn.Module] = (getattr(mlp, form.act),)  # the MLP's own module, and no child of two parents
        self._heard: Tensor | None = None
        # Not a wrapper around the MLP: some blocks have its layers among others of theirs.
        getattr(mlp, form.reads[0]).register_forward_pre_hook(self._hear)
        getattr(mlp, form.writes).register_forward_hook(self._say)

    def forward(self, states: Tensor) -> Tensor:
        """What the units add, [..., H] of [..., H]."""
        first, *others = (self.get_submodule(part)(states) for part in self.form.reads)
        (act,) = self._act
        active: Tensor = act(first)
        for other in others:
            active = active * other
        added: Tensor = self.get_submodule(self.form.writes)(active)
        return added

    def _hear(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        (self._heard,) = inputs

    def _say(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        heard, self._heard = self._heard, None
        assert heard is not None
        added: Tensor = self(heard)
        return output + added


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """Bottleneck adapters beside all MLPs (``adaptation.Adaptation``)."""

    settings: BottleneckConfig
    seed: int
    """Key of the rows that read; the columns that write begin as 0."""
    base: str
    """The model that it is put on, as the adapter's record is to call it."""
    base_weights: str = ""
    """Fingerprint of that model, which is written beside the record; "" writes none."""
    start: Path | None = None
    """Folder of an adapter of the same model to go on from."""

    def require(self, config: PreTrainedConfig) -> None:
        """``UnsupportedCombination`` unless we know the MLPs of a model of this configuration; no weight is read."""
        form_of(config)
        mlps(meta_model(config))

    def parameters(self, config: PreTrainedConfig) -> int:
        """Weights of the adapter of a model of this configuration; no weight is read."""
        model = meta_model(config)
        self.put_on_twin(model)
        return sum(p.numel() for name, p in model.named_parameters() if self.is_adapter(name))

    def is_adapter(self, parameter: str) -> bool:
        """Whether a parameter of this name belongs to the adapter."""
        return f".{MARK}." in parameter

    def words(self, config: PreTrainedConfig) -> str:
        """What a student's card says of its adapter; ``config`` is that of the base."""
        own = width_of(config)
        return (
            f"bottleneck: {self.settings.size:,} units beside the {own:,} of each MLP, so that those of the merged "
            f"weights have {own + self.settings.size:,}; by itself in `adapter/`"
        )

    def put_on(self, model: PreTrainedModel) -> None:
        """Freezes a model's weights, whole or sharded, and puts units beside its own that train."""
        model.requires_grad_(False)
        units = self._add(model)
        if self.start is not None:
            self._go_on(units, read_bottleneck(self.start))
            return
        for mlp, added in units.items():
            for name, parameter in added.named_parameters():
                with torch.no_grad():
                    parameter.zero_()
                    if parameter.dim() > 1 and not name.startswith(f"{added.form.writes}."):
                        bound = 1 / math.sqrt(parameter.shape[1])  # Kaiming's, as nn.Linear draws it
                        draw = torch.Generator().manual_seed(_key(self.seed, f"{mlp}.{name}"))
                        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=draw))

    def put_on_twin(self, model: PreTrainedModel) -> None:
        """The same modules on a model without weights, under ``torch.device("meta")``."""
        self._add(model)

    def merged(self, state: Mapping[str, Tensor], root: nn.Module) -> dict[str, Tensor]:
        """Whole weights by a root's names, the units appended to those of its MLPs, by the names of a root without
        adapters: in 32 bits, as the units are trained."""
        modules = dict(root.named_modules())
        found = {}
        for name, weight in state.items():
            if self.is_adapter(name):
                continue
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            layer, _, kind = name.rpartition(".")
            mlp, _, part = layer.rpartition(".")
            added = state.get(f"{mlp}.{MARK}.{part}.{kind}")
            if added is not None:
                units, turned = modules[f"{mlp}.{MARK}"], isinstance(modules[layer], Conv1D)
                assert isinstance(units, Units)
                wide = widened(wide, added, writes=part == units.form.writes, turned=turned)
            found[name] = wide
        return found

    def merged_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration with MLPs that are wider by the adapter's size."""
        return wider_config(config, self.settings.size)

    def adapter(self, state: Mapping[str, Tensor], *, prefix: str, config: PreTrainedConfig) -> BottleneckAdapter:
        """The adapter among a root's whole weights; ``prefix`` is the model's own name of its backbone, ``config`` that
        of the base."""
        layers: dict[str, dict[str, Tensor]] = {}
        for name, weight in state.items():
            mlp, mark, own = name.partition(f".{MARK}.")
            if mark:
                layers.setdefault(f"{prefix}{mlp.removeprefix('backbone')}", {})[own] = weight.float()
        return BottleneckAdapter(
            base=self.base, base_weights=self.base_weights, architecture=config.model_type, hidden=config.hidden_size,
            width=width_of(config), size=self.settings.size, layers=layers, source=Path(),
        )  # fmt: skip

    def _add(self, model: PreTrainedModel) -> dict[str, Units]:
        form, found = form_of(model.config), {}
        for name, mlp in mlps(model).items():
            found[name] = Units(mlp, form, hidden=model.config.hidden_size, size=self.settings.size)
            mlp.add_module(MARK, found[name])
        return found

    def _go_on(self, units: Mapping[str, Units], adapter: BottleneckAdapter) -> None:
        assert adapter.layers.keys() == units.keys() and adapter.size == self.settings.size, self.start
        for mlp, added in units.items():
            for name, parameter in added.named_parameters():
                with torch.no_grad():
                    parameter.copy_(adapter.layers[mlp][name])


def _empty(inputs: int, outputs: int, *, bias: bool, like: Any) -> nn.Module:
    """A linear layer where another's weights are and in their precision, whole even where those are in shards; its
    values are to be set, and none is drawn from the stream that all share."""
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=bias, dtype=like.weight.dtype)
    return layer.to_empty(device=like.weight.device)


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{MARK}/{seed}/{name}".encode(), digest_size=7).digest(), "big")

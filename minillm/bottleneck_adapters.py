"""A bottleneck adapter as a folder: read without running anything in it, written, and merged into a model's MLPs.

Legend: H hidden width of the model, W units of an MLP, S units of the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.adapter_files import base_weights, json_object, tensors_of, write_base
from minillm.errors import ModelError
from minillm.mlps import FORMS, MARK, Form, mlps, widen_layer, wider_config, width_of
from minillm.model_files import BOTTLENECK_RECORD, few, require_own_files

RECORD, WEIGHTS = BOTTLENECK_RECORD, "bottleneck.safetensors"
_FIELDS: dict[str, type] = {
    "base_model_name_or_path": str,
    "model_type": str,
    "hidden_size": int,
    "intermediate_size": int,
    "size": int,
}
"""Of the record, and of what type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BottleneckAdapter:
    """Further units for each MLP of a model."""

    base: str
    """The model that it was trained on, as its record calls it; "" where it does not say."""
    architecture: str
    """That model's ``model_type``."""
    hidden: int
    width: int
    """Units of that model's MLPs."""
    size: int
    layers: Mapping[str, Mapping[str, Tensor]]
    """By the MLP's name in the model, then by the parameter's in the MLP: rows [S, H] and biases [S] of the layers that
    read, columns [H, S] of the one that writes."""
    source: Path
    base_weights: str = ""
    """Fingerprint (``loading.fingerprint``) of that model; "" where nobody wrote it down."""
    record_file: ClassVar[str] = RECORD

    @property
    def changes(self) -> int:
        """How many MLPs it makes wider."""
        return len(self.layers)

    def write(self, folder: Path) -> None:
        """Makes its folder: safetensors and JSON."""
        folder.mkdir()
        named = {f"{mlp}.{MARK}.{name}": tensor for mlp, own in self.layers.items() for name, tensor in own.items()}
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / WEIGHTS, {"format": "pt"})
        record = {
            "base_model_name_or_path": self.base, "model_type": self.architecture, "hidden_size": self.hidden,
            "intermediate_size": self.width, "size": self.size,
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        write_base(folder, self.base_weights)

    def merged_config(self, config: PreTrainedConfig, *, name: str) -> PreTrainedConfig:
        """The configuration with wider MLPs; ``ModelError`` where the adapter is of a model of other sizes."""
        got = {"model_type": self.architecture, "hidden_size": self.hidden, "intermediate_size": self.width}
        found: dict[str, Any] = {"model_type": config.model_type}
        if config.model_type == self.architecture:
            found |= {"hidden_size": config.hidden_size, "intermediate_size": width_of(config)}
        for field, value in found.items():
            if value != got[field]:
                raise ModelError(
                    f"{self.source}: was trained on a model of {field} {got[field]}, and that of {name} is {value}.\n"
                    "  name the model that it was trained on; one that it is merged into already is wider"
                )
        return wider_config(config, self.size)

    def merge_into(self, model: PreTrainedModel, *, name: str) -> None:
        """Appends its units to the MLPs of the model ``name``; ``ModelError`` where it does not fit."""
        config = self.merged_config(model.config, name=name)
        own = mlps(model)
        if own.keys() != self.layers.keys():
            raise ModelError(
                f"{self.source}: has units for {few(sorted(self.layers))}, and the MLPs of {name} are "
                f"{few(sorted(own))}.\n  it is of another model; name the one that it was trained on"
            )
        form = FORMS[self.architecture]
        for mlp, added in self.layers.items():
            for part in (*form.reads, form.writes):
                layer: Any = getattr(own[mlp], part)
                more = {key.rpartition(".")[2]: t for key, t in added.items() if key.startswith(f"{part}.")}
                if part != form.writes and ("bias" in more) != (layer.bias is not None):
                    raise ModelError(
                        f"{self.source}: {mlp}.{part} has {'a' if 'bias' in more else 'no'} bias, other than that of "
                        f"{name}.\n  it is of another model; name the one that it was trained on"
                    )
                widen_layer(layer, more, writes=part == form.writes)
        # Modules hold the configuration that they were made with, so it is changed in place.
        setattr(model.config, form.width, getattr(config, form.width))


def read_bottleneck(folder: Path) -> BottleneckAdapter:
    """An adapter from its folder: safetensors and JSON only; ``ModelError`` for anything else."""
    require_own_files(folder)  # before any of them is read
    record = json_object(folder / RECORD)
    if record.keys() != _FIELDS.keys() or any(type(record[name]) is not kind for name, kind in _FIELDS.items()):
        fields = ", ".join(f"{name} ({kind.__name__})" for name, kind in _FIELDS.items())
        raise _unfit(folder, f"the fields of {RECORD} are not {fields}")
    if record["model_type"] not in FORMS:
        raise _unfit(folder, f"{few([record['model_type']])} is none of {', '.join(FORMS)}")
    form, hidden, size = FORMS[record["model_type"]], record["hidden_size"], record["size"]
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors_of(folder, WEIGHTS, convert="copy the adapter's folder again").items():
        mlp, _, own = name.partition(f".{MARK}.")
        layers.setdefault(mlp, {})[own] = tensor
    wanted = [_shapes(form, hidden=hidden, size=size, biased=biased) for biased in (False, True)]
    for mlp, tensors in layers.items():
        if {name: tuple(t.shape) for name, t in tensors.items()} not in wanted:
            raise _unfit(folder, f"{WEIGHTS} has not {size} units of width {hidden} for {few([mlp])}")
    if not layers:
        raise _unfit(folder, f"{WEIGHTS} is empty")
    return BottleneckAdapter(
        base=record["base_model_name_or_path"], architecture=record["model_type"], hidden=hidden,
        width=record["intermediate_size"], size=size, layers=layers, source=folder, base_weights=base_weights(folder),
    )  # fmt: skip


def _shapes(form: Form, *, hidden: int, size: int, biased: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{form.writes}.weight": (hidden, size)}
    for read in form.reads:
        shapes[f"{read}.weight"] = (size, hidden)
        if biased:
            shapes[f"{read}.bias"] = (size,)
    return shapes


def _unfit(folder: Path, found: str) -> ModelError:
    return ModelError(f"{folder}: {found}.\n  wanted a bottleneck adapter as minillm wrote it; copy its folder again")

"""What is put on a frozen student so that it alone learns: one protocol, and the one place that knows its kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.adapter_files import KeptAdapter
from minillm.adapters import read_adapter
from minillm.bottleneck import Bottleneck
from minillm.bottleneck_adapters import read_bottleneck
from minillm.bottleneck_config import BottleneckConfig
from minillm.lora import Lora
from minillm.lora_config import LoraConfig
from minillm.model_files import BOTTLENECK_RECORD, adapter_record


class Adaptation(Protocol):
    """How a student's adapter is made, and what it means."""

    def require(self, config: PreTrainedConfig) -> None:
        """Raises where a model of this configuration cannot be adapted so; no weight is read."""

    def parameters(self, config: PreTrainedConfig) -> int:
        """Weights of the adapter of a model of this configuration; no weight is read."""

    def put_on(self, model: PreTrainedModel) -> None:
        """Freezes a model's weights, whole or sharded, and puts an adapter on that trains."""

    def put_on_twin(self, model: PreTrainedModel) -> None:
        """The same modules on a model without weights, under ``torch.device("meta")``."""

    def is_adapter(self, parameter: str) -> bool:
        """Whether a parameter of this name belongs to the adapter."""

    def words(self, config: PreTrainedConfig) -> str:
        """What a student's card says of its adapter; ``config`` is that of the base."""

    def merged(self, state: Mapping[str, Tensor], root: nn.Module) -> dict[str, Tensor]:
        """Whole weights by a root's names, the adapter merged into what it adapts, by the names of a root without one:
        in 32 bits, since what an adapter adds is often less than a step of 16."""

    def merged_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the model that ``merged`` gives the weights of."""

    def adapter(self, state: Mapping[str, Tensor], *, prefix: str, config: PreTrainedConfig) -> KeptAdapter:
        """The adapter among a root's whole weights; ``prefix`` is the model's own name of its backbone, ``config`` that
        of the base."""


def adaptation_of(
    settings: LoraConfig | BottleneckConfig, *, seed: int = 0, base: str = "", base_weights: str = "",
    start: Path | None = None,
) -> Adaptation:  # fmt: skip
    """What settings ask for. ``base`` is the model as the adapter's record is to call it, ``base_weights`` its
    fingerprint ("" writes none), ``start`` the folder of an adapter of the same model to go on from."""
    if isinstance(settings, BottleneckConfig):
        return Bottleneck(settings=settings, seed=seed, base=base, base_weights=base_weights, start=start)
    return Lora(settings=settings, seed=seed, base=base, base_weights=base_weights, start=start)


def kept_adapter(folder: Path) -> KeptAdapter:
    """The adapter of a folder, of the kind that ``adapter_record`` names: safetensors and JSON only; ``ModelError`` for
    anything else."""
    return read_bottleneck(folder) if adapter_record(folder) == BOTTLENECK_RECORD else read_adapter(folder)

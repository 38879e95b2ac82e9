"""What planning must know of a model, and of the run that it is in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import nn
from transformers import PreTrainedConfig

from minillm.adaptation import adaptation_of
from minillm.bottleneck_config import BottleneckConfig
from minillm.cards import Card
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.meta_models import count_parameters, meta_model
from minillm.plan.activations import Kept, kept_per_token
from minillm.shapes import config_of

Engine = Literal["zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"]
Placement = Literal["replicated", "zero3", "offload"]
ENGINES: tuple[Engine, ...] = ("zero0", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
PLACEMENTS: tuple[Placement, ...] = ("replicated", "zero3", "offload")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """One model's sizes, in numbers of weights and of tokens' widths; no bytes but those of ``kept``."""

    name: str
    parameters: int
    layers: int
    hidden: int
    vocabulary: int
    cache_width: int
    """Numbers that a token leaves in the caches of keys and values, all layers together."""
    linear_ends: int
    """Inputs and outputs of all matrices inside the layers: an adapter of rank r has r times as many weights."""
    smallest_side: int
    """Of all matrices inside the layers: no adapter needs a higher rank."""
    unit: int
    """Weights of one more hidden unit in the MLP of every layer; 0 where a bottleneck adapter cannot be put on."""
    positions: int | None
    """Longest sequence; None where the architecture sets no limit."""
    kept: dict[int, Kept]
    """What a training forward keeps, by bytes of a number."""

    @property
    def head(self) -> int:
        """Weights of the output matrix."""
        return self.vocabulary * self.hidden


def sizes_of(card: Card) -> ModelSizes:
    """A card's model, offline; ``ModelError`` where its sizes are not known."""
    return sizes_of_config(config_of(card), name=card.name)


def sizes_of_config(config: PreTrainedConfig, *, name: str) -> ModelSizes:
    """The same of a configuration."""
    model = meta_model(config)
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head = model.get_output_embeddings()
    linears: list[Any] = [module.weight for module in model.modules() if _is_matrix(module) and module is not head]
    return ModelSizes(
        name=name,
        parameters=count_parameters(model),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        vocabulary=head.weight.shape[0],
        cache_width=2 * text.num_hidden_layers * kv_heads * width,
        linear_ends=sum(int(side) for weight in linears for side in weight.shape),
        smallest_side=min((int(side) for weight in linears for side in weight.shape), default=1),
        unit=_unit(config),
        positions=getattr(config, "max_position_embeddings", None),
        kept={dtype.itemsize: kept_per_token(config, dtype) for dtype in DTYPES.values()},
    )


def _unit(config: PreTrainedConfig) -> int:
    try:
        return adaptation_of(BottleneckConfig(size=1)).parameters(config)
    except UnsupportedCombination:
        return 0


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A MiniLLM stage as memory, traffic and time see it. ``ConfigError`` where settings exclude each other."""

    student: ModelSizes
    teacher: ModelSizes
    gpus: int
    gpus_per_node: int = 8
    engine: Engine = "zero2"
    placement: Placement = "replicated"
    precision: str = "bf16"
    """What the student computes in."""
    teacher_precision: str = "bf16"
    rows: int = 256
    """Responses of a rollout, all GPUs together."""
    samples_per_prompt: int = 1
    """How many of them answer the same prompt."""
    at: int | None = None
    """The stage's place in its run's file; None of a stage that stands in none."""
    micro_batch: int = 0
    """Rows of a forward pass on each GPU; 0: all that an update has there."""
    prompt_tokens: int = 256
    new_tokens: int = 256
    inner_epochs: int = 1
    inner_batches: int = 1
    teacher_mix: float = 0.0
    lora: int = 0
    """Rank of an adapter; 0 has none."""
    bottleneck: int = 0
    """Hidden units of an adapter beside each MLP; 0 has none. Without either all weights are trained."""
    anchor: bool = False
    """Whether the student is held to a moving average of its weights (``anchor``)."""
    recompute: bool = False
    """Activation checkpointing."""
    gather: Literal["rollout", "forward"] = "rollout"
    """When a ZeRO-3 student is gathered to sample (``engine.gather``)."""
    device: Literal["cuda", "cpu"] = "cuda"

    def __post_init__(self) -> None:
        if self.student.vocabulary <= 0 or self.gpus < 1 or self.gpus_per_node < 1:
            raise ConfigError(f"gpus {self.gpus}, gpus per node {self.gpus_per_node}: wanted at least 1")
        if self.engine == "zero0" and self.precision == "bf16":
            raise ConfigError("stage zero0 with precision bf16: no 32-bit weights would be kept; take zero1 or above")
        if self.gather == "forward" and self.stage < 3:
            raise ConfigError(f"gather forward with {self.engine}: only a ZeRO-3 student is gathered; take zero3")
        if self.lora and self.bottleneck:
            raise ConfigError(f"lora {self.lora} and bottleneck {self.bottleneck}: a student learns by one adapter")
        if self.rows < self.gpus:
            raise ConfigError(
                f"batch {self.rows} over {self.gpus} GPU{'s' * (self.gpus > 1)}: wanted a row for each at least"
            )

    @property
    def stage(self) -> int:
        """The ZeRO stage of the student."""
        return int(self.engine[4])

    @property
    def offloads(self) -> bool:
        """Whether the student's optimiser lives on the host."""
        return self.engine.endswith("offload")

    @property
    def item(self) -> int:
        """Bytes of a number of the student's."""
        return DTYPES[self.precision].itemsize

    @property
    def teacher_item(self) -> int:
        """Bytes of a number of the teacher's."""
        return DTYPES[self.teacher_precision].itemsize

    @property
    def own_rows(self) -> int:
        """Responses of a rollout on one GPU, at most."""
        return -(-self.rows // self.gpus)

    @property
    def update_rows(self) -> int:
        """Rows of an update on one GPU, at most."""
        return -(-self.own_rows // self.inner_batches)

    @property
    def forward_rows(self) -> int:
        """Rows of one training forward."""
        return min(self.micro_batch or self.update_rows, self.update_rows)

    @property
    def micro_batches(self) -> int:
        """Training forwards of an update."""
        return -(-self.update_rows // self.forward_rows)

    @property
    def updates(self) -> int:
        """Updates on each rollout."""
        return self.inner_epochs * self.inner_batches

    @property
    def length(self) -> int:
        """Tokens of a row, at most."""
        return self.prompt_tokens + self.new_tokens

    @property
    def trained(self) -> int:
        """Weights that the optimiser moves."""
        adapter = self.lora * self.student.linear_ends + self.bottleneck * self.student.unit
        return adapter if self.frozen else self.student.parameters

    @property
    def frozen(self) -> bool:
        """Whether the student's own weights stay, and an adapter learns."""
        return self.lora > 0 or self.bottleneck > 0

    @property
    def teacher_forwards(self) -> float:
        """Forwards of the teacher in a rollout: at each heads of the coins and at the end."""
        return self.teacher_mix * self.new_tokens + 1

    def but(self, **changes: Any) -> Self:
        """The same with other settings."""
        return replace(self, **changes)

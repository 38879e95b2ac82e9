"""Figures of a card: a model's sizes, from which its configuration can be made without a download, and the settings
that were published for training it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from minillm.errors import ConfigError
from minillm.settings import Count, Flag, NonNegative, Positive, Settings, Share, Text, Whole

Architecture = Literal["gpt2", "opt", "llama", "qwen2", "qwen3", "gemma2", "gemma3_text"]

_USUAL = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
_HIDDEN_BY_HEADS = {name: field for name, field in _USUAL.items() if name not in {"kv_heads", "head_dim"}}
FIELDS: dict[str, dict[str, str]] = {
    "gpt2": {
        **{"layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "intermediate": "n_inner"},
        **{"vocabulary": "vocab_size", "positions": "n_positions", "tied": "tie_word_embeddings"},
    },
    "opt": {**_HIDDEN_BY_HEADS, "intermediate": "ffn_dim", "projection": "word_embed_proj_dim"},
    "llama": _USUAL,
    "qwen2": {name: field for name, field in _USUAL.items() if name != "head_dim"},
    "qwen3": _USUAL,
    "gemma2": _USUAL,
    "gemma3_text": _USUAL,
}
"""For each architecture: what its transformers configuration calls a figure. Where a figure is not here, the
architecture has no such choice; biases, norms of queries and keys, and the like follow from the architecture."""


class Figures(Settings):
    """Sizes of a model. Cards of other people's may say as much of them as they know; ``complete`` ones say enough to
    build the model's configuration."""

    architecture: Architecture | None = None
    """The transformers ``model_type``."""
    layers: Count | None = None
    """Blocks."""
    hidden: Count | None = None
    """Width of a hidden state."""
    heads: Count | None = None
    """Heads of the queries."""
    kv_heads: Count | None = None
    """Heads of keys and values; as many as ``heads`` where not given."""
    head_dim: Count | None = None
    """Width of a head; hidden / heads where not given."""
    intermediate: Count | None = None
    """Width inside the feed-forward part."""
    projection: Count | None = None
    """Width of an OPT's embeddings, where it is not that of its hidden states."""
    vocabulary: Count | None = None
    """Rows of the embedding, spare ones included."""
    positions: Count | None = None
    """Longest sequence, in tokens."""
    tied: Flag | None = None
    """Whether the head is the embedding."""
    parameters: Count | None = None
    """Published number of weights, each counted once: a tied head is none of its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.architecture is None:
            return self
        fields = FIELDS[self.architecture]
        given = self.model_dump(exclude={"architecture", "parameters"}, exclude_none=True)
        if spare := sorted(given.keys() - fields.keys()):
            raise ConfigError(f"{spare[0]}: a {self.architecture} has no such size; leave it out")
        optional = {"kv_heads", "head_dim", "projection"}
        if missing := sorted(fields.keys() - given.keys() - optional):
            raise ConfigError(f"{missing[0]}: is missing; with an architecture all of its sizes are wanted")
        heads, kv_heads = given["heads"], given.get("kv_heads", given["heads"])
        if heads % kv_heads or ("head_dim" not in given and given["hidden"] % heads):
            raise ConfigError(f"heads {heads}: do not divide (hidden {given['hidden']}, kv_heads {kv_heads})")
        return self

    @property
    def complete(self) -> bool:
        """Whether the configuration of the model can be made of them."""
        return self.architecture is not None

    def config_fields(self) -> dict[str, Any]:
        """Fields of the transformers configuration; ``complete`` must hold."""
        assert self.architecture is not None and self.heads is not None and self.hidden is not None
        values = self.model_dump(exclude_none=True)
        implied = {"kv_heads": self.heads, "head_dim": self.hidden // self.heads, "projection": self.hidden}
        fields = FIELDS[self.architecture]
        return {field: values.get(name, implied.get(name)) for name, field in fields.items()}


class SftTraining(Settings):
    """Published settings of supervised fine-tuning."""

    lr: Positive
    """Highest learning rate."""
    epochs: Count
    """Passes over the rows."""
    batch: Count
    """Rows of an optimiser step, all ranks together: it does not change with the number of GPUs."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay; the official code's default."""
    source: Text
    """Where they were published."""


class MinillmTraining(Settings):
    """Published settings of the MiniLLM stage."""

    lr: Positive = 5e-6
    """Highest learning rate."""
    warmup: Whole = 100
    """Updates over which it rises."""
    schedule: Literal["constant", "cosine"]
    """Its shape afterwards."""
    rollouts: Count = 256
    """Responses of a rollout, all ranks together."""
    batch: Count
    """Rows of an optimiser step, all ranks together: it does not change with the number of GPUs."""
    inner_epochs: Count = 4
    """Passes over each rollout."""
    updates: Count = 5000
    """Optimiser steps in all."""
    teacher_mix: Share = 0.2
    """Chance of a token being drawn from the teacher."""
    weight_decay: NonNegative = 1e-6
    """Decoupled weight decay."""
    micro_batch: Count
    """Rows of a forward pass on each rank: memory, not the result."""
    activation_checkpointing: Flag = False
    """Whether the official script recomputes activations: ``engine.activation_checkpointing``."""
    source: Text
    """Where they were published."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rollouts % self.batch:
            raise ConfigError(f"rollouts {self.rollouts}: is no multiple of batch {self.batch}")
        return self


class Training(Settings):
    """What was published on training a student."""

    sft: SftTraining
    """Fine-tuning, which comes first."""
    minillm: MinillmTraining | None = None
    """Distillation; none where nothing was published."""


PAPER_ROWS = 11_435
"""Training rows of the paper's data: databricks-dolly as its authors filtered it, less 1,000 for validation."""


def stages_yaml(training: Training, *, rows: int = PAPER_ROWS) -> str:
    """The stages of a run with these settings, and the engine's where they say more than its defaults, as they stand in
    its YAML file; ``rows`` are the training rows, from which epochs become steps."""
    sft = training.sft
    ours = training.minillm
    lines = ["engine: {activation_checkpointing: true}"] if ours is not None and ours.activation_checkpointing else []
    lines += [
        "stages:",
        f"  # {sft.source}; {sft.epochs} epochs of {rows:,} rows",
        "  - kind: sft",
        f"    steps: {-(-sft.epochs * rows // sft.batch)}",
        f"    batch: {sft.batch}",
        f"    optimiser: {{lr: {sft.lr:g}, betas: [0.9, 0.999], weight_decay: {sft.weight_decay:g}, schedule: cosine}}",
    ]
    if ours is not None:
        parts = ours.rollouts // ours.batch
        lines += [
            f"  # {ours.source}; {ours.updates:,} updates",
            "  - kind: minillm",
            "    estimator: official",
            f"    steps: {-(-ours.updates // (ours.inner_epochs * parts))}",
            f"    prompts: {ours.rollouts}",
            f"    inner_epochs: {ours.inner_epochs}",
            f"    inner_batches: {parts}",
            f"    teacher_mix: {ours.teacher_mix:g}",
            f"    lm_batch: {ours.batch}  # of data.corpus, or else of the references",
            f"    micro_batch: {ours.micro_batch}",
            f"    optimiser: {{lr: {ours.lr:g}, warmup_steps: {ours.warmup}, schedule: {ours.schedule}, "
            f"weight_decay: {ours.weight_decay:g}}}",
        ]
    return "\n".join(lines)

"""Tiny random models of published architectures, made from their configurations: nothing is read or downloaded."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from minillm.cards import BuildSpec, Card
from minillm.loading import ModelFacts, inspect, load

# Wide enough that next tokens are far from even: at the usual 0.02 every model says the same.
SPREAD = 0.2
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": SPREAD,
        "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "opt": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16,
        "max_position_embeddings": 64, "init_std": SPREAD, "dropout": 0.0, "attention_dropout": 0.0,
    },
    "llama": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 64, "initializer_range": SPREAD,
    },
    "qwen2": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": SPREAD,
    },
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


class Tiny(NamedTuple):
    """A model that can be made again and again, the same for each seed."""

    card: Card
    facts: ModelFacts

    def load(self, seed: int) -> PreTrainedModel:
        """Its random weights."""
        return load(self.card, self.facts, seed=seed)

    @property
    def ids(self) -> int:
        """How many ids it reads."""
        return int(self.facts.config.vocab_size)

    @property
    def eos(self) -> int:
        """The id that ends a response."""
        return int(self.facts.config.eos_token_id)


def tiny(family: str, *, dtype: str = "float32") -> Tiny:
    """Two layers, sixteen wide, over the ids of the embedded world."""
    build = BuildSpec(architecture=family, tokenizer="world", config=_FAMILIES[family])  # type: ignore[arg-type]
    card = Card(name=f"tiny-{family}", build=build, dtype=dtype)  # type: ignore[arg-type]
    return Tiny(card, inspect(card))

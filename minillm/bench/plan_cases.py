"""The cases of ``minillm bench plan``: engines, precisions, ranks, batches and families of two models of 23 to 46
million random weights."""

from __future__ import annotations

from pathlib import Path

from minillm.bench.plan import PlanCase

_CARD = """build:
  architecture: {architecture}
  tokenizer: world
  vocabulary: {vocabulary}
  config: {{{config}}}
notes: Random weights; only for measuring memory.
licence: none, there are no weights
"""
_LLAMA = (
    "num_attention_heads: {heads}, num_key_value_heads: {heads}, max_position_embeddings: 1024, "
    "tie_word_embeddings: true"
)
_SHAPES = {
    "student": (
        "llama", f"hidden_size: 512, num_hidden_layers: 6, intermediate_size: 1408, {_LLAMA.format(heads=8)}",
    ),
    "teacher": (
        "llama", f"hidden_size: 640, num_hidden_layers: 8, intermediate_size: 1792, {_LLAMA.format(heads=10)}",
    ),
    "student-gpt2": ("gpt2", "n_embd: 512, n_layer: 6, n_head: 8, n_positions: 1024"),
    "student-opt": (
        "opt", "hidden_size: 512, num_hidden_layers: 6, num_attention_heads: 8, ffn_dim: 2048, "
        "word_embed_proj_dim: 512, max_position_embeddings: 1024, dropout: 0.0",
    ),
    "student-qwen2": (
        "qwen2", "hidden_size: 512, num_hidden_layers: 6, num_attention_heads: 8, num_key_value_heads: 2, "
        "intermediate_size: 1408, max_position_embeddings: 1024, tie_word_embeddings: true",
    ),
}  # fmt: skip
VOCABULARY = 8192


def cases(folder: Path) -> list[tuple[str, PlanCase]]:
    """Each with its name; the cards that they name are written into ``folder``."""
    cards = {name: folder / f"{name}.yaml" for name in _SHAPES}
    for name, file in cards.items():
        architecture, config = _SHAPES[name]
        file.write_text(_CARD.format(architecture=architecture, vocabulary=VOCABULARY, config=config), encoding="utf-8")

    def case(student: str = "student", **changes: object) -> PlanCase:
        return PlanCase(teacher=str(cards["teacher"]), student=str(cards[student]), **changes)  # type: ignore[arg-type]

    return [
        ("zero0", case()),
        ("zero0, 32 rows", case(rows=32)),
        ("zero0, 32 rows, micro-batches of 8", case(rows=32, micro_batch=8)),
        ("zero1", case(engine="zero1")),
        ("zero2", case(engine="zero2")),
        ("zero3", case(engine="zero3")),
        ("zero1, bf16", case(engine="zero1", precision="bf16")),
        ("zero2, bf16", case(engine="zero2", precision="bf16")),
        ("zero0, 2 ranks", case(ranks=2)),
        ("zero1, 2 ranks", case(engine="zero1", ranks=2)),
        ("zero2, 2 ranks", case(engine="zero2", ranks=2)),
        ("zero3, 2 ranks", case(engine="zero3", ranks=2)),
        ("zero2, bf16, 2 ranks", case(engine="zero2", precision="bf16", ranks=2)),
        ("zero2, teacher mixing, 2 ranks", case(engine="zero2", teacher_mix=0.2, ranks=2)),
        ("zero2, sharded teacher, 2 ranks", case(engine="zero2", placement="zero3", ranks=2)),
        ("zero3, sharded teacher, 2 ranks", case(engine="zero3", placement="zero3", ranks=2)),
        ("gpt2, zero0, 32 rows", case("student-gpt2", rows=32)),
        ("opt, zero0, 32 rows", case("student-opt", rows=32)),
        ("qwen2, zero0, 32 rows", case("student-qwen2", rows=32)),
        ("qwen2, zero0, 16 rows of 128 and 64", case("student-qwen2", rows=16, prompt_tokens=128, new_tokens=64)),
    ]

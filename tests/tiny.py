"""Tiny pairs of models in ordinary transformers folders, and runs over them: what tests of the engine and the loop
share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minillm.config import RunConfig

FAMILIES = ("gpt2", "opt", "llama", "qwen2")
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
EOS = "<|endoftext|>"
"""By this name, because transformers adds it to the tokenizer of any folder that calls itself qwen2."""
WORDS = ["<pad>", EOS, *LETTERS]
NATS = ("reverse_kl", "forward_kl", "teacher_nll", "gold_nll")
"""What a row of samples.jsonl has from models' numbers, equal to rounding only."""
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48},
    "opt": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    },
    "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
    "qwen2": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def tokenizer(words: list[str] | None = None, *, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """One token a letter; ``pad=EOS`` makes the pad the EOS, as with GPT-2."""
    words = WORDS if words is None else words
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token=EOS))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=pad, padding_side="left")


def save_model(
    folder: Path,
    family: str,
    *,
    seed: int,
    tied: bool = True,
    rows: int | None = None,
    words: list[str] | None = None,
    positions: int = 48,
    spread: float = 0.3,
) -> Path:
    """A random model of a family in an ordinary folder; ``rows`` of the head may exceed the tokenizer's ids."""
    own = tokenizer(words, pad=EOS if family == "gpt2" else "<pad>")
    sizes = {**SIZES[family], **({} if family == "gpt2" else {"max_position_embeddings": positions})}
    if family == "qwen2":
        sizes["intermediate_size"] = 24
    config = AutoConfig.for_model(
        family,
        vocab_size=rows or len(own),
        bos_token_id=own.eos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        tie_word_embeddings=tied,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for (
                weight
            ) in model.parameters():  # at the usual 0.02 every next token is nearly uniform and nothing can be learnt
                if weight.dim() > 1:
                    weight.normal_(std=spread)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def save_prompts(file: Path, *, rows: int = 24, responses: bool = True, labelled: bool = False) -> Path:
    """Prompts of two to five letters, with a short response; ``labelled``: with one of the choices that every third
    has."""
    lines = []
    for number in range(rows):
        letters = [LETTERS[(number * 7 + step * 3) % len(LETTERS)] for step in range(2 + number % 4)]
        row: dict[str, Any] = {"id": f"row-{number}", "prompt": " ".join(letters)}
        if responses:
            row["response"] = "c d" if labelled else " ".join(reversed(letters))
        if labelled and number % 3 == 0:
            row["choices"] = ["a", "c d", "e f g"]
        lines.append(json.dumps(row))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def minillm_config(
    folder: Path, *, teacher: Path, student: Path, prompts: Path, name: str = "run", **changes: Any
) -> RunConfig:
    """A short MiniLLM run; ``changes`` replace fields of its one stage, or with ``run_`` before them, of the run."""
    stage = {
        "kind": "minillm",
        "steps": 2,
        "prompts": 8,
        "teacher_mix": 0.2,
        "optimiser": {"lr": 1e-2, "schedule": "constant"},
        **{key: value for key, value in changes.items() if not key.startswith("run_")},
    }
    run = {
        "name": name,
        "out": str(folder),
        "student": str(student),
        "teacher": str(teacher),
        "data": {"train": str(prompts), "max_prompt_tokens": 8},
        "decoding": {"max_new_tokens": 10},
        "engine": {"student": "zero0"},
        "stages": (stage,),
        **{key.removeprefix("run_"): value for key, value in changes.items() if key.startswith("run_")},
    }
    return RunConfig(**run)


def logged(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl of one kind."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]

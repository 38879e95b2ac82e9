"""Nothing is bound to the embedded world: real prompt files and byte-level models run through the same code."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minillm import distill
from minillm.config import RunConfig
from tests import tiny

DATA = Path(os.environ.get("MINILLM_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SETS = {"gsm8k": "test.jsonl.gz", "sgd_nlg": "eval.jsonl.gz"}
"""Public sets (GSM8K, MIT; Schema-Guided Dialogue as text, CC BY-SA 4.0), with the file that has references."""
MOST = 8_000
"""Training rows of a run; ``test_prompts_reading.py`` reads the files whole."""


def save_byte_model(folder: Path, texts: list[str], *, width: int, seed: int) -> Path:
    """A tiny random Llama with a byte-level tokenizer that can write any text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SETS)
def test_a_run_on_real_prompts_goes_through(tmp_path: Path, name: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"no {name} in {DATA}; set MINILLM_SHARED_DATA to a folder that has it")
    train, test = tmp_path / "train.jsonl.gz", DATA / name / SETS[name]
    with gzip.open(DATA / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = file.readlines()
    with gzip.open(train, "wt", encoding="utf-8") as file:
        file.writelines(lines[:: math.ceil(len(lines) / MOST)])  # from all over the file
    rows = [json.loads(line) for line in lines[:300]]
    texts = [f"{row['instruction']} {row['input']} {row['output']}" for row in rows]
    teacher = save_byte_model(tmp_path / "teacher", texts, width=24, seed=1)
    student = save_byte_model(tmp_path / "student", texts, width=16, seed=2)
    folder = distill(
        RunConfig(
            name="run",
            out=str(tmp_path),
            student=str(student),
            teacher=str(teacher),
            data={
                "train": str(train),
                "test": str(test),
                "test_limit": 6,
                "template": "alpaca",
                "max_prompt_tokens": 400,
                "over_long": "drop",
            },
            decoding={"max_new_tokens": 96},
            stages=(
                {"kind": "sft", "steps": 2, "batch": 4, "optimiser": {"lr": 1e-3}},
                {"kind": "minillm", "steps": 2, "prompts": 4, "optimiser": {"lr": 1e-3}},
            ),
            engine={"student": "zero0"},
            evaluation={"seeds": (1, 2), "temperatures": (1.0, 0.5), "bootstrap": 50},
        )
    )
    assert [line["stage"] for line in tiny.logged(folder)] == ["sft", "sft", "minillm", "minillm"]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["measures"]["reverse_kl"]["mean"] > 0.0
    assert "rouge_l" in results["measures"]
    assert "validity" not in results["measures"], "only the embedded world has a checker"
    assert len((folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 6 * 2 * 2
    assert AutoModelForCausalLM.from_pretrained(folder / "student").config.vocab_size == 600

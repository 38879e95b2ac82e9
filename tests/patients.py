"""Runs for the doctor: a healthy one over tiny models, and ways to make it ill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from minillm import cli
from minillm.config import dump_config
from minillm.doctor.examine import Report, examine
from minillm.doctor.findings import Finding
from tests.tiny import EOS, WORDS, minillm_config, save_model, save_prompts, tokenizer

END = "<|im_end|>"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} " + END + " {% endfor %}"
CHAT_WORDS = [*WORDS, END]


def run(*words: str) -> int:
    """The exit code of the command line with these words."""
    return cli._guarded(lambda **options: cli.app(list(words), **options))


def healthy(folder: Path, **changes: Any) -> Path:
    """A configuration file of a run with nothing wrong; ``changes`` as ``tiny.minillm_config`` takes them."""
    given = {
        "teacher": folder / "teacher",
        "student": folder / "student",
        "prompts": folder / "train.jsonl",
        **changes,
    }
    for seed, role in enumerate(("teacher", "student")):
        if not (folder / role).exists():
            save_model(folder / role, "llama", seed=seed)
    if not (folder / "train.jsonl").exists():
        save_prompts(folder / "train.jsonl")
    file = folder / "run.yaml"
    file.write_text(dump_config(minillm_config(folder / "runs", **given)), encoding="utf-8")
    return file


def chat(folder: Path, *, template: str | None = TEMPLATE, end: str = END) -> PreTrainedTokenizerFast:
    """Puts a tokenizer for chats into a model's folder, whose head must have a row for each of ``CHAT_WORDS``."""
    own = tokenizer(CHAT_WORDS)
    own.add_special_tokens({"additional_special_tokens": [END], "eos_token": end})
    own.chat_template = template
    own.save_pretrained(folder)
    return own


def begins(folder: Path, own: PreTrainedTokenizerFast | None = None) -> None:
    """Makes a folder's tokenizer put a token before each text, as those of LLaMA do."""
    own = own or tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, 1)])
    own.save_pretrained(folder)


def edited(file: Path, **values: Any) -> None:
    """Replaces fields of a JSON file; those that are None are taken out."""
    held = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps({key: value for key, value in held.items() if value is not None}), encoding="utf-8")


def copied(source: Path, target: Path) -> Path:
    """A model's folder again, to be changed."""
    return Path(shutil.copytree(source, target))


def looked_at(file: Path, overrides: Sequence[str] = (), **options: Any) -> Report:
    """What the doctor finds."""
    return examine(file, overrides, **options)


def of(report: Report, name: str) -> list[Finding]:
    """The findings of one id."""
    return [finding for finding in report.findings if finding.id == name]


def levels(report: Report, name: str) -> set[str]:
    """Their levels."""
    return {finding.level for finding in of(report, name)}

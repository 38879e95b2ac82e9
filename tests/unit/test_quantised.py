"""A teacher whose layers are kept in 8 bits: near the one in 32 bits, smaller, and never taken for it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from minillm import distill, results
from minillm.cards import Card, load_card, may_differ
from minillm.errors import ConfigError, ModelError, RunExists, UnsupportedCombination
from minillm.loading import fingerprint, inspect, load
from minillm.ranks import Ranks
from minillm.teacher_engine import Teacher
from tests import tiny

RANKS = Ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "opt"):
        tiny.save_model(folder / family, family, seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    (folder / "int8.yaml").write_text(f"{{model: {folder}/llama, quantise: int8}}\n", encoding="utf-8")
    (folder / "whole.yaml").write_text(f"model: {folder}/llama\n", encoding="utf-8")
    return folder


def card_of(folder: Path, family: str, *, quantise: bool = True) -> Card:
    return Card(name="t", model=str(folder / family), quantise="int8" if quantise else None)


def make_teacher(card: Card) -> Teacher:
    return Teacher(
        lambda: load(card, inspect(card), seed=0), ranks=RANKS, placement=card.placement, precision="fp32",
        real_ids=len(tiny.WORDS),
    )  # fmt: skip


def logits(teacher: Teacher) -> torch.Tensor:
    ids_BS = torch.arange(2, 26).view(4, 6)
    hidden_BSH, _ = teacher.reader.extend(ids_BS, torch.ones_like(ids_BS), None)
    return teacher.reader.logits(hidden_BSH.flatten(0, 1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_eight_bits_are_near_and_small(family: str, folder: Path) -> None:
    """Both probes judged it while it was made. A layer's matrix takes a quarter; embeddings and norms stay."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")
    eight, whole = (make_teacher(card_of(folder, family, quantise=quantise)) for quantise in (True, False))
    near, far = logits(eight), logits(whole)
    gap = float((near - far).abs().mean() / far.abs().mean())
    assert 0 < gap < 0.05, gap
    kept, kept_whole = eight.resident_bytes(), whole.resident_bytes()
    matrices = {name for name, p in eight.root.named_parameters() if p.dtype == torch.int8}
    quarter = sum(p.numel() for name, p in whole.root.named_parameters() if name in matrices)
    assert quarter > 0.3 * whole.parameters
    assert kept.device == kept_whole.device - 3 * quarter and kept.host == 0
    assert not any(parameter.requires_grad for parameter in eight.root.parameters())


def test_a_head_that_is_not_the_models_own_is_still_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the probe on 8 bits."""
    pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")
    from minillm.models import Head

    of_head = Head.weights
    monkeypatch.setattr(Head, "weights", lambda self: dataclasses.replace(of_head(self), scale=1.5))
    with pytest.raises(ModelError, match="transforms its logits"):
        make_teacher(card_of(folder, "llama"))


def test_a_run_learns_from_it_and_knows_it_from_the_whole_one(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")
    run = {"student": folder / "student", "prompts": folder / "prompts.jsonl"}
    done = distill(tiny.minillm_config(tmp_path, teacher=folder / "int8.yaml", **run))
    lines = tiny.logged(done)
    assert len(lines) == 2 and all(line["reverse_kl"] > 0 for line in lines)
    assert json.loads((done / "run.json").read_text(encoding="utf-8"))["versions"]["bitsandbytes"]
    (folder / "int8.yaml").write_text(f"model: {folder}/llama\n", encoding="utf-8")
    try:
        with pytest.raises(RunExists, match="made from another teacher"):
            distill(tiny.minillm_config(tmp_path, teacher=folder / "int8.yaml", **run))
    finally:
        (folder / "int8.yaml").write_text(f"{{model: {folder}/llama, quantise: int8}}\n", encoding="utf-8")


def test_the_package_of_eight_bits_is_among_the_versions_where_it_computes() -> None:
    assert "bitsandbytes" in results.with_versions({"teacher_weights": "int8:ab"})["versions"]
    for weights in ("ab", None):
        assert set(results.with_versions({"teacher_weights": weights})["versions"]) == set(results.SHOWN_PACKAGES)


def test_its_fingerprint_is_another(folder: Path) -> None:
    whole, eight = (fingerprint(card_of(folder, "llama", quantise=quantise)) for quantise in (False, True))
    assert eight == f"int8:{whole}" and may_differ(whole, eight) and not may_differ(eight, eight)
    hub = Card(name="x", model="owner/never-looked-at", quantise="int8")
    assert may_differ(fingerprint(hub), fingerprint(hub)), "a name without a revision is no proof of the same"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("placement: zero3", "with placement zero3: DeepSpeed cannot cut such weights"),
        ("placement: offload", "with placement offload"),
        ("dtype: float64", "with dtype float64"),
    ],
)
def test_what_cannot_be_together_is_refused(text: str, words: str, tmp_path: Path) -> None:
    card = tmp_path / "x.yaml"
    card.write_text(f"{{model: m, quantise: int8, {text}}}\n", encoding="utf-8")
    with pytest.raises(UnsupportedCombination, match=words):
        load_card(str(card), kind="teachers")


def test_a_student_in_eight_bits_is_refused(folder: Path, tmp_path: Path) -> None:
    run = {"teacher": folder / "whole.yaml", "prompts": folder / "prompts.jsonl"}
    with pytest.raises(UnsupportedCombination, match="quantise is a teacher's setting"):
        distill(tiny.minillm_config(tmp_path, student=folder / "int8.yaml", **run))


def test_without_the_package_it_is_refused_before_a_model_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    run = {"student": folder / "student", "prompts": folder / "prompts.jsonl"}
    with pytest.raises(ConfigError, match=r"pip install 'minillm\[quantised\]'"):
        distill(tiny.minillm_config(tmp_path, teacher=folder / "int8.yaml", **run))

"""Activation checkpointing changes memory and nothing else.

1. Losses, gradients and updates are the same bits, at every engine, with and without dropout, packed rows included.
2. Between the passes fewer bytes are kept, and dropout stays as it was.
3. Rollouts do not know of it.
4. A model without layers that can be computed again is refused before its weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CTRLConfig

from minillm import recompute
from minillm.cards import Card
from minillm.config import OptimiserConfig
from minillm.errors import UnsupportedCombination
from minillm.loading import inspect, load
from minillm.models import CausalLM
from minillm.pairs import check_pair
from minillm.probes import probe_packing
from minillm.ranks import Ranks
from minillm.student_engine import Student
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_scatter_tensor.*:FutureWarning")  # DeepSpeed's own

REAL = len(tiny.WORDS)
IDS_BL = torch.arange(2, 2 + 48).reshape(3, 16) % (REAL - 2) + 2
MASK_BL = torch.arange(16) < torch.tensor([[16], [9], [5]])
ENGINES = [
    *((engine, "fp32") for engine in ("zero0", "zero1", "zero2", "zero3", "zero2-offload")),
    *(("zero1", "bf16"), ("zero3-offload", "bf16")),
]
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.save_model(top / family, family, seed=2)
    return top


def inputs() -> dict[str, Any]:
    return {
        "ids_BL": IDS_BL, "mask_BL": MASK_BL, "predict_BL": MASK_BL & (torch.arange(16) > 1), "wanted": ("logq",),
        "loss": lambda numbers, _: -numbers["logq"].sum() / 20,
    }  # fmt: skip


def root_of(folder: Path, family: str, *, again: bool, dropout: bool = False) -> CausalLM:
    root = CausalLM(AutoModelForCausalLM.from_pretrained(folder / family)).eval()
    probe_packing(root, name="it")
    if again:
        assert recompute.recompute_layers(root.backbone) == LAYERS
    return root.train(dropout)


def gradients(root: CausalLM) -> tuple[Tensor, dict[str, Tensor], int]:
    """A loss, the gradient of every weight, and the bytes that are kept for the backward pass, weights left out."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in root.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = root("train", **inputs())
    loss.backward()
    return (
        loss.detach(),
        {name: p.grad for name, p in root.named_parameters() if p.grad is not None},
        sum(kept.values()),
    )


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_losses_and_gradients_are_the_same_bits(folder: Path, family: str, dropout: bool) -> None:
    """Of packed rows; and with dropout its masks."""
    plain, again = (gradients(root_of(folder, family, again=it, dropout=dropout)) for it in (False, True))
    assert torch.equal(plain[0], again[0]) and plain[1].keys() == again[1].keys()
    for name, gradient in plain[1].items():
        assert torch.equal(gradient, again[1][name]), name


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fewer_activations_are_kept(folder: Path, family: str) -> None:
    """Less than half of the bytes, in a model of two layers, its loss included."""
    plain, again = (gradients(root_of(folder, family, again=it))[2] for it in (False, True))
    assert 0 < again < plain / 2


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_that_is_off_stays_off(folder: Path, family: str) -> None:
    """transformers' own switch wants training mode, which is the control: there these models have dropout."""
    losses = [gradients(root_of(folder, family, again=True, dropout=dropout))[0] for dropout in (False, True)]
    assert torch.equal(losses[0], gradients(root_of(folder, family, again=False))[0])
    assert not torch.equal(losses[0], losses[1])


def student(folder: Path, engine: str, *, again: bool, dropout: bool = False, precision: str = "fp32") -> Student:
    card = Card(name="it", model=str(folder / ("gpt2" if dropout else "llama")))
    return Student(
        lambda: load(card, inspect(card), seed=0), ranks=Ranks(), settings=engine, precision=precision,
        optimiser=OptimiserConfig(lr=1e-2, schedule="constant"), updates=9, real_ids=REAL, dropout=dropout,
        recompute=again,
    )  # fmt: skip


def trained(it: Student) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    """Losses and norms of three updates of two micro-batches, and the weights."""
    updates = [it.update([lambda: it.loss(**inputs())[0]] * 2) for _ in range(3)]
    weights = it.state()
    it.close()
    return updates, weights


@pytest.mark.parametrize(("engine", "precision"), ENGINES)
def test_updates_are_the_same_bits_at_every_engine(folder: Path, engine: str, precision: str) -> None:
    dropout = engine in ("zero1", "zero3")
    plain, again = (
        trained(student(folder, engine, again=it, dropout=dropout, precision=precision)) for it in (False, True)
    )
    assert plain[0] == again[0]
    assert all(torch.equal(weight, again[1][name]) for name, weight in plain[1].items())


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one with every layer that will be computed again."""
    calls: list[int] = []
    inner = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda *inputs, **more: calls.append(1) or inner(*inputs, **more))
    yield calls


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_rollouts_do_not_know_of_it(folder: Path, engine: str, counted: list[int]) -> None:
    it = student(folder, engine, again=True)
    with it.whole() as reader:
        hidden_BSH, cache = reader.extend(IDS_BL, MASK_BL, None)
        longer_BSH, _ = reader.extend(IDS_BL[:, :1], torch.cat([MASK_BL, MASK_BL[:, :1]], dim=1), cache)
    assert hidden_BSH.shape[1] == 16 and longer_BSH.shape[1] == 1 and counted == []
    it.loss(**inputs())
    assert len(counted) == LAYERS, "the control: a forward that learns does"
    it.close()


def test_a_model_without_such_layers_is_refused(folder: Path) -> None:
    config = CTRLConfig(n_layer=1, n_embd=8, n_head=1, dff=8, vocab_size=9)
    with pytest.raises(UnsupportedCombination, match=r"CTRLLMHeadModel .* set engine.activation_checkpointing: false"):
        recompute.require_layers(config, name="it")


def test_a_run_asks_before_it_reads_weights(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr("minillm.pairs.require_layers", lambda config, name: asked.append(config.model_type))
    run = {"teacher": folder / "llama", "student": folder / "llama", "prompts": tmp_path / "none.jsonl"}
    for engine in ({"activation_checkpointing": True}, {}):
        check_pair(tiny.minillm_config(tmp_path, **run, run_engine={"student": "zero2", **engine}))
    assert asked == ["llama"]

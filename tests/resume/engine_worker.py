"""One rank of the tests of an engine's state: trains, saves and trains on; or restores, in a fresh process, and trains.

``save CELL`` makes three updates, a checkpoint and three more; ``resume CELL SOURCE`` goes on from the checkpoint of
``save`` by SOURCE (CELL@RANKS) with three updates. Both leave what they have met in files of the folder. At last
``save`` poisons updates of the last rank.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minillm.adaptation import adaptation_of
from minillm.bottleneck_config import BottleneckConfig
from minillm.cards import Card
from minillm.checkpoints import Checkpoints
from minillm.config import OptimiserConfig
from minillm.engine_state import layout_of
from minillm.errors import NonFinite
from minillm.loading import inspect, load
from minillm.lora_config import LoraConfig
from minillm.lost import leave
from minillm.ranks import Ranks
from minillm.student_engine import Student
from tests import tiny

BEFORE, AFTER, ROWS, COLUMNS = 3, 3, 6, 7
VOCABULARY = 29
"""Odd, and so no rank's share begins with a row."""


FAMILIES = {True: "gpt2", False: "llama"}
"""gpt2 has dropout; llama has no biases of keys, whose gradient is rounding alone and which Adam steps all the same."""


@dataclass(frozen=True)
class Cell:
    """One kind of engine."""

    settings: str
    precision: str = "fp32"
    optimiser: str = "adamw"
    dropout: bool = True
    lora: bool = False
    bottleneck: bool = False


CELLS = {
    "zero0": Cell("zero0", dropout=False),
    "zero0-muon": Cell("zero0", optimiser="muon"),
    "zero0-lora": Cell("zero0", dropout=False, lora=True),
    "zero2-lora": Cell("zero2", lora=True),
    "zero3-lora": Cell("zero3", "bf16", lora=True),
    "zero0-bottleneck": Cell("zero0", dropout=False, bottleneck=True),
    "zero2-bottleneck": Cell("zero2", bottleneck=True),
    "zero3-bottleneck": Cell("zero3", "bf16", bottleneck=True),
    "zero1": Cell("zero1"),
    "zero1-bf16": Cell("zero1", "bf16"),
    "zero2": Cell("zero2", dropout=False),
    "zero2-bf16": Cell("zero2", "bf16"),
    "zero2-robin": Cell("zero2-robin", dropout=False),
    "zero3": Cell("zero3", dropout=False),
    "zero3-bf16": Cell("zero3", "bf16"),
    "zero3-groups": Cell("zero3-groups", "bf16"),
    "zero1-offload": Cell("zero1-offload", "bf16"),
    "zero2-offload": Cell("zero2-offload", dropout=False),
    "zero2-offload-bf16": Cell("zero2-offload", "bf16"),
    "zero3-offload": Cell("zero3-offload", dropout=False),
    "zero3-offload-bf16": Cell("zero3-offload", "bf16"),
    "zero3-param": Cell("zero3-param", "bf16"),
}
"""Without dropout, whose masks are of the rank, where numbers of ranks are compared."""
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "zero2-robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    "zero1-offload": {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    "zero3-param": {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
    # Small parameters stay gathered between forwards, and the optimiser steps each group in several parts.
    "zero3-groups": {
        "zero_optimization": {
            "stage": 3, "memory_efficient_linear": False, "stage3_param_persistence_threshold": 200,
            "sub_group_size": 600,
        }
    },
}  # fmt: skip


def write_inputs(folder: Path) -> None:
    """The models that engines start from, and the engine files of OWN_SETTINGS."""
    for dropout, family in FAMILIES.items():
        tiny.save_model(folder / family, family, seed=2, rows=VOCABULARY, tied=dropout)
    for name, settings in OWN_SETTINGS.items():
        (folder / f"{name}.json").write_text(json.dumps(settings), encoding="utf-8")


def student(folder: Path, cell: Cell, ranks: Ranks) -> Student:
    """A fresh engine."""
    card = Card(name="it", model=str(folder / FAMILIES[cell.dropout]))
    settings = str(folder / f"{cell.settings}.json") if cell.settings in OWN_SETTINGS else cell.settings
    adapter = LoraConfig(rank=3, alpha=6) if cell.lora else BottleneckConfig(size=3) if cell.bottleneck else None
    optimiser = OptimiserConfig(name=cell.optimiser, lr=1e-2, schedule="linear", warmup_steps=2, clip_grad=1.0)
    return Student(
        lambda: load(card, inspect(card), seed=0), ranks=ranks, settings=settings, precision=cell.precision,
        optimiser=optimiser, updates=10, real_ids=VOCABULARY, dropout=cell.dropout, seed=5, name="it",
        adaptation=None if adapter is None else adaptation_of(adapter, seed=5, base=str(card.model)),
    )  # fmt: skip


POISONS = {
    "gradient inf": (1.0, math.inf),
    "gradient nan": (1.0, math.nan),
    "loss inf": (math.inf, 1.0),
    "loss nan": (math.nan, 1.0),
}
"""What the last rank's last micro-batch multiplies: its loss, and the gradient of a loss that stays."""


class Poisoned(torch.autograd.Function):
    """Numbers as they are, whose gradient is another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return from_above * ctx.factor, None


def learn(it: Student, update: int, *, poison: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """One update of six rows of letters, in two micro-batches; its loss and norm."""
    draw = torch.Generator().manual_seed(100 + update)
    ids_BL = torch.randint(2, VOCABULARY - 1, (ROWS, COLUMNS), generator=draw)
    mine = ids_BL[it.ranks.rank :: it.ranks.size]

    def loss_of(rows_BL: Tensor, value: float = 1.0, slope: float = 1.0) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            return value * it.loss(
                ids_BL=rows_BL, mask_BL=torch.ones_like(rows_BL, dtype=torch.bool),
                predict_BL=torch.arange(COLUMNS).expand_as(rows_BL) > 1, wanted=("logq",),
                loss=lambda numbers, _: -Poisoned.apply(numbers["logq"], slope).sum() / (ROWS * (COLUMNS - 2)),
            )[0]  # fmt: skip

        return loss

    losses = [loss_of(part) for part in mine.chunk(2)]
    if it.ranks.rank == it.ranks.size - 1:
        losses[-1] = loss_of(mine.chunk(2)[-1], *poison)
    return it.update(losses)


def refused(it: Student) -> dict[str, Any]:
    """What each poison was answered with, and what it left otherwise than it was."""
    found = {}
    for name, poison in POISONS.items():
        it._engine.optimizer.zero_grad()  # each poison by itself
        before, words = kept(it), "no error"
        try:
            learn(it, it.updates_done, poison=poison)
        except NonFinite as error:
            words = str(error)
        after = kept(it)
        found[name] = {"words": words, "changed": [key for key, value in before.items() if after[key] != value]}
    return found


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def kept(it: Student) -> dict[str, str]:
    """A hash of all that this rank keeps between updates: pieces and moments, what the forward computes with, and
    counts."""
    found = {}
    for piece in layout_of(it._engine).pieces:
        found |= {f"{key}/{piece.name}+{piece.start}": sha256(t) for key, t in piece.tensors().items()}
        found[f"steps/{piece.name}"] = repr(piece.steps())
    for name, parameter in it.root.named_parameters():
        shard = getattr(parameter, "ds_tensor", parameter).detach().reshape(-1)
        if hasattr(parameter, "ds_tensor"):  # the last rank's may end in memory that nobody has written
            shard = shard[: max(0, parameter.ds_numel - it.ranks.rank * len(shard))]
        found[f"shard/{name}"] = sha256(shard)
    return found | {"updates_done": repr(it.updates_done), "monitored": repr(it._engine.global_steps)}


def whole(it: Student) -> dict[str, Tensor]:
    """All ranks' pieces put together, by kind and parameter."""
    layout = layout_of(it._engine)
    pieces = it.ranks.gather_objects(
        [(p.name, p.start, key, t.clone()) for p in layout.pieces for key, t in p.tensors().items()]
    )
    found: dict[str, Tensor] = {}
    for name, start, key, tensor_N in pieces:
        shape = layout.shapes[name]
        flat = found.setdefault(f"{key}/{name}", torch.full(shape, torch.nan)).view(-1)
        flat[start : start + len(tensor_N)] = tensor_N
    return found


def train(it: Student, updates: range) -> list[dict[str, str]]:
    """The trace: after each update, the hashes of everything, the loss and the norm; at last the gathered weights."""
    trace = []
    for update in updates:
        loss, norm = learn(it, update)
        trace.append(kept(it) | {"loss": loss.hex(), "norm": norm.hex(), "rate": it.learning_rate.hex()})
    return [*trace, {name: sha256(weight) for name, weight in it.state().items()}]


def keep(folder: Path, name: str, it: Student) -> None:
    """All that the ranks have together, as a file."""
    tensors = whole(it)
    if it.ranks.first:
        save_file(tensors, folder / f"{name}.safetensors")


def require_gathered(it: Student) -> None:
    """The pieces put together are the weights that the engine itself gathers."""
    tensors, gathered = whole(it), it._gathered(dict(it.root.named_parameters()))
    for name in layout_of(it._engine).shapes if it.ranks.first else ():
        assert torch.equal(tensors[f"weight/{name}"].to(gathered[name].dtype), gathered[name]), name


def store(folder: Path, name: str, ranks: Ranks) -> Checkpoints:
    """The checkpoints of one engine."""
    return Checkpoints(folder / name, ranks=ranks, say=lambda line: None)


def main(folder: Path, tasks: list[str]) -> None:
    """Makes one task after the other."""
    ranks = Ranks(threads=1)
    gc.freeze()  # making an engine collects garbage many times, and most of what it would look through is imports
    for task in tasks:
        work(folder, task, ranks)
    gc.unfreeze()


def work(folder: Path, task: str, ranks: Ranks) -> None:
    """Makes one task."""
    kind, cell, *source = task.split()
    name = f"{cell}@{ranks.size}"
    told: dict[str, Any] = {}
    it = student(folder, CELLS[cell], ranks)
    if kind == "save":
        train(it, range(BEFORE))
        store(folder, name, ranks).save(step=BEFORE, stage="it", fingerprints={}, files=it.state_files())
    else:
        name += f"-from-{source[0]}"
        checkpoint = store(folder, source[0], ranks).choose(True)
        assert checkpoint is not None
        told["differences"] = it.restore(checkpoint)
    told["at"] = kept(it)
    keep(folder, f"{name}.at", it)
    told["trace"] = train(it, range(BEFORE, BEFORE + AFTER))
    (folder / f"{name}.{ranks.rank}.json").write_text(json.dumps(told), encoding="utf-8")
    keep(folder, f"{name}.end", it)
    require_gathered(it)
    if kind == "save":
        (folder / f"{name}.refused.{ranks.rank}.json").write_text(json.dumps(refused(it)), encoding="utf-8")
    it.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)  # left to the end of Python, gloo sometimes aborts

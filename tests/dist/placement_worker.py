"""One rank of the placement test: what sharded teachers keep and gather, and whole runs with each of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed.comm.comm
import torch

from minillm import distill
from minillm.cards import SHARDED, load_card
from minillm.loading import inspect, load
from minillm.lost import leave
from minillm.ranks import Ranks
from minillm.teacher_engine import Teacher
from tests import quick, tiny
from tests.dist import parity_worker

RUNS = ("zero2.offload", "zero3.offload", "zero2.zero3")
"""Of ``parity_worker.config``."""


def write_inputs(folder: Path) -> None:
    """Those of the parity test, and a teacher with an untied head."""
    parity_worker.write_inputs(folder)
    tiny.save_model(folder / "untied", "llama", seed=3, tied=False)
    for placement in SHARDED:
        (folder / f"untied-{placement}.yaml").write_text(f"{{model: {folder}/untied, placement: {placement}}}\n")


def make_teacher(folder: Path, name: str, ranks: Ranks) -> Teacher:
    """The teacher of a card in the folder."""
    card = load_card(str(folder / f"{name}.yaml"), kind="teachers")
    return Teacher(
        lambda: load(card, inspect(card), seed=0), ranks=ranks, placement=card.placement, precision="fp32",
        real_ids=len(tiny.WORDS),
    )  # fmt: skip


class Spy:
    """Counts gathers of tensors where DeepSpeed hands them to torch, whoever asks for them."""

    def __init__(self) -> None:
        backend: Any = deepspeed.comm.comm.cdb
        self.calls = self.bytes = 0
        self._gather = backend.all_gather_into_tensor
        backend.all_gather_into_tensor = self

    def __call__(self, output_tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        self.bytes += output_tensor.numel() * output_tensor.element_size()
        return self._gather(output_tensor, *arguments, **options)

    def take(self) -> list[int]:
        """Calls and bytes of the gathered tensors since the last time."""
        taken = [self.calls, self.bytes]
        self.calls = self.bytes = 0
        return taken


def readings(teacher: Teacher, spy: Spy) -> dict[str, dict[str, Any]]:
    """What every way to read a teacher gathers: by its own count, and by the spy's."""
    ids_BS = torch.arange(2, 8)[None]
    there_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    hidden_BSH, _ = teacher.reader.extend(ids_BS, there_BS, None)

    def head() -> None:
        with teacher.head() as weights:
            assert weights.weight_VH.shape[0] == len(tiny.WORDS)

    ways = {
        "extend": lambda: teacher.reader.extend(ids_BS, there_BS, None),
        "read": lambda: teacher.reader.read(ids_BS, there_BS),
        "logits": lambda: teacher.reader.logits(hidden_BSH[0]),
        "head": head,
        "nothing": lambda: None,
    }
    found = {}
    for turn in range(2):  # the second time DeepSpeed knows the way
        for name, way in ways.items():
            teacher.traffic(), spy.take()
            way()
            found[f"{name}-{turn}"] = {"told": teacher.traffic(), "seen": spy.take()}
    return found


if __name__ == "__main__":
    folder, everyone = Path(sys.argv[1]), Ranks()
    spy = Spy()
    for name in (f"untied-{placement}" for placement in SHARDED):
        teacher = make_teacher(folder, name, everyone)
        record = {"readings": readings(teacher, spy), "kept": teacher.kept_record()}
        (folder / f"{name}.{everyone.rank}.json").write_text(json.dumps(record), encoding="utf-8")
        teacher.close()
    for name in RUNS:
        with quick.undrawn():
            quick.short_collections()
            distill(parity_worker.config(folder, name))
    leave(0)  # left to the end of Python, gloo sometimes aborts

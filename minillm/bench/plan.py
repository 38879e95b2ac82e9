"""What a real step takes of memory, phase by phase, against ``minillm.plan``.

On a CPU the high-water mark of the resident set is measured, in processes of their own whose allocator gives large
tensors back at once; models that are warmed up on before are small. On a GPU it is torch's allocator that is asked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillm.bench.scale_worker import LAST_LINES, WorkerLost
from minillm.cards import load_card
from minillm.plan.memory import Memory, memory_of
from minillm.plan.sizes import Engine, Placement, Work, sizes_of

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""For glibc: one arena, and what is freed goes back to the system."""
MEASURED = ("rollout", "scoring", "update")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCase:
    """A step of two models that are built, on so many ranks of this machine."""

    teacher: str
    student: str
    engine: Engine = "zero0"
    placement: Placement = "replicated"
    precision: str = "fp32"
    ranks: int = 1
    rows: int = 8
    """Responses of a rollout on each rank."""
    micro_batch: int = 0
    prompt_tokens: int = 32
    new_tokens: int = 32
    teacher_mix: float = 0.0

    def work(self, *, device: Any) -> Work:
        """The same as a plan's input."""
        return Work(
            student=sizes_of(load_card(self.student, kind="students")),
            teacher=sizes_of(load_card(self.teacher, kind="teachers")),
            gpus=self.ranks, gpus_per_node=self.ranks, engine=self.engine, placement=self.placement,
            precision=self.precision, teacher_precision=self.precision, rows=self.rows * self.ranks,
            micro_batch=self.micro_batch, prompt_tokens=self.prompt_tokens, new_tokens=self.new_tokens,
            inner_epochs=2, teacher_mix=self.teacher_mix, device=device,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFigures:
    """Bytes of rank 0, planned and measured."""

    case: PlanCase
    planned: dict[str, int]
    measured: dict[str, int]

    @property
    def off(self) -> float:
        """How far the planned peak is from the measured one, as a share of the measured one."""
        return max(self.planned.values()) / max(self.measured.values()) - 1


def phases_of(memory: Memory) -> dict[str, int]:
    """The peaks of the phases that can be told apart from outside."""
    peaks = memory.peaks
    update = max(peaks["forward"], peaks["backward"], peaks["step"])
    return {"rollout": peaks["rollout"], "scoring": peaks["scoring"], "update": update}


def measure_plan(case: PlanCase, *, steps: int = 2) -> PlanFigures:
    """Plans the case, and runs it on GPUs where there are any; ``WorkerLost`` where a process ends before it has
    answered."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    planned = phases_of(memory_of(case.work(device=device)))
    return PlanFigures(case=case, planned=planned, measured=_run(case, steps=steps))


def _run(case: PlanCase, *, steps: int) -> dict[str, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        workers = [_Worker(case, rank=rank, port=port, steps=steps, folder=Path(folder)) for rank in range(case.ranks)]
        try:
            for worker in workers:
                worker.wait()
            found: dict[str, int] = json.loads(Path(folder, "0.json").read_text(encoding="utf-8"))
        finally:
            for worker in workers:
                worker.end()
    return found


class _Worker:
    """A rank in a process of its own."""

    def __init__(self, case: PlanCase, *, rank: int, port: int, steps: int, folder: Path) -> None:
        environment = {**os.environ, **ALLOCATOR, "LOCAL_RANK": str(rank)}
        if case.ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = json.dumps({**dataclasses.asdict(case), "steps": steps})
        self._log = folder / f"{rank}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "minillm.bench.plan_worker", words, str(folder / f"{rank}.json")],
                env=environment, stdout=log, stderr=log,
            )  # fmt: skip

    def wait(self) -> None:
        """Until it is done; ``WorkerLost`` if it failed."""
        if code := self._process.wait():
            last = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            said = "".join(f"\n  | {line}" for line in last)
            raise WorkerLost(f"a process of the measurement ended with code {code}. Its last words:{said}")

    def end(self) -> None:
        """It is gone afterwards."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

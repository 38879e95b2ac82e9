"""Whether the run's hungriest stage fits into the memory that is there, as `minillm plan` counts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from minillm.config import MinillmStage, RunConfig
from minillm.doctor.findings import Finding, note, ok, warning
from minillm.doctor.patient import Model, Patient
from minillm.plan.advice import RESERVE
from minillm.plan.memory import Memory, memory_of
from minillm.plan.sizes import GIB, Engine, Work, sizes_of_config

LIBRARIES = 640 * 2**20
"""What a process has of torch, transformers and DeepSpeed before any model."""


def memory(patient: Patient) -> Iterator[Finding]:
    """The peak of a MiniLLM step against a GPU's memory, or that of all ranks against the machine's."""
    stages = [stage for stage in patient.config.stages if isinstance(stage, MinillmStage)]
    if not stages or patient.student is None or patient.teacher is None:
        yield ok("memory", "no minillm stage, for which alone it is planned")
        return
    engine = Path(patient.config.engine.student).name.removesuffix(".json")
    if engine not in get_args(Engine):
        yield note(
            "memory", f"engine.student {patient.config.engine.student!r} is your own file",
            why="what DeepSpeed takes by it cannot be planned", mend="see what the first steps take",
        )  # fmt: skip
        return
    models = patient.student, patient.teacher
    works = [
        work_of(patient.config, stage, *models, ranks=patient.ranks, ranks_here=patient.ranks_here) for stage in stages
    ]
    plans = [memory_of(work) for work in works]
    worst = max(plans, key=lambda one: one.peak)
    yield _judged(worst, ranks=patient.ranks_here)


def work_of(
    config: RunConfig, stage: MinillmStage, student: Model, teacher: Model, *, ranks: int, ranks_here: int
) -> Work:
    """A stage as the planner sees it; the longest prompts and responses that the run allows."""
    card = teacher.card
    return Work(
        student=sizes_of_config(student.facts.config, name=student.card.name),
        teacher=sizes_of_config(teacher.facts.config, name=card.name), gpus=ranks, gpus_per_node=ranks_here,
        engine=Path(config.engine.student).name.removesuffix(".json"), placement=card.placement,  # type: ignore[arg-type]
        precision=config.engine.precision, teacher_precision="bf16" if card.dtype == "bfloat16" else "fp32",
        rows=max(ranks, stage.prompts * stage.samples_per_prompt), micro_batch=stage.micro_batch,
        prompt_tokens=config.data.max_prompt_tokens, new_tokens=config.decoding.max_new_tokens,
        inner_epochs=stage.inner_epochs, inner_batches=stage.inner_batches, teacher_mix=stage.teacher_mix,
        lora=0 if config.lora is None else config.lora.rank, recompute=config.engine.activation_checkpointing,
        gather=config.engine.gather,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )  # fmt: skip


def _judged(plan: Memory, *, ranks: int) -> Finding:
    if torch.cuda.is_available():
        there = int(torch.cuda.get_device_properties(0).total_memory * (1 - RESERVE))
        wanted, whose = plan.peak, "of this GPU"
    else:
        there = _available()
        wanted, whose = ranks * (plan.peak + LIBRARIES), "of this machine"
    found = (
        f"{wanted / GIB:.1f} GiB in the phase '{plan.worst}' with rows of full length on {ranks} "
        f"rank{'s' if ranks > 1 else ''}, of {there / GIB:.1f} GiB {whose} that are free"
    )
    if wanted <= there:
        return ok("memory", found)
    return warning(
        "memory", found, why="the run may break off in its first steps, or later, when rows are long",
        mend="minillm plan --gpus N --gpu-memory G says what would make it fit: a smaller micro_batch, "
        "engine.activation_checkpointing, a higher ZeRO stage, placement: zero3 or offload for the teacher",
    )  # fmt: skip


def _available() -> int:
    """Bytes of memory that processes may still take; what the system says, where it says nothing all that there is."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 2**62
    sizes = dict(line.split(":", 1) for line in lines)
    return int(sizes.get("MemAvailable", f"{2**52}").split()[0]) * 1024

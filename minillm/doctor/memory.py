"""Whether the run's hungriest stage fits into the memory that is there, as `minillm plan` counts it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from minillm.config import MinillmStage
from minillm.doctor.findings import Finding, note, ok, warning
from minillm.doctor.patient import Model, Patient
from minillm.plan.advice import RESERVE
from minillm.plan.memory import Memory, memory_of
from minillm.plan.of_run import engine_of, hungriest, work_of
from minillm.plan.sizes import GIB, ModelSizes, sizes_of_config

LIBRARIES = 640 * 2**20
"""What a process has of torch, transformers and DeepSpeed before any model."""


def memory(patient: Patient) -> Iterator[Finding]:
    """The peak of a MiniLLM step against a GPU's memory, or that of all ranks against the machine's."""
    stages = [stage for stage in patient.config.stages if isinstance(stage, MinillmStage)]
    if not stages or patient.student is None or patient.teacher is None:
        yield ok("memory", "no minillm stage, for which alone it is planned")
        return
    if engine_of(patient.config) is None:
        yield note(
            "memory", f"engine.student {patient.config.engine.student!r} is your own file",
            why="what DeepSpeed takes by it cannot be planned", mend="see what the first steps take",
        )  # fmt: skip
        return
    student, teacher = (_sizes(model) for model in (patient.student, patient.teacher))
    works = [
        work_of(
            patient.config, stage, student=student, teacher=teacher, card=patient.teacher.card, gpus=patient.ranks,
            gpus_per_node=patient.ranks_here, device="cuda" if torch.cuda.is_available() else "cpu",
        )
        for stage in stages
    ]  # fmt: skip
    yield _judged(memory_of(hungriest(works)), ranks=patient.ranks_here)


def _sizes(model: Model) -> ModelSizes:
    return sizes_of_config(model.facts.config, name=model.card.name)


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
        mend="minillm plan --config FILE --gpus N --gpu-memory G says what would make it fit: a smaller micro_batch, "
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

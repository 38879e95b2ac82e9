"""One rank of the rollout test: decodes its share of 16 prompts in every cell named on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


from minillm.cards import Card
from minillm.config import MinillmStage, OptimiserConfig
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.loading import inspect, load
from minillm.lost import leave
from minillm.objectives import Minillm
from minillm.ranks import Ranks
from minillm.types import Decoding, Ids, Prompt, Targets
from tests import tiny

ROWS, LONGEST, GROUPS = 16, 12, 3
STREAMED = "-streamed"
IDS = Ids(eos=(1, 2, 3, 4), pad=0)
Spoken = dict[str, dict[str, Any]]


def write_inputs(folder: Path) -> None:
    """Two models."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)


def prompts() -> list[Prompt]:
    """Of two to five tokens, some of which end rows elsewhere."""
    return [
        Prompt(uid=f"row-{n}", text="", ids=tuple(1 + (n * 7 + step * 3) % 27 for step in range(2 + n % 4)))
        for n in range(ROWS)
    ]


def cell_of(name: str) -> tuple[torch.dtype, str, float]:
    """dtype, placement of the teacher and its share of a cell such as ``float64-replicated-0.2``."""
    dtype, placement, mix = name.removesuffix(STREAMED).split("-")
    return getattr(torch, dtype), placement, float(mix)


def speak(folder: Path, cell: str, ranks: Ranks) -> Spoken:
    """What MiniLLM's own ``collect`` has each of this rank's rows say, and the states that it keeps of both models."""
    dtype, placement, mix = cell_of(cell)
    cards = {name: Card(name=name, model=str(folder / name)) for name in ("teacher", "student")}
    stage = MinillmStage(
        steps=1,
        prompts=ROWS,
        teacher_mix=mix,
        coin_groups=GROUPS,
        importance="per_step",
        optimiser=OptimiserConfig(lr=1e-3),
    )
    teacher = Teacher(
        lambda: load(cards["teacher"], inspect(cards["teacher"]), seed=0, dtype=dtype),
        ranks=ranks,
        placement=placement,
        precision="fp32",
        real_ids=len(tiny.WORDS),
    )
    student = Student(
        lambda: load(cards["student"], inspect(cards["student"]), seed=0, dtype=dtype),
        ranks=ranks,
        settings="zero0",
        precision="fp32",
        optimiser=stage.optimiser,
        updates=1,
    )
    objective = Minillm(
        stage,
        prompts=prompts(),
        decoding=Decoding(max_new_tokens=LONGEST),
        teacher=teacher,
        ids=IDS,
        ranks=ranks,
        seed=3,
    )
    if cell.endswith(STREAMED):  # broken: each rank has random numbers of its own
        objective._seed += ranks.rank
    try:
        collected, _ = objective.collect(0, student)
    finally:
        student.close()
        teacher.close()
    return by_row(collected.targets)


def by_row(targets: Targets) -> Spoken:
    """Everything of each row without its padding, under its prompt's uid."""
    scored, rollout = targets.scored, targets.scored.rollout
    assert rollout.student_hidden_BTH is not None and rollout.teacher_hidden_BTH is not None
    values: dict[str, Tensor] = {
        "ids": rollout.response_BT,
        "drew": rollout.teacher_drew_BT,
        "sampled_logq": rollout.logq_BT,
        "student": rollout.student_hidden_BTH,
        "teacher": rollout.teacher_hidden_BTH,
        **{name: getattr(scored, name) for name in ("logq_BT", "logp_BT", "reverse_kl_BT")},
        **{name: getattr(targets, name) for name in ("advantage_BT", "importance_BT")},
    }
    rows: Spoken = {}
    for row, uid in enumerate(rollout.prompts.uid_B):
        kept_T = rollout.mask_BT[row]
        rows[uid] = {name: value[row][kept_T].clone() for name, value in values.items()}
        rows[uid]["stop"] = rollout.stop_B[row].value
    return rows


if __name__ == "__main__":
    everyone = Ranks()
    for name in sys.argv[2:]:
        torch.save(speak(Path(sys.argv[1]), name, everyone), Path(sys.argv[1]) / f"{name}.{everyone.rank}.pt")
    leave(0)  # left to the end of Python, gloo sometimes aborts

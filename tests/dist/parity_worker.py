"""One rank of the parity test: runs every cell named on the command line, one after the other, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

from minillm import distill
from minillm.cards import Card
from minillm.config import RunConfig
from minillm.yaml_reader import write_yaml
from tests import tiny

STEPS = 5


def config(folder: Path, cell: str) -> RunConfig:
    """The run of a cell ``STAGE-PLACEMENT``, such as ``zero2-zero3``."""
    stage, placement = cell.split("-")
    return tiny.minillm_config(
        folder,
        teacher=folder / f"teacher-{placement}.yaml",
        student=folder / "student",
        prompts=folder / "prompts.jsonl",
        name=cell,
        steps=STEPS,
        samples_per_prompt=2,
        micro_batch=3,
        inner_updates=2,
        coin_groups=2,
        teacher_mix=0.3,
        lm_coefficient=0.5,
        lm_batch=5,
        optimiser={"lr": 3e-3, "schedule": "constant"},
        run_engine={"student": stage},
    )


def write_inputs(folder: Path) -> None:
    """Two models, a card for each placement of the teacher, and prompts."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    for placement in ("replicated", "zero3"):
        card = Card(name=f"teacher-{placement}", model=str(folder / "teacher"), placement=placement)
        text = write_yaml(card.model_dump(exclude_none=True, exclude={"name"}, exclude_defaults=True))
        (folder / f"teacher-{placement}.yaml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[2:]:
        distill(config(Path(sys.argv[1]), name))

"""One rank of the test of ``minillm cache`` on two: writes the cache of every placement, and trains from one."""

from __future__ import annotations

import sys
from pathlib import Path

from minillm import cache_teacher, distill
from minillm.config import RunConfig
from minillm.lost import leave
from tests import tiny

PLACEMENTS = ("replicated", "zero3")
TOP_K = 5


def write_inputs(folder: Path) -> None:
    """A teacher, a card for each placement of it, a student and prompts."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl", rows=13)  # an odd number
    for placement in PLACEMENTS:
        (folder / f"{placement}.yaml").write_text(
            f"{{model: {folder}/teacher, placement: {placement}}}\n", encoding="utf-8"
        )


def config(folder: Path, name: str, *, batch: int, cache: str) -> RunConfig:
    """A kd run of the student alone, with batches that leave a rank's last micro-batches empty."""
    stage = {
        "kind": "kd", "steps": 3, "batch": 5, "micro_batch": 2, "teacher_cache": str(folder / cache),
        "optimiser": {"lr": 3e-3, "schedule": "constant"},
    }  # fmt: skip
    return RunConfig(
        name=name, out=str(folder), student=str(folder / "student"),
        data={"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": 8},  # type: ignore[arg-type]
        decoding={"max_new_tokens": 10}, engine={"student": "zero2"},  # type: ignore[arg-type]
        evaluation={"batch": batch}, stages=(stage,),  # type: ignore[arg-type]
    )  # fmt: skip


def write(folder: Path, placement: str, name: str, *, batch: int) -> None:
    """The cache ``NAME`` of a teacher that is placed so."""
    settings = config(folder, name, batch=batch, cache=name)
    cache_teacher(folder / f"{placement}.yaml", settings, out=folder / name, top_k=TOP_K, precision="float32")


if __name__ == "__main__":
    top = Path(sys.argv[1])
    for each in PLACEMENTS:
        write(top, each, f"{each}-two", batch=2)
    distill(config(top, "trained-two", batch=2, cache="one"))
    leave(0)  # left to the end of Python, gloo sometimes aborts

"""One rank of the test of ``minillm pairs`` on two: writes the pairs of models that are placed in every way."""

from __future__ import annotations

import sys
from pathlib import Path

from minillm import make_pairs
from minillm.lost import leave
from tests import tiny

CELLS = ("float64-replicated", "float32-zero3")


def write_inputs(folder: Path) -> None:
    """A teacher and a student, a card for each cell and its counterpart that is whole, and prompts, an odd number."""
    for seed, role in enumerate(("teacher", "student"), 1):
        tiny.save_model(folder / role, "llama", seed=seed, rows=32, spread=0.1)
        for dtype in ("float64", "float32"):
            for placement in ("replicated", "zero3"):
                text = f"{{model: {folder}/{role}, dtype: {dtype}, placement: {placement}}}\n"
                (folder / f"{role}-{dtype}-{placement}.yaml").write_text(text, encoding="utf-8")
    tiny.save_prompts(folder / "prompts.jsonl", rows=13)


def write(folder: Path, cell: str, name: str, *, batch: int) -> None:
    """The pairs of a cell, into ``NAME.jsonl``."""
    config = tiny.minillm_config(
        folder, teacher=folder / f"teacher-{cell}.yaml", student=folder / f"student-{cell}.yaml",
        prompts=folder / "prompts.jsonl", run_decoding={"max_new_tokens": 36}, run_evaluation={"batch": batch},
    )  # fmt: skip
    make_pairs(config, out=folder / f"{name}.jsonl")


if __name__ == "__main__":
    top = Path(sys.argv[1])
    for each in CELLS:
        write(top, each, f"{each}-two", batch=3)
    leave(0)  # left to the end of Python, gloo sometimes aborts

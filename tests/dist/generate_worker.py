"""One rank of the test of ``minillm generate`` on two: writes the file of every cell named on the command line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from minillm import drawing, generate
from minillm.lost import leave
from minillm.ranks import Ranks
from minillm.types import DrawKey
from tests import tiny

CELLS = ("float64-replicated", "float32-zero3")
STREAMED = "streamed"
"""A cell in which each rank draws with random numbers of its own."""


def write_inputs(folder: Path) -> None:
    """A model, a card for each cell and its counterpart that is whole, and prompts."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_prompts(folder / "prompts.jsonl")
    for dtype in ("float64", "float32"):
        for placement in ("replicated", "zero3"):
            text = f"{{model: {folder}/teacher, dtype: {dtype}, placement: {placement}}}\n"
            (folder / f"{dtype}-{placement}.yaml").write_text(text, encoding="utf-8")


def write(folder: Path, cell: str, name: str, *, batch: int) -> None:
    """Thirteen prompts, an odd number, with two samples each, into ``NAME.jsonl``."""
    config = tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "teacher", prompts=folder / "prompts.jsonl",
        run_data={
            "train": str(folder / "prompts.jsonl"), "test": str(folder / "prompts.jsonl"),
            "max_prompt_tokens": 8, "test_limit": 13,
        },
        run_decoding={"max_new_tokens": 24}, run_evaluation={"batch": batch},
    )  # fmt: skip
    generate(folder / f"{cell}.yaml", config, out=folder / f"{name}.jsonl", split="test", samples=2, keep_cut=True)


if __name__ == "__main__":
    top = Path(sys.argv[1])
    for each in CELLS:
        write(top, each, f"{each}-two", batch=4)
    rank = Ranks().rank
    drawing.DrawKey = lambda **key: dataclasses.replace(DrawKey(**key), seed=rank)  # type: ignore[misc,assignment]
    write(top, CELLS[0], STREAMED, batch=4)
    leave(0)  # left to the end of Python, gloo sometimes aborts

"""One rank of the test of an evaluation that is stopped and goes on: makes it, and stops where it is told to."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from minillm import evaluate, evaluation, unfinished
from minillm.config import RunConfig
from minillm.lost import leave
from tests import tiny

PROMPTS, SEEDS = 7, (10, 20)


TWO_ROWS = 30
"""Tokens of two rows: prompts of 2 to 5, and 10 more of the response."""


def config(folder: Path, *, budget: int) -> RunConfig:
    """Fourteen rows, as many at a time on each rank as ``budget`` tokens allow."""
    prompts = str(folder / "prompts.jsonl")
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl",
        run_data={"train": prompts, "test": prompts, "test_limit": PROMPTS, "max_prompt_tokens": 8},
        run_evaluation={"seeds": SEEDS, "batch_tokens": budget, "bootstrap": 10},
    )  # fmt: skip


def make(folder: Path, out: Path, *, stop: int, budget: int = TWO_ROWS) -> int:
    """Evaluates the student into ``out``, all in one go or up to batch number ``stop`` (-1: all); rows drawn by this
    rank."""
    before = unfinished.EVERY_S, unfinished.SHARE
    unfinished.EVERY_S, unfinished.SHARE = 0.0, float("inf")
    real, drawn = evaluation._judge_batch, list[int]()

    def judge(reader: Any, judge: Any, cells: Any, **options: Any) -> Any:
        if len(drawn) == stop:
            raise KeyboardInterrupt
        drawn.append(len(cells))
        return real(reader, judge, cells, **options)

    evaluation._judge_batch = judge
    try:
        with contextlib.suppress(KeyboardInterrupt):
            evaluate(folder / "student", config(folder, budget=budget), out=out)
    finally:
        evaluation._judge_batch = real
        unfinished.EVERY_S, unfinished.SHARE = before
    return sum(drawn)


if __name__ == "__main__":
    for task in sys.argv[2:]:
        name, _, at = task.partition(":")
        print("drawn", name, make(Path(sys.argv[1]), Path(sys.argv[1]) / name, stop=int(at)), flush=True)
    leave(0)  # left to the end of Python, gloo sometimes aborts

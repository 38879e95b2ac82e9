"""One rank of the test of evaluations whose ranks have no disk in common: each is given a folder of its own for
results."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from minillm import evaluate
from minillm.config import RunConfig
from minillm.errors import DataError
from minillm.lost import leave
from tests import tiny

SETS = ("one", "two")


def config(folder: Path, *, sets: bool, seeds: tuple[int, ...] = (10,)) -> RunConfig:
    """Four prompts, by themselves or as two sets."""
    test = {name: str(folder / f"{name}.jsonl") for name in SETS} if sets else str(folder / "one.jsonl")
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "one.jsonl",
        run_data={"train": str(folder / "one.jsonl"), "test": test, "max_prompt_tokens": 8},
        run_evaluation={"seeds": seeds, "bootstrap": 10},
    )  # fmt: skip


def main(folder: Path, rank: str) -> None:
    """Evaluates, evaluates the same again, and asks something else in the same place."""
    for kind in ("several", "single"):
        out, asked = folder / f"{kind}-{rank}", config(folder, sets=kind == "several")
        first = evaluate(folder / "student", asked, out=out)
        assert _timeless(evaluate(folder / "student", asked, out=out)) == _timeless(first)
        try:
            evaluate(folder / "student", config(folder, sets=kind == "several", seeds=(20,)), out=out)
        except DataError as error:
            print("refused", kind, str(error).split("(")[1].split(")")[0], flush=True)
        print("done", kind, *first.get("sets", ()), flush=True)


def _timeless(results: dict[str, Any]) -> dict[str, Any]:
    """Without the seconds, of which each rank has its own."""
    return {name: value for name, value in results.items() if name != "seconds"}


if __name__ == "__main__":
    main(Path(sys.argv[1]), os.environ["RANK"])
    leave(0)  # left to the end of Python, gloo sometimes aborts

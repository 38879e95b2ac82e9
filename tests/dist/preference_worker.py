"""One rank of the parity test of pairs: runs every cell named on the command line, one after the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minillm import distill
from minillm.config import RunConfig
from minillm.lost import leave
from tests import quick, tiny
from tests.unit.test_preference_runs import save_pairs

STEPS = 3


def config(folder: Path, cell: str) -> RunConfig:
    """The run of a cell ``ENGINE.VALUE``, such as ``zero2.tdpo2``, with two stages."""
    engine, value = cell.split(".")[:2]
    stage = {
        "kind": "preference", "value": value, "steps": STEPS, "batch": 5, "micro_batch": 2, "sft_weight": 0.1,
        "beta": 0.5, "validate_every": STEPS, "optimiser": {"lr": 3e-3, "schedule": "constant"},
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": cell, "out": str(folder), "student": str(folder / "student"), "engine": {"student": engine},
        "data": {
            "preferences": str(folder / "pairs.jsonl"), "preferences_validation": str(folder / "held-out.jsonl"),
            "max_prompt_tokens": 8,
        },
        "decoding": {"max_new_tokens": 10}, "evaluation": {"batch": 2}, "checkpoints": None,
        "stages": ({**stage, "name": "one"}, {**stage, "name": "two"}),
    }  # fmt: skip
    return RunConfig(**values)


def write_inputs(folder: Path) -> None:
    """A student and pairs."""
    tiny.save_model(folder / "student", "llama", seed=2)
    save_pairs(folder / "pairs.jsonl", rows=12)
    save_pairs(folder / "held-out.jsonl", rows=3, first=40)


if __name__ == "__main__":
    folder, *cells = sys.argv[1:]
    quick.short_collections()
    for name in cells:
        with quick.undrawn():
            distill(config(Path(folder), name))
    leave(0)  # left to the end of Python, gloo sometimes aborts

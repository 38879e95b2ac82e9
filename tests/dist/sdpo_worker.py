"""One rank of the test of sDPO on two: runs every engine named on the command line, one after the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minillm import distill
from minillm.config import RunConfig
from minillm.lost import leave
from tests import quick, tiny
from tests.unit.test_preference_runs import save_pairs

STEPS = 2


def config(folder: Path, name: str, engine: str, **changes: Any) -> RunConfig:
    """Two stages, each of a chunk whose rejected responses its start draws; an odd number of pairs for two ranks."""
    stage = {
        "kind": "preference", "steps": STEPS, "batch": 5, "beta": 0.5, "target": "hard", "refresh_rejected": True,
        "optimiser": {"lr": 3e-3, "schedule": "constant"},
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": name, "out": str(folder), "student": str(folder / "student"), "engine": {"student": engine},
        "data": {
            "preferences": {source: str(folder / f"{source}.jsonl") for source in ("one", "two")}, "chunks": {},
            "max_prompt_tokens": 8,
        },
        "decoding": {"max_new_tokens": 24}, "evaluation": {"batch": 3}, "checkpoints": None,
        "stages": ({**stage, "name": "first", "chunk": 1}, {**stage, "name": "second", "chunk": 2, "value": "tdpo2"}),
        **changes,
    }  # fmt: skip
    return RunConfig(**values)


def write_inputs(folder: Path) -> None:
    """A student and two sources of pairs."""
    tiny.save_model(folder / "student", "llama", seed=2, spread=0.1)
    save_pairs(folder / "one.jsonl", rows=11)
    save_pairs(folder / "two.jsonl", rows=7, first=40)


if __name__ == "__main__":
    top, *engines = sys.argv[1:]
    quick.short_collections()
    for each in engines:
        with quick.undrawn():
            distill(config(Path(top), each, each))
    leave(0)  # left to the end of Python, gloo sometimes aborts

"""One rank of the tests of adapters on several ranks: a run for each cell that is named, in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from minillm import distill
from minillm.config import RunConfig
from minillm.lost import leave
from tests import quick, tiny

STEPS = 5


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"run_lora": {"rank": 4, "alpha": 8}},
    "bottleneck": {"run_bottleneck": {"size": 5}},
}


def config(folder: Path, name: str, *, stage: str, family: str = "gpt2", adapter: str = "lora") -> RunConfig:
    """Five MiniLLM steps of an adapter, as all runs that are compared make them."""
    return tiny.minillm_config(
        folder, teacher=folder / f"teacher-{family}", student=folder / family, prompts=folder / "prompts.jsonl",
        name=name, steps=STEPS, samples_per_prompt=2, micro_batch=3, coin_groups=2, teacher_mix=0.3, inner_epochs=2,
        optimiser={"lr": 3e-3, "schedule": "constant"}, run_engine={"student": stage},
        **ADAPTERS[adapter],
    )  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Models with a tied head and with one of its own, and prompts."""
    for family, tied in (("gpt2", True), ("llama", False)):
        tiny.save_model(folder / f"teacher-{family}", family, seed=1, rows=32)
        tiny.save_model(folder / family, family, seed=2, tied=tied, rows=30)
    tiny.save_prompts(folder / "prompts.jsonl")


if __name__ == "__main__":
    folder, *cells = sys.argv[1:]
    with quick.undrawn():
        quick.short_collections()
        for cell in cells:
            family, stage, adapter = cell.split("-")
            distill(config(Path(folder), cell, stage=stage, family=family, adapter=adapter))
    leave(0)  # left to the end of Python, gloo sometimes aborts

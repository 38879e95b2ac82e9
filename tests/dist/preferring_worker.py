"""One rank of the test of ``minillm win-rate`` and ``minillm prefers`` on two: writes the figures of every cell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from minillm.judge.likelihood import win_rate
from minillm.lost import leave
from minillm.micro_batches import Limits
from minillm.pair_accuracy import pair_accuracy
from minillm.ranks import Ranks
from tests import tiny
from tests.unit.test_pair_accuracy import config, save_pairs
from tests.unit.test_win_rate import CUT, LEFT, RIGHT, evaluation

PLACEMENTS = ("replicated", "zero3")


def write_inputs(folder: Path) -> None:
    """Two models, a card of the first for each placement, two evaluations, and pairs."""
    for seed in (1, 2):
        tiny.save_model(folder / f"m{seed}", "llama", seed=seed)
    for placement in PLACEMENTS:
        text = f"{{model: {folder}/m1, placement: {placement}}}\n"
        (folder / f"{placement}.yaml").write_text(text, encoding="utf-8")
    evaluation(folder / "left", LEFT, cut=CUT)
    evaluation(folder / "right", RIGHT)
    save_pairs(folder / "pairs.jsonl")


def measure(folder: Path, placement: str, name: str) -> dict[str, Any]:
    """The figures of both commands, on this rank; odd numbers of rows, so that the ranks have unlike shares."""
    model, out = folder / f"{placement}.yaml", folder / f"{placement}-{name}"
    won = win_rate(folder / "left", folder / "right", by=model, limits=Limits(rows=5), limit=5, out=out)
    preferred = pair_accuracy(model, config(), pairs=str(folder / "pairs.jsonl"), reference=folder / "m2")
    return {
        **{key: won[key]["mean"] for key in ("win_rate", "margin")}, "low": won["win_rate"]["ci95"][0],
        **{key: preferred[key]["mean"] for key in ("accuracy", "chosen", "rejected")}, "p": preferred["p"],
    }  # fmt: skip


if __name__ == "__main__":
    top = Path(sys.argv[1])
    found = {each: measure(top, each, "two") for each in PLACEMENTS}
    (top / f"rank-{Ranks().rank}.json").write_text(json.dumps(found), encoding="utf-8")
    leave(0)  # left to the end of Python, gloo sometimes aborts

"""One rank of the parity test of pairs: runs every cell named on the command line, one after the other."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from minillm import distill
from minillm.config import RunConfig
from minillm.errors import Stopped
from minillm.lost import leave
from minillm.stops import Stops
from tests import quick, tiny
from tests.unit.test_preference_runs import save_pairs

STEPS = 3
STAGES = ("one", "two")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"value": "dpo"},
    "tdpo1": {"value": "tdpo1"},
    "tdpo2": {"value": "tdpo2"},
    "ipo": {"link": "ipo"},
    "hinge": {"link": "hinge"},
    "robust": {"link": "robust", "label_noise": 0.1},
    "soft": {"target": "soft"},
    "bare": {"sft_weight": 0.0},
}
"""What each changes in a stage of DPO with an ``sft_weight``."""
LONG = ("dpo", "tdpo2")
"""Those of two stages: the second has another reference."""
BROKEN_OFF = "again"
"""Ends the name of a cell that is stopped inside its second stage and goes on."""


def config(folder: Path, cell: str) -> RunConfig:
    """The run of a cell ``ENGINE.OBJECTIVE``, such as ``zero2.tdpo2``, or ``zero3.dpo.again``."""
    engine, objective, *more = cell.split(".")
    stage = {
        "kind": "preference", "steps": STEPS, "batch": 5, "micro_batch": 2, "sft_weight": 0.1, "beta": 0.5,
        "validate_every": STEPS, "optimiser": {"lr": 3e-3, "schedule": "constant"}, **OBJECTIVES[objective],
    }  # fmt: skip
    taught = "taught-" if objective == "soft" else ""
    values: dict[str, Any] = {
        "name": cell, "out": str(folder), "student": str(folder / "student"), "engine": {"student": engine},
        "data": {
            "preferences": str(folder / f"{taught}pairs.jsonl"),
            "preferences_validation": str(folder / f"{taught}held-out.jsonl"), "max_prompt_tokens": 8,
        },
        "decoding": {"max_new_tokens": 10}, "evaluation": {"batch": 2},
        "stages": tuple({**stage, "name": name} for name in STAGES[: 2 if objective in LONG else 1]),
        **({} if more else {"checkpoints": None}),
    }  # fmt: skip
    return RunConfig(**values)


def write_inputs(folder: Path) -> None:
    """A student and pairs, without a teacher's log-probabilities and with them."""
    tiny.save_model(folder / "student", "llama", seed=2)
    for file in (save_pairs(folder / "pairs.jsonl", rows=12), save_pairs(folder / "held-out.jsonl", rows=3, first=40)):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for number, row in enumerate(rows):
            row["teacher_logps"] = [-8.0 - number % 3, -9.0 - 2 * (number % 2)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file.with_name(f"taught-{file.name}").write_text(lines, encoding="utf-8")


def broken_off(settings: RunConfig) -> None:
    """A run that a signal stops after the first update of its second stage."""
    asked, agreed = [0], Stops.agreed

    def after_some(self: Stops, ranks: Any) -> str:
        asked[0] += 1
        return "SIGTERM" if asked[0] == STEPS + 1 else ""

    Stops.agreed = after_some  # type: ignore[method-assign]
    try:
        with contextlib.suppress(Stopped):
            distill(settings)
            raise AssertionError("nothing stopped it")
    finally:
        Stops.agreed = agreed  # type: ignore[method-assign]


if __name__ == "__main__":
    folder, *cells = sys.argv[1:]
    quick.short_collections()
    for name in cells:
        with quick.undrawn():
            run = config(Path(folder), name)
            if name.endswith(BROKEN_OFF):
                broken_off(run)
            distill(run)
    leave(0)  # left to the end of Python, gloo sometimes aborts

"""One rank of an evaluation with exposure bias and calibration, its teacher whole or sharded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from minillm import api
from minillm.lost import leave
from tests import tiny

ROWS = 13
PLACEMENTS = ("replicated", "zero3")


def write_inputs(folder: Path) -> None:
    """Two models, a card for each placement of the teacher, and prompts of which some have choices."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    for placement in PLACEMENTS:
        text = f"model: {folder / 'teacher'}\nplacement: {placement}\n"
        (folder / f"{placement}.yaml").write_text(text, encoding="utf-8")
    lines = []
    for number in range(ROWS):
        letters = [tiny.LETTERS[(number * 7 + step * 3) % 26] for step in range(2 + number % 4)]
        row: dict[str, Any] = {"id": f"row-{number}", "prompt": " ".join(letters)}
        row |= {"response": "c d"} if number % 4 else {}
        row |= {"choices": ["a", "c d", "e f g"]} if number % 3 == 1 and number % 4 else {}
        lines.append(json.dumps(row))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def evaluated(folder: Path, placement: str, *, out: Path, batch: int = 7) -> dict[str, Any]:
    """The results of the student in ``folder``."""
    prompts = folder / "prompts.jsonl"
    config = tiny.minillm_config(
        folder / "runs",
        teacher=folder / f"{placement}.yaml",
        student=folder / "student",
        prompts=prompts,
        run_data={"train": str(prompts), "test": str(prompts), "max_prompt_tokens": 8},
        run_evaluation={
            "seeds": (1,),
            "bootstrap": 40,
            "batch": batch,
            "exposure": {"samples": 3},
            "calibration": True,
        },
    )
    return api.evaluate(config.student, config, out=out)


if __name__ == "__main__":
    for each in PLACEMENTS:
        evaluated(Path(sys.argv[1]), each, out=Path(sys.argv[1]) / "two" / each)
    leave(0)  # left to the end of Python, gloo sometimes aborts

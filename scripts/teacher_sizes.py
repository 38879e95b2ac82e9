"""What scripts/teacher_sizes.sh needs beside the command: teachers at other temperatures, and records of diagnoses.

    python scripts/teacher_sizes.py cool runs/teacher-sizes/64x3-long 0.5
    python scripts/teacher_sizes.py measure runs/teacher-sizes STUDENT docs/results/teacher-sizes [0,1,2]

``measure`` is ``minillm diagnose`` for many teachers and draws: it reads the prompts once, and differentiates the
student once a draw. A record whose settings, weights and prompts are those that would be measured now is left alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

RECIPE = "recipes/quickstart/minillm.yaml"
SIZES: dict[str, int] = {"prompts": 256, "samples": 4, "directions": 32}
NAMES = (
    *("sampled", "sampled+position_mean", "sampled+ridge", "expected", "expected+position_mean", "expected+ridge"),
    *("sampled+norm", "expected+ridge+norm", "expected+ridge+g0.95"),
)
KEPT = ("drawn", "absolute", "single", "choices", "versions")
DIGITS = 6
NO_PART = {"alarms", "keep", "validate_every", "patience", "steps", "optimiser"}
"""Settings of a stage that a gradient knows nothing of."""


def cool(run: str, temperature: str) -> None:
    """A copy of a teacher whose logits are divided by ``temperature``: exact, for the head is linear after the norm."""
    from safetensors.torch import load_file, save_file

    source, target = Path(run), Path(f"{run.rstrip('/')}-t{temperature}")
    if target.is_dir():
        return
    half_made = target.with_name(f"{target.name}.new")
    shutil.rmtree(half_made, ignore_errors=True)
    shutil.copytree(source / "student", half_made / "student")
    shutil.copy(source / "run.json", half_made)
    file = half_made / "student" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"] = weights["model.norm.weight"] / float(temperature)
    save_file(weights, file, metadata={"format": "pt"})
    (half_made / "temperature.json").write_text(temperature, encoding="utf-8")
    half_made.rename(target)


def measure(runs: str, student: str, results: str, draws: str = "0,1,2") -> None:
    """One record for each teacher and draw; every teacher has its first before any has its second."""
    from minillm.config import load_config
    from minillm.diagnose.run import Sizes, diagnose, made_from
    from minillm.diagnose.scores import Memory
    from minillm.diagnose.words import as_json
    from minillm.preflight import check_pair, read_split
    from minillm.results import versions
    from minillm.store import record_text

    teachers = sorted(folder for folder in Path(runs).iterdir() if (folder / "student").is_dir())
    split = None
    for seed in map(int, draws.split(",")):
        memory: Memory = {}
        for folder in teachers:
            config = load_config(RECIPE, [f"student={student}", f"teacher={folder / 'student'}"])
            pair = check_pair(config)
            if split is None:
                split = read_split(config, "world:train", pair=pair, name="train", need_response=False)
            sizes = Sizes(**SIZES, seed=seed)
            asked = {
                "stage": config.stages[0].model_dump(mode="json", exclude=NO_PART),
                "decoding": config.decoding.model_dump(mode="json"),
                "sizes": dataclasses.asdict(sizes), "estimators": list(NAMES),
            }  # fmt: skip
            key = {"asked": asked, "made_from": made_from(pair, split)}
            file = Path(results) / f"{folder.name}.{seed}.json"
            stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if any(stored.get(name) != value for name, value in key.items()):
                print(file, flush=True)
                found = {
                    **as_json(diagnose(config, names=NAMES, sizes=sizes, split=split, memory=memory)),
                    "versions": versions(),
                }
                stored = {name: rounded(found[name]) for name in KEPT}
            record = {**stored, **key, "teacher": facts(folder)}  # an evaluation may have come later
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(record_text(dict(sorted(record.items()))), encoding="utf-8")


def facts(folder: Path) -> dict[str, Any]:
    """What is known of a teacher from its own files."""
    shape = json.loads((folder / "student" / "config.json").read_text(encoding="utf-8"))
    stage = json.loads((folder / "run.json").read_text(encoding="utf-8"))["stages"]["sft"]
    test = folder / "test" / "results.json"
    validity = json.loads(test.read_text(encoding="utf-8"))["measures"]["validity"] if test.is_file() else None
    cooled = folder / "temperature.json"
    temperature = float(cooled.read_text(encoding="utf-8")) if cooled.is_file() else 1.0
    return {
        "name": folder.name,
        "hidden": shape["hidden_size"],
        "layers": shape["num_hidden_layers"],
        "parameters": parameters(folder / "student" / "model.safetensors"),
        "updates": stage["step"],
        "temperature": temperature,
        # Of the weights as they were trained; other temperatures were not validated.
        "validation_loss": round(stage["best"], DIGITS) if temperature == 1.0 else None,
        "validity": validity,
    }


def parameters(file: Path) -> int:
    """Numbers in a file of weights; tied ones stand there once."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def rounded(value: Any) -> Any:
    """The same with ``DIGITS`` significant digits in every float."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(of) for name, of in value.items()}
    return [rounded(of) for of in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    {"cool": cool, "measure": measure}[sys.argv[1]](*sys.argv[2:])

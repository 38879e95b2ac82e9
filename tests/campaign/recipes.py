"""The runs of the campaigns, and the models that they begin with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests import tiny

WORLD = {"sft": 240, "skew_fkl": 120, "minillm": 140}
"""Steps of each stage of the run over the embedded world."""


def write_world(folder: Path, name: str, *, seed: int) -> Path:
    """A run of three stages: fine-tuning, DistiLLM with a replay buffer, MiniLLM with four updates a rollout."""
    file = folder / f"{name}.yaml"
    file.write_text(
        f"""
name: {name}
out: {folder / "runs"}
seed: {seed}
threads: 1
student: students/micro-world-24x2
teacher: {folder / "runs/teacher/student"}
data:
  train: world:train
  validation: world:validation
  test: world:test
  max_prompt_tokens: 24
  train_limit: 2000
  validation_limit: 24
  test_limit: 24
decoding: {{max_new_tokens: 40}}
engine: {{student: zero2}}
evaluation: {{seeds: [1], bootstrap: 10}}
checkpoints: {{every_minutes: 0, every_steps: 4}}
stages:
  - {{kind: sft, steps: {WORLD["sft"]}, batch: 32, validate_every: 24, optimiser: {{lr: 5.0e-3}}}}
  - kind: skew_fkl
    steps: {WORLD["skew_fkl"]}
    batch: 24
    validate_every: 12
    loss_rise: 1.0e-9
    share_step: 0.6
    replay: 48
    optimiser: {{lr: 1.0e-2, schedule: constant}}
  - kind: minillm
    steps: {WORLD["minillm"]}
    prompts: 32
    inner_epochs: 2
    inner_batches: 2
    baseline: ridge
    validate_every: 14
    optimiser: {{lr: 1.0e-3}}
""",
        encoding="utf-8",
    )
    return file


def make_teacher(folder: Path) -> None:
    """A small teacher of the world, from nothing; nothing happens where it is there."""
    file = folder / "teacher.yaml"
    file.write_text(
        f"""
name: teacher
out: {folder / "runs"}
seed: 1
threads: 1
student: students/micro-world-32x2
data: {{train: world:train, max_prompt_tokens: 24, train_limit: 4000}}
decoding: {{max_new_tokens: 40}}
engine: {{student: zero0}}
checkpoints: null
stages:
  - {{kind: sft, steps: 300, batch: 32, optimiser: {{name: muon, muon_lr: 2.0e-2, lr: 1.0e-2}}}}
""",
        encoding="utf-8",
    )
    subprocess.run(
        [sys.executable, "-m", "minillm", "sft", "--config", str(file)],
        cwd=Path(__file__).resolve().parents[2],
        check=True,
    )


def write_models(folder: Path) -> None:
    """A teacher, a student and prompts for runs in this folder."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "train.jsonl", rows=64)
    tiny.save_prompts(folder / "held-out.jsonl", rows=12)


def write_run(folder: Path, *, engine: str, stages: str) -> Path:
    """A run of these stages over those models, saved after each step."""
    file = folder / "run.yaml"
    file.write_text(
        f"""
name: run
out: {folder / "runs"}
threads: 1
student: {folder / "student"}
teacher: {folder / "teacher"}
data:
  train: {folder / "train.jsonl"}
  validation: {folder / "held-out.jsonl"}
  test: {folder / "held-out.jsonl"}
  max_prompt_tokens: 16
decoding: {{max_new_tokens: 8}}
engine: {{student: {engine}}}
evaluation: {{seeds: [1], bootstrap: 10}}
checkpoints: {{every_minutes: 0, every_steps: 1}}
stages:{stages}""",
        encoding="utf-8",
    )
    return file


def write_small(folder: Path, *, steps: int) -> Path:
    """DistiLLM with a replay buffer and MiniLLM with four updates a rollout, so many steps each."""
    return write_run(folder, engine="zero2", stages=own_text(skew=steps, minillm=steps, validate_every=1))


def own_text(*, skew: int, minillm: int, validate_every: int) -> str:
    """Those two stages, of so many steps."""
    return f"""
  - kind: skew_fkl
    steps: {skew}
    batch: 8
    validate_every: 1
    loss_rise: 1.0e-9
    share_step: 0.6
    replay: 8
    optimiser: {{lr: 1.0e-2}}
  - kind: minillm
    steps: {minillm}
    prompts: 8
    inner_epochs: 2
    inner_batches: 2
    baseline: ridge
    validate_every: {validate_every}
    optimiser: {{lr: 1.0e-3}}
"""

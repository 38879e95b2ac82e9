"""What scripts/gpu_check.sh runs: models with random weights in real shapes, three runs, and a table of them."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from minillm.cards import load_card
from minillm.plan.memory import memory_of
from minillm.plan.sizes import GIB, Work, sizes_of
from minillm.publish import weights_sha256
from minillm.yaml_reader import write_yaml

TOLERANCE = 0.07
"""Of peak memory, against the plan."""
STOPPED = 75
"""Exit code of a run that a signal has stopped, and that saved."""
WARM_UP = 3
"""Steps that are in no figure of speed: they also compile, page-lock and grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Sizes of a check."""

    teacher: dict[str, int]
    student: dict[str, int]
    vocabulary: int
    rows: int
    micro_batch: int
    prompt_tokens: int
    new_tokens: int
    steps: int
    precision: str


REAL = Shapes(
    teacher={"n_embd": 1600, "n_layer": 48, "n_head": 25}, student={"n_embd": 768, "n_layer": 12, "n_head": 12},
    vocabulary=50_257, rows=64, micro_batch=16, prompt_tokens=64, new_tokens=128, steps=20, precision="bf16",
)  # fmt: skip
TINY = Shapes(
    teacher={"n_embd": 32, "n_layer": 2, "n_head": 2}, student={"n_embd": 16, "n_layer": 1, "n_head": 2},
    vocabulary=300, rows=8, micro_batch=4, prompt_tokens=6, new_tokens=8, steps=6, precision="fp32",
)  # fmt: skip


def write_inputs(folder: Path, shapes: Shapes) -> None:
    """Both models with their tokenizer, a card for each place of the teacher, and prompts."""
    words = {f"w{place}": place for place in range(shapes.vocabulary - 1)} | {"<|endoftext|>": shapes.vocabulary - 1}
    core = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    dtype = torch.bfloat16 if shapes.precision == "bf16" else torch.float32
    for name, sizes in {"teacher": shapes.teacher, "student": shapes.student}.items():
        torch.manual_seed(len(name))
        ends = {"bos_token_id": shapes.vocabulary - 1, "eos_token_id": shapes.vocabulary - 1}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=shapes.vocabulary, n_positions=1024, **sizes, **ends)).to(dtype)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for placement in ("replicated", "offload"):
        card = {"model": str(folder / "teacher"), "dtype": str(dtype).removeprefix("torch."), "placement": placement}
        (folder / f"{placement}.yaml").write_text(write_yaml(card), encoding="utf-8")
    draw = random.Random(1)
    rows = [
        " ".join(f"w{draw.randrange(shapes.vocabulary - 1)}" for _ in range(shapes.prompt_tokens)) for _ in range(512)
    ]
    text = "".join(json.dumps({"id": str(at), "prompt": row}) + "\n" for at, row in enumerate(rows))
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")


def config(folder: Path, name: str, placement: str, shapes: Shapes) -> Path:
    """A run's file."""
    stage = {
        "kind": "minillm", "steps": shapes.steps, "prompts": shapes.rows, "micro_batch": shapes.micro_batch,
        "teacher_mix": 0.2, "importance": "coin", "validate_every": 0, "alarms": {"repetition": None},
        "optimiser": {"lr": 1e-5, "schedule": "constant"},
    }  # fmt: skip
    run = {
        "name": name, "out": str(folder), "student": str(folder / "student"),
        "teacher": str(folder / f"{placement}.yaml"), "stages": [stage],
        "data": {"train": str(folder / "prompts.jsonl"), "max_prompt_tokens": shapes.prompt_tokens},
        "decoding": {"max_new_tokens": shapes.new_tokens},
        "engine": {"student": "zero2", "precision": shapes.precision},
        "checkpoints": {"every_minutes": 0, "every_steps": 0},
    }  # fmt: skip
    file = folder / f"{name}.yaml.run"
    file.write_text(write_yaml(run), encoding="utf-8")
    return file


def launch(file: Path, *, ranks: int) -> subprocess.Popen[bytes]:
    """A run on its ranks, in a group of its own."""
    command = [sys.executable, "-m", "minillm", "launch", "--ranks", str(ranks), "distill", "--config", str(file)]
    return subprocess.Popen(command, start_new_session=True)


def lines(run: Path) -> list[dict[str, Any]]:
    """The steps that a run has logged."""
    log = run / "metrics.jsonl"
    every = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return [line for line in every if line["kind"] == "train"]


def stopped_half_way(file: Path, run: Path, *, ranks: int, steps: int) -> bool:
    """Starts a run, stops it by SIGTERM in the middle, and starts it again; whether it saved, and ended."""
    process = launch(file, ranks=ranks)
    while process.poll() is None and len(lines(run)) < steps // 2:
        time.sleep(0.1)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    stopped = process.wait() == STOPPED
    return stopped and launch(file, ranks=ranks).wait() == 0


def plan(folder: Path, placement: str, shapes: Shapes, *, ranks: int) -> Work:
    """The run as the planner sees it."""
    return Work(
        student=sizes_of(load_card(str(folder / "student"), kind="students")),
        teacher=sizes_of(load_card(str(folder / "teacher"), kind="teachers")), gpus=ranks, gpus_per_node=ranks,
        engine="zero2", placement=placement, precision=shapes.precision, teacher_precision=shapes.precision,  # type: ignore[arg-type]
        rows=shapes.rows, micro_batch=shapes.micro_batch, prompt_tokens=shapes.prompt_tokens,
        new_tokens=shapes.new_tokens, teacher_mix=0.2,
    )  # fmt: skip


def told(name: str, run: Path, work: Work) -> dict[str, Any]:
    """The figures of a run."""
    speed = [line["speed"] for line in lines(run) if "speed" in line][WARM_UP:]
    peak = max((step.get("peak_bytes", 0.0) for step in speed), default=0.0)
    planned = memory_of(work).peak
    found = {
        "run": name, "steps": len(lines(run)), "seconds": statistics.median(step["seconds"] for step in speed),
        "tokens_per_second": statistics.median(step["tokens_per_second"] for step in speed),
        "mfu": statistics.median(step.get("mfu", 0.0) for step in speed), "peak_bytes": peak, "planned_bytes": planned,
        "teacher_bytes": json.loads((run / "run.json").read_text(encoding="utf-8"))["teacher_bytes"],
    }  # fmt: skip
    shares = " ".join(f"{part} {statistics.median(step.get(part, 0.0) for step in speed):.0%}" for part in SHARES)
    memory = f"peak {peak / GIB:.2f} GiB, planned {planned / GIB:.2f} ({peak / planned - 1:+.1%})" if peak else "no GPU"
    print(
        f"{name}: {found['seconds']:.2f} s a step, {found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%}, "
        f"{shares}; {memory}"
    )
    return found


SHARES = ("rollout", "scoring", "learning", "communication")


def main() -> int:
    """0 where all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU, to try the script")
    asked = parser.parse_args()
    gpus = torch.cuda.device_count()
    if not gpus and not asked.tiny:
        print("gpu_check: torch sees no GPU here; --tiny tries the script on a CPU", file=sys.stderr)
        return 2
    shapes, ranks = (TINY if asked.tiny else REAL), int(os.environ.get("RANKS", gpus or 1))
    folder: Path = asked.folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder, shapes)
    wrong, found = list[str](), list[dict[str, Any]]()
    for placement in ("replicated", "offload"):
        run = folder / placement
        if launch(config(folder, placement, placement, shapes), ranks=ranks).wait() != 0:
            wrong.append(f"the run with teacher {placement} failed")
            continue
        found.append(told(placement, run, plan(folder, placement, shapes, ranks=ranks)))
        peak, planned = found[-1]["peak_bytes"], found[-1]["planned_bytes"]
        if peak and abs(peak / planned - 1) > TOLERANCE:
            wrong.append(f"teacher {placement}: peak memory is {peak / planned - 1:+.1%} from the plan")
    again = folder / "again"
    if stopped_half_way(config(folder, "again", "replicated", shapes), again, ranks=ranks, steps=shapes.steps):
        same = weights_sha256(again / "student") == weights_sha256(folder / "replicated" / "student")
        print(f"stopped half-way and gone on: {'the same weights, bit for bit' if same else 'other weights'}")
        if not same:
            wrong.append("the run that went on has other weights than the one that was not stopped")
    else:
        wrong.append("the run that was stopped did not save, or did not go on")
    (asked.folder / "gpu_check.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    print("\n".join(wrong) or f"all as it should be; figures in {asked.folder / 'gpu_check.json'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

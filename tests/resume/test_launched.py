"""Two ranks under ``minillm launch``: a signal to the launcher saves and stops both; any number of ranks goes on.

Not in a run of every day, which has two ranks that go on (``tests/dist/test_moments.py``, ``test_unfinished.py``),
whole runs that are stopped and killed (``test_whole_runs.py``) and launchers that get signals (``tests/stops``):
``bash scripts/test.sh -m slow tests/resume/test_launched.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minillm import exits
from minillm.config import dump_config
from minillm.publish import weights_sha256
from minillm.run_log import OF_THE_PROCESS
from tests import tiny

pytestmark = pytest.mark.slow
LIMIT_S = 150


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl", rows=24)
    return folder


def start(place: Path, name: str, *more: str, ranks: int) -> subprocess.Popen[str]:
    """MiniLLM at ZeRO-2, four updates on each of three rollouts."""
    config = tiny.minillm_config(
        place / "runs", teacher=place / "teacher", student=place / "student", prompts=place / "prompts.jsonl",
        name=name, steps=3, inner_epochs=2, inner_batches=2,
        run_engine={"student": "zero2"}, run_threads=1, run_checkpoints={"every_minutes": 0, "every_steps": 1},
    )  # fmt: skip
    recipe = place / f"{name}.yaml"
    recipe.write_text(dump_config(config), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "minillm",
        "launch",
        "--ranks",
        str(ranks),
        "distill",
        "--config",
        str(recipe),
        *more,
    ]
    return subprocess.Popen(
        words, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, text


def manifest(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "MANIFEST.json").read_text(encoding="utf-8"))["fingerprints"]
    return found


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in OF_THE_PROCESS} for line in lines]


def stopped(place: Path, name: str) -> None:
    """Begun on two ranks and stopped once a step is logged, by a signal to the launcher."""
    process = start(place, name, ranks=2)
    file, until = place / "runs" / name / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not (file.is_file() and file.read_text(encoding="utf-8")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, text = ended(process)
    assert code == exits.STOPPED and "SIGTERM: saved at step" in text, text


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that nothing happened to."""
    code, text = ended(start(place, "whole", ranks=2))
    assert code == 0, text
    return place / "runs/whole"


def test_two_ranks_go_on_to_the_same_bits(place: Path, whole: Path) -> None:
    stopped(place, "again")
    code, text = ended(start(place, "again", ranks=2))
    assert code == 0 and "goes on from step" in text and "may differ" not in text, text
    again = place / "runs/again"
    assert log(again) == log(whole) and weights_sha256(again / "student") == weights_sha256(whole / "student")


@pytest.mark.slow
def test_one_rank_goes_on_near_them(place: Path, whole: Path) -> None:
    stopped(place, "fewer")
    fewer = place / "runs/fewer"
    kept = sorted((fewer / "checkpoints").iterdir())
    inside = manifest(kept[-1])["inside"]
    code, text = ended(start(place, "fewer", ranks=1))
    if inside:  # then by an older one, by name
        assert code == exits.MENDABLE and "saved inside a step on 2 ranks" in text and "start 2 ranks" in text, text
        older = next(path for path in kept if not manifest(path)["inside"])
        code, text = ended(start(place, "fewer", "--resume", str(older), ranks=1))
    assert code == 0 and "ranks 1, saved with 2; text and order stay the same" in text, text
    for one, two in zip(log(fewer), log(whole), strict=True):
        assert one["tokens"] == two["tokens"] and one["loss"] == pytest.approx(two["loss"], rel=1e-4)

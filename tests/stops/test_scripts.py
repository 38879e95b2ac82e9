"""The launch scripts start their ranks through the supervisor, and a signal to a script reaches it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import exits
from tests.stops.jobs import ROOT, Job, start

SOURCED = 'set -euo pipefail; python=$0; source scripts/launch.sh; {} "$1" -m tests.stops.toy "$2"'


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that is asked for GPUs, and spared torch."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 0 && exit\nexec {sys.executable} "$@"\n')
    stub.chmod(0o700)
    return stub


def job_of(script: str, python: Path, folder: Path, **settings: str) -> Job:
    """The ranks of a script in the midst of their steps."""
    words = ["bash", "-c", SOURCED.format(script), str(python), sys.executable, str(folder)]
    job = start(folder, words, settings)
    for rank in range(int(settings.get("RANKS", "2"))):
        job.await_file(f"going-{rank}")
    return job


def test_a_signal_to_a_script_saves(python: Path, tmp_path: Path) -> None:
    job = job_of('exec "${launcher[@]}"', python, tmp_path / "run")
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == exits.STOPPED
    assert len(list(job.folder.glob("saved-*"))) == 2 and job.left() == []


def test_control_a_script_that_waits_for_its_ranks_keeps_the_signal_to_itself(python: Path, tmp_path: Path) -> None:
    """Which is why the last act of scripts/distill.sh is ``exec``."""
    job = job_of("launch", python, tmp_path / "run")
    job.process.send_signal(signal.SIGTERM)
    job.process.wait()
    left = job.left()
    os.killpg(job.process.pid, signal.SIGKILL)  # the supervisor, and its ranks with it
    job.await_nobody()
    job.rest()
    assert len(left) == 2 and not list(job.folder.glob("saved-*"))
    assert 'exec "${launcher[@]}" distill ' in (ROOT / "scripts" / "distill.sh").read_text().splitlines()[-1]


def test_the_number_of_ranks_and_the_port_are_taken_from_the_environment(python: Path, tmp_path: Path) -> None:
    told = subprocess.run(
        ["bash", "-c", 'python=$0; source scripts/launch.sh; launch env', str(python)],
        cwd=ROOT, env={**os.environ, "RANKS": "1", "MASTER_PORT": "23456"}, text=True, capture_output=True, check=True,
    ).stdout.split()  # fmt: skip
    assert {"RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=23456"} <= set(told)
    assert {"OMP_NUM_THREADS=1", "DS_ACCELERATOR=cpu"} <= set(told)

"""Starts toy runs under ``minillm launch`` and sees how they end. Waits are for files and ends, never for a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.rank_process import read_proc

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
"""After which a test gives up; a busy machine takes seconds for what takes tenths of one."""


@dataclass
class Job:
    """A supervisor, or a rank without one, and the folder of its run."""

    process: subprocess.Popen[str]
    folder: Path

    def await_file(self, name: str) -> str:
        """What stands in a file of the run, once it is there."""
        began = time.monotonic()
        while not (self.folder / name).exists():
            assert time.monotonic() - began < PATIENCE_S, f"no {name}: {self.rest()}"
            time.sleep(0.02)
        return (self.folder / name).read_text("utf-8")

    def end(self, patience_s: float = PATIENCE_S) -> tuple[int, str]:
        """Exit code and all that was printed."""
        try:
            printed, _ = self.process.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end: {self.rest()}") from None
        return self.process.returncode, printed

    def rest(self) -> str:
        """What was printed by a job that is given up."""
        self.process.kill()
        return str(self.process.communicate()[0])

    def pids(self, event: str = "pid") -> list[int]:
        """Processes that the run has named."""
        return [int(path.read_text()) for path in self.folder.glob(f"{event}-*")]

    def left(self) -> list[int]:
        """Those of its processes that still run."""
        return [pid for pid in (*self.pids(), *self.pids("child")) if read_proc(pid).state not in {"", "Z"}]

    def await_nobody(self) -> None:
        """Waits until none of them runs."""
        began = time.monotonic()
        while left := self.left():
            assert time.monotonic() - began < PATIENCE_S, left
            time.sleep(0.02)


def launched(
    folder: Path, *words: str, ranks: int = 2, limit_s: float = 20.0, module: str = "tests.stops.toy",
    command: Sequence[str] = (),
) -> Job:  # fmt: skip
    """A job under the supervisor: a module of the tests, or another command."""
    options = ["--ranks", str(ranks), "--limit", str(limit_s)]
    command = command or [sys.executable, "-m", module, str(folder), *words]
    return start(folder, [sys.executable, "-m", "minillm", "launch", *options, *command])


def bare(folder: Path, *words: str, rank: int = 0, ranks: int = 1) -> Job:
    """One rank by itself."""
    environment = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    return start(folder, [sys.executable, "-m", "tests.stops.toy", str(folder), *words], environment)


def start(folder: Path, words: list[str], environment: dict[str, str] | None = None) -> Job:
    """Starts it, with its own process group."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        words,
        cwd=ROOT, env={**os.environ, "TMPDIR": str(folder), **(environment or {})}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # A shell's background jobs ignore it, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )  # fmt: skip
    return Job(process, folder)

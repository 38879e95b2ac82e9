"""Lives of a real run: the command that a user gives, in a process that can be watched, signalled and killed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.checkpoint_manifest import MANIFEST, folder_name
from minillm.checkpoints import steps_in
from minillm.publish import weights_sha256
from minillm.run_listing import describe, fault_of
from minillm.run_log import OF_THE_PROCESS

ROOT = Path(__file__).resolve().parents[2]
OUTLIVES_S = 20.0
"""Seconds after the end of a launcher within which its ranks must be gone."""
_GOES_ON = re.compile(r"goes on from step ([\d,]+) of stage (\S+) \((step-\d+)\)")
_DIES_WITH_PARENT = 1
"""``PR_SET_PDEATHSIG`` of Linux."""


@dataclass(frozen=True, slots=True)
class WentOn:
    """Where a life began: ``checkpoint`` "" and step 0 where it began from nothing."""

    checkpoint: str = ""
    stage: str = ""
    step: int = 0


@dataclass(slots=True)
class Life:
    """One start of a run, until it ends or is ended."""

    process: subprocess.Popen[bytes]
    output: Path
    ranks: int
    began: float = field(default_factory=time.monotonic)
    _pids: list[int] = field(default_factory=list)

    def text(self) -> str:
        """What it has said so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def pids(self) -> list[int]:
        """Those of its ranks by number, as far as they are started."""
        if self.ranks == 1:
            return [self.process.pid]
        if len(self._pids) < self.ranks:
            self._pids = ranks_of(self.process.pid)
        return self._pids

    def sleep(self, seconds: float) -> bool:
        """Waits so long; False where the life ended before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return False
        return True

    def ended(self, limit_s: float) -> int:
        """Its exit code; ``TimeoutError`` where it does not end in time, and it is killed then."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"still running after {limit_s:.0f} s; {self.text()[-1000:]}") from None

    def kill(self) -> None:
        """Ends all of it at once."""
        for pid in {*self.pids(), self.process.pid}:
            send(pid, signal.SIGKILL)
        self.process.wait()

    def left_over(self) -> list[int]:
        """Ranks that live on ``OUTLIVES_S`` after the launcher."""
        until = time.monotonic() + OUTLIVES_S
        while (alive := [pid for pid in self._pids if _lives(pid)]) and time.monotonic() < until:
            time.sleep(0.1)
        return alive

    def went_on(self) -> WentOn | None:
        """Where it began, once it has said so; None where it has not, or began from nothing."""
        if match := _GOES_ON.search(self.text()):
            return WentOn(match[3], match[2], int(match[1].replace(",", "")))
        return None


def start(recipe: Path, output: Path, *, ranks: int, largest_file: int | None = None) -> Life:
    """``minillm launch … distill``, or ``minillm distill`` with one rank. ``largest_file``: bytes beyond which no file
    may grow, as on a disk that is full. It ends with this process."""
    command = [sys.executable, "-m", "minillm"]
    if ranks > 1:
        command += ["launch", "--ranks", str(ranks)]
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(_DIES_WITH_PARENT, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs have it ignored, and so would this
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as told:
        process = subprocess.Popen(
            [*command, "distill", "--config", str(recipe)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=told, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=prepare,  # noqa: PLW1509 (this process has one thread)
        )  # fmt: skip
    return Life(process, output, ranks)


def ranks_of(launcher: int) -> list[int]:
    """The processes of a launcher's ranks, by number."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text("ascii", "replace").rpartition(")")[2].split()[1])
                if parent == launcher and (match := re.search(rb"\0RANK=(\d+)", b"\0" + _environment(entry))):
                    found[int(match[1])] = int(entry.name)
    return [found[number] for number in sorted(found)]


def _environment(entry: Path) -> bytes:
    return (entry / "environ").read_bytes()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (OSError, IndexError):
        return False


def send(pid: int, number: int) -> None:
    """A signal to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def steps_logged(folder: Path) -> int:
    """Steps of all stages that a run has logged."""
    with contextlib.suppress(OSError):
        return (folder / "metrics.jsonl").read_bytes().count(b'"kind": "train"')
    return 0


def whole_checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints that verify, newest first."""
    root = folder / "checkpoints"
    names = [folder_name(step) for step in steps_in(root)]
    return [name for name in names if not fault_of(root / name)]


def step_of(checkpoint: Path, stages: Mapping[str, int]) -> int:
    """Steps of all stages that a checkpoint holds; ``stages`` says of each how many it has, in order."""
    stage = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["stage"]
    names = list(stages)
    before = sum(stages[name] for name in names[: names.index(stage)])
    record = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    return before + int(record["shared"]["progress"]["step"])


def outcome(folder: Path) -> dict[str, Any]:
    """What a run left, but for what a clock says: its log, its students, its answers, how it stands."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    stages = {path.parent.name: weights_sha256(path) for path in sorted(folder.glob("stages/*/student"))}
    return {
        "log": [{name: value for name, value in line.items() if name not in OF_THE_PROCESS} for line in lines],
        "students": {**stages, "last": weights_sha256(folder / "student")},
        "samples": (folder / "samples.jsonl").read_text(encoding="utf-8"),
        "left": sorted(path.name for path in folder.glob("checkpoints/*")),
        "state": describe(folder, root=folder).state,
    }

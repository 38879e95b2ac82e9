"""A toy run without torch: ``python -m tests.stops.toy FOLDER [PLAN [PHASE]]``, on one rank or two.

It goes through the phases of a run, step after step, meets the other rank in each, and asks ``Stops`` at the end of a
step. From the third step on rank 1 does what the plan says, in that phase. Each event leaves a file in FOLDER, named
by event and rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, cast

from minillm import exits, fault, phases
from minillm.stops import SIGNALS, Stops

if TYPE_CHECKING:
    from minillm.ranks import Ranks

COMPUTES_S = 5.0
PHASES = ("rollout", "scoring", "learning", "validation")
BEGINS = 3
RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Two:
    """As much of ``Ranks`` as is asked for, over a socket. A collective breaks when the other rank has ended, and waits
    as long as it lives."""

    def __init__(self) -> None:
        self.size = SIZE
        self._other: Connection | None = None
        if SIZE > 1 and RANK == 0:
            with Listener("socket") as listener:
                self._other = listener.accept()
        elif SIZE > 1:
            while self._other is None:  # which is there a moment before anybody listens at it
                with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                    self._other = Client("socket")
                time.sleep(0.01)

    def most(self, value: int) -> int:
        """The larger of the two values."""
        if self._other is None:
            return value
        self._other.send(value)
        return max(value, self._other.recv())


class Alone:
    """Ranks that do not agree: each knows its own signal only."""

    size = 2

    def most(self, value: int) -> int:
        """What this rank has."""
        return value


def note(event: str, text: str = "") -> None:
    """Leaves the event's file, whole at once."""
    part = Path(f".{event}-{RANK}")
    part.write_text(text, encoding="utf-8")
    part.rename(f"{event}-{RANK}")


def compute() -> None:
    """Many seconds of C that let no other thread run; then the run goes on, and stops."""
    few, took = 5 * 10**6, math.inf
    for _ in range(3):  # the fastest tells how many there are in those seconds; one alone may be a slow one
        began = time.process_time()
        sum(itertools.repeat(1, few))
        took = min(took, time.process_time() - began)
    began = time.monotonic()
    sum(itertools.repeat(1, int(few * COMPUTES_S / took)))
    note("computed", str(time.monotonic() - began))
    signal.raise_signal(signal.SIGTERM)


def leave_a_child() -> None:
    """A process of the rank's own that would live on."""
    child = subprocess.Popen(["sleep", "600"])
    note("child", str(child.pid))
    sleep_for_ever()


def sleep_for_ever() -> None:
    """Waits in Python, where a handler runs."""
    note("sleeps")
    while True:
        time.sleep(1)


def go_deaf() -> None:
    """Beats, and answers no signal."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    sleep_for_ever()


def speak() -> None:
    """A word on each stream, and the end of the run."""
    print("a word", flush=True)
    print("half a line", end="", file=sys.stderr, flush=True)
    signal.raise_signal(signal.SIGTERM)


PLANS: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "freeze": lambda: ctypes.PyDLL(None).sleep(600),  # holds Python's lock and works at nothing
    "alarm": lambda: os._exit(exits.ALARMED),
    "mistake": lambda: 1 // 0,
    "ask": lambda: signal.raise_signal(signal.SIGTERM),
    "alone": lambda: signal.raise_signal(signal.SIGTERM),
    "compute": compute,
    "child": leave_a_child,
    "sleep": sleep_for_ever,
    "deaf": go_deaf,
    "speak": speak,
}


def main(plan: str = "none", at: str = "rollout") -> int:
    """Runs until a signal or the plan ends it; the exit code."""
    phases.show()
    note("pid", str(os.getpid()))
    two, step, acted = Two(), 0, False
    asked = cast("Ranks", Alone() if plan == "alone" else two)

    def act(point: str, phase: str) -> None:
        nonlocal acted
        if (point, phase) == ("phase", at) and step >= BEGINS and RANK == SIZE - 1 and not acted:
            acted = True
            note("acts", str(time.time()))
            PLANS[plan]()

    with Stops() as stops, fault.planned(act):
        for step in itertools.count():
            for phase in PHASES:
                phases.enter(phase)
                time.sleep(0.005)
                two.most(0)
            if step == BEGINS:
                note("going")
                if at == "save" and RANK == SIZE - 1:
                    signal.raise_signal(signal.SIGTERM)
            if name := stops.agreed(asked):
                phases.enter("save")
                if plan != "alone":
                    two.most(0)
                note("saved", f"{step} {name}")
                return exits.STOPPED
    raise AssertionError


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    try:
        code = main(*sys.argv[2:])
    except (EOFError, ConnectionError):
        code = exits.RANK_LOST
    if code == exits.STOPPED:
        for number in SIGNALS:  # as the command line does; handlers go before the process does
            signal.signal(number, signal.SIG_IGN)
    note("ended", str(code))
    sys.exit(code)

"""The command ``minillm sft`` while it loads, without torch: ``python -m tests.stops.loads FOLDER [HOW]``.

``python`` waits in Python, ``c`` in a call into C that no signal ends, ``patient`` there too, with nobody who watches;
``steps`` goes on to what a run's steps do with a signal; ``forks`` ends a child of its own first.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

from minillm import cli, phases, stops
from minillm.errors import Stopped

FOLDER, HOW = Path(sys.argv[1]), sys.argv[2]
RANK = os.environ.get("RANK", "0")


def note(event: str) -> None:
    """Leaves the event's file."""
    (FOLDER / f"{event}-{RANK}").write_text(str(os.getpid()), encoding="utf-8")


def distill(settings: Any, **options: Any) -> None:
    """In the place of the run."""
    phases.enter("loading")
    if HOW == "steps":
        with stops.Stops() as heard:
            note("loads")
            while not heard.agreed(types.SimpleNamespace(size=1)):  # type: ignore[arg-type]
                time.sleep(0.01)
            time.sleep(1.5 * stops.WAITS_S)
            raise Stopped("SIGTERM: saved")
    if HOW == "forks":
        if not (child := os.fork()):
            time.sleep(600)
        time.sleep(0.2)
        os.kill(child, 15)
        ended = os.waitpid(child, 0)[1]
        time.sleep(1.5 * stops.WAITS_S)
        print(f"child ended by {os.WTERMSIG(ended)}, parent lives", flush=True)
    lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    note("loads")
    while HOW in {"python", "forks"}:
        time.sleep(0.01)
    libc.pthread_mutex_lock(lock)


if __name__ == "__main__":
    if HOW == "patient":
        stops.WAITS_S = 600.0
    sys.modules["minillm.api"] = types.SimpleNamespace(distill=distill)  # type: ignore[assignment]
    sys.argv[1:] = ["sft", "--config", "recipes/quickstart/teacher.yaml"]
    cli.main()

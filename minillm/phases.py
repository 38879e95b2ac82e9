"""What this process is doing, in a word, so that a rank that dies or hangs can be told with its place.

Under ``minillm launch`` the supervisor sees the word, too, beside a beat that a small thread gives. The beat shows that
the process runs, not that it gets on: a rollout may take minutes, and rank 0 may work alone while the others wait.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minillm import fault
from minillm.board import Board

BOARD = "MINILLM_BOARD"
"""Environment variable with the path of the supervisor's board."""
BEAT_S = 0.25
"""Seconds between two beats."""


class _State:
    """The phase of this process, and the slot that it shows it in."""

    def __init__(self) -> None:
        self.phase, self.since = "start", time.monotonic()
        self.spent: dict[str, float] = {}
        self.listeners: list[Callable[[str], None]] = []
        self.board: Board | None = None
        self.slot = 0


_state = _State()


def enter(phase: str) -> None:
    """From now on this process does ``phase``: rollout, scoring, learning, validation, save, evaluation, …

    Also a fault point, named ``phase``.
    """
    torch = sys.modules.get("torch")  # the supervisor has none
    if (
        torch is not None and torch.cuda.is_initialized()
    ):  # what the last phase asked of a GPU is its work, not the next one's
        torch.cuda.synchronize()
    now = time.monotonic()
    _state.spent[_state.phase] = _state.spent.get(_state.phase, 0.0) + now - _state.since
    _state.phase, _state.since = phase, now
    for hear in tuple(_state.listeners):
        hear(phase)
    if _state.board is not None:
        _state.board.enter(_state.slot, phase, _state.since)
    fault.point("phase", phase)


def current() -> str:
    """The phase entered last; ``start`` before the first."""
    return _state.phase


def seconds() -> dict[str, float]:
    """Seconds of this process in each phase so far, the present one included."""
    present = _state.spent.get(_state.phase, 0.0) + time.monotonic() - _state.since
    return {**_state.spent, _state.phase: present}


@contextlib.contextmanager
def heard(hear: Callable[[str], None]) -> Iterator[None]:
    """Calls ``hear`` with each phase that is entered while the block runs."""
    _state.listeners.append(hear)
    try:
        yield
    finally:
        _state.listeners.remove(hear)


def show() -> None:
    """Begins to beat, where a supervisor watches; does nothing elsewhere, and nothing the second time."""
    path = os.environ.get(BOARD)
    if path is None or _state.board is not None:
        return
    try:
        board = Board(Path(path))
    except (OSError, ValueError):  # another launcher's child, and the supervisor is gone
        return
    slot = int(os.environ.get("LOCAL_RANK", "0"))
    if not board.claim(slot, os.getpid()):
        return
    _state.board, _state.slot = board, slot
    board.enter(slot, _state.phase, _state.since)
    threading.Thread(target=_beat, args=(board, slot), name="beat", daemon=True).start()
    # A forked child has no such thread, and must not speak for its parent.
    os.register_at_fork(after_in_child=_forget)


def others() -> list[str]:
    """Where the other ranks of this node are, a phrase each; nothing without a supervisor."""
    if _state.board is None:
        return []
    now, first = time.monotonic(), int(os.environ.get("RANK", "0")) - _state.slot
    told = []
    for slot in range(_state.board.ranks):
        seen = _state.board.read(slot)
        if slot != _state.slot and seen.pid:
            told.append(f"rank {first + slot} (pid {seen.pid}): {seen.phase}, for {now - seen.since:.1f} s")
    return told


def _beat(board: Board, slot: int) -> None:
    count = 0
    while True:
        count += 1
        board.beat(slot, count)
        time.sleep(BEAT_S)


def _forget() -> None:
    _state.board = None

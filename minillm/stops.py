"""Signals that ask a run to stop: noted when they come, answered where all ranks can stop together; told where they end
the process as it stands."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from minillm import exits, phases

if TYPE_CHECKING:
    from minillm.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0
"""Seconds in which a second signal counts as the first one: a cluster may signal a rank and its launcher alike, and the
launcher hands its own on."""
WAITS_S = 1.0
"""Seconds that a process has to answer in Python, before a thread ends it that waits in C."""


@contextlib.contextmanager
def told_ends() -> Iterator[None]:
    """For the time of the block, a SIGTERM that nobody in it takes ends the process as ever, and a line on rank 0 says
    in which phase, and with which code. Only where nobody had it before, and where signals are ours (``Stops``).
    """
    alone = threading.current_thread() is threading.main_thread() and not _by_hand()
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def watch() -> None:
        # Python runs no handler while its main thread is in C, where a rank may wait half an hour for the others.
        with os.fdopen(reader, "rb", buffering=0) as told:
            while number := told.read(1):
                ours = number[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is _end
                time.sleep(WAITS_S)
                if ours and signal.getsignal(signal.SIGTERM) is _end:
                    _tell_end()
                    os._exit(exits.by_signal(signal.SIGTERM))

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _end)
    threading.Thread(target=watch, name="told ends", daemon=True).start()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _end:  # not one that Stops leaves behind on the way out
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        os.close(writer)  # which ends the thread


def _end(number: int, frame: FrameType | None) -> None:
    _tell_end()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _forget() -> None:
    """In a forked child, whose end is none of its parent, but would be told through the same pipe."""
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget)


def _tell_end() -> None:
    """Past Python's buffers, which the main thread may be in."""
    if os.environ.get("RANK", "0") == "0":
        code = exits.by_signal(signal.SIGTERM)
        line = f"SIGTERM in phase {phases.current()}: ends without a save, code {code}; the same command goes on from "
        os.write(2, f"{line}what is saved, or begins\n".encode())


class Stops:
    """For the time of the block, SIGTERM and SIGINT set a flag and do nothing else; a second one, a second later or
    more, leaves at once with ``exits.by_signal`` and publishes nothing.

    Only where signals are ours: in the main thread, outside a notebook or an interactive Python, and not for a signal
    that is ignored already, as ``nohup`` and a shell's background jobs have it. A signal that nobody has answered when
    the block ends well is given again to whom it belongs then.

    Who owned the signals before owns them again afterwards, but not within ``SAME_S`` of the first one: the same signal
    may come once more, while the process is on its way out.
    """

    def __init__(self) -> None:
        self._number = 0
        self._when = 0.0
        self._answered = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stops:
        if threading.current_thread() is threading.main_thread() and not _by_hand():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:  # None: not installed from Python
                    self._before[number] = before
                    signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._answered and time.monotonic() - self._when < SAME_S:
            return
        for number, before in self._before.items():
            signal.signal(number, before)
        if kind is None and self._number and not self._answered:
            signal.raise_signal(self._number)

    def agreed(self, ranks: Ranks) -> str:
        """Name of the signal that stops the run here, the same on every rank, or ``""``; all ranks must ask.

        One rank's signal stops all. One small all-reduce; none with one process.
        """
        number = self._number if ranks.size == 1 else ranks.most(self._number)
        if number and not self._answered:
            self._answered = True
            self._when = self._when or time.monotonic()  # another rank's: ours may come while we are on our way out
        return signal.Signals(number).name if number else ""

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._number:
            self._number, self._when = number, now
        elif now - self._when >= SAME_S:
            os._exit(exits.by_signal(number))


def _by_hand() -> bool:
    """Whether a person works in this process, whose Ctrl-C must interrupt at once."""
    shell = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or (shell is not None and shell.get_ipython() is not None)

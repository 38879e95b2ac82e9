"""Signals that ask a run to stop: noted when they come, answered where all ranks can stop together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from minillm import exits

if TYPE_CHECKING:
    from minillm.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0
"""Seconds in which a second signal counts as the first one: a cluster may signal a rank and its launcher alike, and the
launcher hands its own on."""


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
        self._answered = self._answered or number > 0
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

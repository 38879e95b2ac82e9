"""How the launcher of one host hears from the one that started it on all hosts.

Signals do not travel over ssh, and a command that ssh has started lives on when ssh is gone. So the launcher of a host
reads its standard input: a line is the number of a signal, or 0 for "still here". The end of the input, or silence,
says that nobody holds the other end any more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

BEAT_S = 1.0
"""Seconds between two signs of life."""
SILENCE = 3.0
"""Silence that counts as an end, as a multiple of the launch's limit."""
PATIENCE = 15.0
"""How long ranks may take to save and stop after that, as a multiple of the limit: five minutes of the usual one."""


class Leash:
    """The end that the host's launcher holds. ``hear`` is told the signals, of which ``SIGKILL`` must end all at once;
    ``lost`` is called once, when nobody holds the other end any more."""

    def __init__(
        self, descriptor: int, hear: Callable[[int], None], *, lost: Callable[[], None], limit_s: float
    ) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor, self._hear, self._lost, self._limit_s = descriptor, hear, lost, limit_s
        self._begun, self._last = b"", time.monotonic()
        self._lost_at: float | None = None

    def fileno(self) -> int:
        """For a selector."""
        return self._descriptor

    def pass_on(self) -> bool:
        """Tells what has come; False at the end of the input."""
        try:
            heard = os.read(self._descriptor, 4096)
        except BlockingIOError:
            return True
        except OSError:  # a terminal that is gone
            heard = b""
        if not heard:
            self._lose()
            return False
        self._last = time.monotonic()
        *lines, self._begun = (self._begun + heard).split(b"\n")
        for line in lines:
            if line.strip().isdigit() and int(line) in {signal.SIGTERM, signal.SIGINT, signal.SIGKILL}:
                self._hear(int(line))
        return True

    def look(self, now: float) -> bool:
        """Notes a silence that is too long. Whether the ranks have had their time after the end, and must go."""
        if self._lost_at is None and now - self._last > SILENCE * self._limit_s:
            self._lose()
        return self._lost_at is not None and now - self._lost_at > PATIENCE * self._limit_s

    def _lose(self) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            self._lost()

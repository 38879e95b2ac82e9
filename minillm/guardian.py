"""A process that outlives the supervisor by a moment, so that no rank does by more."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from pathlib import Path

_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Guardian:
    """Kills the process groups that it was told of as soon as this process is gone, however it went, and removes
    ``folder``.

    It hears of the end through a pipe that the kernel closes. To be made before any thread is started.
    """

    def __init__(self, folder: Path) -> None:
        ours, self._told = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            # Nothing of the parent may run in the child: neither its clean-up nor its handlers.
            try:
                os.close(self._told)
                _guard(ours, folder)
            finally:
                os._exit(0)
        os.close(ours)

    def watch(self, group: int) -> None:
        """From now on this process group ends with us."""
        os.write(self._told, f"{group}\n".encode())

    def dismiss(self) -> None:
        """Kills what is left of the groups now."""
        os.close(self._told)
        os.waitpid(self._pid, 0)


def _guard(ears: int, folder: Path) -> None:
    for number in _DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    os.setsid()  # a signal to the supervisor's group is not for us
    # A reader of the supervisor's output waits until all who may write have closed it; so with any other file.
    os.dup2(ears, 0)
    os.closerange(1, os.sysconf("SC_OPEN_MAX"))
    heard = b""
    while more := os.read(0, 4096):
        heard += more
    for group in heard.decode().split():
        kill_group(int(group), signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def kill_group(group: int, number: int) -> None:
    """Signals a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)

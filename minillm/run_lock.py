"""One process at a time works in a run's folder: a lock that the kernel holds, so that a dead owner lets go of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from minillm.errors import DataError, RunInUse

LOCK = ".lock"
"""The file that is locked. It stays, and says who held it last."""
PAUSES_S = (0.01, 0.05, 0.1, 0.2)
"""Before each further try to take a lock: who only asks whose it is (``owner``) holds it, too, for an instant."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the folder's lock for the time of the block; ``RunInUse``, naming the owner, where another process does.

    One rank holds it for all. A process forked in the block holds it too, until both have ended.
    """
    with _opened(folder / LOCK) as file:
        if not any(_locked(file, pause) for pause in (0.0, *PAUSES_S)):  # closing the file lets go of it
            file.seek(0)
            owner = file.readline(200).strip() or "another process"
            raise RunInUse(
                f"{folder}: {owner} works in it, wanted a folder that nobody works in\n"
                "  wait for it or end it, or give this run another name (name=NAME)"
            )
        since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        text = f"process {os.getpid()} on {socket.gethostname()}, since {since}\n{secrets.token_hex(4)}\n"
        try:
            file.truncate(0)
            os.write(file.fileno(), text.encode())
            os.fsync(file.fileno())  # over a network nobody else sees it before
        except OSError as error:
            error.filename = str(folder / LOCK)  # the system names no file in which there was no room
            raise
        yield


def _locked(file: TextIO, pause: float) -> bool:
    time.sleep(pause)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(lock: Path) -> TextIO:
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        what = "a link, wanted a file" if lock.is_symlink() else f"cannot be opened: {error.strerror}"
        raise DataError(f"{lock}: {what}\n  remove it, or give this run another name (name=NAME)") from error
    return os.fdopen(handle, "r+", encoding="utf-8", errors="replace")


def says(folder: Path) -> str:
    """The text of a folder's lock, which no other folder has; "" where there is none to be seen."""
    try:
        return (folder / LOCK).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def owner(folder: Path) -> str:
    """Who works in a folder now, as its lock says; "" where nobody does."""
    try:
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.readline(200).strip() or "another process"
    except OSError:
        pass  # no lock, so nobody
    return ""

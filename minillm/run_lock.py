"""One process at a time works in a run's folder: a lock that the kernel holds, so that a dead owner lets go of it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from minillm.errors import RunInUse

LOCK = ".lock"
"""The file that is locked. It stays, and says who held it last."""


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds the folder's lock for the time of the block; ``RunInUse``, naming the owner, where another process does.

    One rank holds it for all. A process forked in the block holds it too, until both have ended.
    """
    with (folder / LOCK).open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # closing the file lets go of it
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise RunInUse(
                f"{folder}: {owner} works in it, wanted a folder that nobody works in\n"
                "  wait for it or end it, or give this run another name (name=NAME)"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        yield


def owner(folder: Path) -> str:
    """Who works in a folder now, as its lock says; "" where nobody does."""
    try:
        with (folder / LOCK).open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).strip() or "another process"
    except OSError:
        pass  # no lock, so nobody
    return ""

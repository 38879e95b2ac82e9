"""The log of a run: it grows by whole lines, and lines that the disk does not take are kept until it does."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from minillm.disk import sync
from minillm.errors import CheckpointError, DiskError, as_disk_error

OF_THE_PROCESS = ("seconds", "speed", "teacher_gathers", "teacher_gathered_bytes")
"""Figures of a step that tell what the processes took for it. A run that goes on may have others: the clock is not its
clock, and DeepSpeed gathers layers that it knows already in fewer, larger pieces."""


class RunLog:
    """One file of lines, written by one process."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._kept: list[bytes] = []
        """Lines that are not in the file."""
        self._whole = 0
        """Bytes that must be in the file; none before this process has written a line."""
        self._torn = False
        """Whether there may be some more, of a line that was not written to its end."""
        self._refused = ""
        """Why lines are kept; told once."""

    def add(self, line: str) -> None:
        """Brings a line to the file, or keeps it and tells that once: what a log meets ends no run."""
        self._kept.append(line.encode())
        with contextlib.suppress(DiskError):
            self.flush()

    def flush(self) -> None:
        """Brings the lines that are kept to the file; ``DiskError`` where they cannot be written."""
        try:
            self._write()
        except OSError as error:
            reason = error.strerror or str(error)
            if not self._refused:
                note(f"{self._file} cannot be written ({reason}); its lines are kept and tried again")
            self._refused = reason
            count = f"{len(self._kept):,} line{'s' if len(self._kept) > 1 else ''} not written"
            error.filename = str(self._file)
            raise as_disk_error(error, what=count) or error from error
        if self._refused:
            note(f"{self._file} is written again, and has all its lines")
            self._refused = ""

    def length(self) -> int:
        """Its bytes, all of them on the disk once this returns; 0 where there is none. ``DiskError`` where lines cannot
        be written."""
        self.flush()
        if not self._file.is_file():
            return 0
        for path in (self._file, self._file.parent):
            sync(path)
        return self._file.stat().st_size

    def cut(self, length: int) -> None:
        """Takes away what was added after ``length`` gave this number.

        ``CheckpointError`` where the file is not one that was so long at the end of a line.
        """
        remedy = "put the file back as the run left it, or start over with --fresh"
        if self._file.is_symlink():
            raise CheckpointError(f"{self._file}: a link, wanted the checkpoint's log\n  {remedy}")
        found = self._file.stat().st_size if self._file.is_file() else 0
        if found < length:
            raise CheckpointError(f"{self._file}: {found:,} bytes, wanted the {length:,} of the checkpoint\n  {remedy}")
        self._kept, self._whole, self._torn = [], length, False
        if found == 0:
            return
        with self._file.open("r+b") as log:
            log.seek(max(0, length - 1))
            if length and log.read(1) != b"\n":
                raise CheckpointError(
                    f"{self._file}: no line ends at byte {length:,}, wanted the checkpoint's log\n  {remedy}"
                )
            log.truncate(length)
            os.fsync(log.fileno())

    def _write(self) -> None:
        """All lines that are kept, or none."""
        if not self._kept:
            return
        with self._file.open("ab", buffering=0) as log:
            found = log.seek(0, os.SEEK_END)
            if found < self._whole:  # another file in the place of one that is gone would hide which lines went with it
                raise OSError(None, f"it has {found:,} bytes of the {self._whole:,} that were written")
            if not self._torn:
                self._whole = found
            elif found > self._whole:
                log.truncate(self._whole)
            content = b"".join(self._kept)
            self._torn, left = True, memoryview(content)
            try:
                while left:
                    left = left[log.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):  # nobody need read half a line; tried again in any case
                    log.truncate(self._whole)
                raise
        # Only now: some file systems say that they are full when a file is closed.
        self._kept, self._whole, self._torn = [], self._whole + len(content), False


def note(words: str) -> None:
    """Says what a run goes on in spite of."""
    with contextlib.suppress(OSError):  # what is printed may go to the same disk
        print(f"note: {words}", file=sys.stderr, flush=True)

"""Disks that stand in the place of the real one: one that records what it does, one that is full."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from minillm.disk import RealDisk


@dataclass(frozen=True)
class Operation:
    """One operation that was done: on what, and with what."""

    kind: str
    path: Path
    content: bytes = b""
    target: Path | None = None


class Killed(BaseException):
    """The process is dead: nothing that it was about to do is done, no cleaning either."""


class Recording:
    """The real disk, with a list of what it did.

    ``without``: the number of a sync that is left out, as if the line of the library were not there.
    ``dies_at``: the number of an operation before which the process ends.
    """

    def __init__(self, *, without: int | None = None, dies_at: int | None = None) -> None:
        self.done: list[Operation] = []
        self._real, self._paths, self._wall = RealDisk(), dict[int, Path](), threading.Lock()
        self._without, self._dies_at, self._syncs, self._begun = without, dies_at, 0, 0

    def _begin(self) -> None:
        self._begun += 1
        if self._dies_at is not None and self._begun > self._dies_at:
            raise Killed

    def _sync(self) -> bool:
        self._begin()
        self._syncs += 1
        return self._syncs - 1 != self._without

    def make_folder(self, path: Path) -> None:
        with self._wall:
            self._begin()
            self._real.make_folder(path)
            self.done.append(Operation("make_folder", path))

    def create(self, path: Path) -> int:
        with self._wall:
            self._begin()
            file = self._real.create(path)
            self._paths[file] = path
            self.done.append(Operation("create", path))
            return file

    def write(self, file: int, content: memoryview) -> None:
        with self._wall:
            self._begin()
            self._real.write(file, content)
            self.done.append(Operation("write", self._paths[file], bytes(content)))

    def sync(self, file: int) -> None:
        with self._wall:
            if self._sync():
                self.done.append(Operation("sync", self._paths[file]))

    def close(self, file: int) -> None:
        with self._wall:
            self._real.close(file)
            del self._paths[file]

    def sync_folder(self, path: Path) -> None:
        with self._wall:
            if self._sync():
                self.done.append(Operation("sync_folder", path))

    def rename(self, source: Path, target: Path) -> None:
        with self._wall:
            self._begin()
            self._real.rename(source, target)
            self.done.append(Operation("rename", source, target=target))

    def remove(self, path: Path) -> None:
        with self._wall:
            self._begin()
            self._real.remove(path)
            self.done.append(Operation("remove", path))

    @property
    def syncs(self) -> int:
        """How many there were."""
        return self._syncs


class Full:
    """The real disk until it is full: then nothing is made, written, synced or renamed any more.

    ``room``: bytes that still go onto it; a write that does not fit leaves its beginning. ``at``: the number of an
    operation, removals included, from which on it refuses all but removals that come after.
    """

    def __init__(self, *, room: int | None = None, at: int | None = None) -> None:
        self._real, self._room, self._at, self._begun = RealDisk(), room, at, 0

    def _refuse(self) -> bool:
        self._begun += 1
        return self._at is not None and self._begun > self._at

    def _begin(self) -> None:
        if self._refuse() or (self._room is not None and self._room < 0):
            raise full()

    def make_folder(self, path: Path) -> None:
        self._begin()
        self._real.make_folder(path)

    def create(self, path: Path) -> int:
        self._begin()
        return self._real.create(path)

    def write(self, file: int, content: memoryview) -> None:
        self._begin()
        if self._room is not None:
            kept, self._room = content[: self._room], self._room - content.nbytes
            if self._room < 0:
                self._real.write(file, kept)
                raise full()
        self._real.write(file, content)

    def sync(self, file: int) -> None:
        self._begin()
        self._real.sync(file)

    def close(self, file: int) -> None:
        self._real.close(file)

    def sync_folder(self, path: Path) -> None:
        self._begin()
        self._real.sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._begin()
        self._real.rename(source, target)

    def remove(self, path: Path) -> None:
        if self._refuse() and self._begun == (self._at or 0) + 1:
            raise full()
        self._real.remove(path)


def full() -> OSError:
    """What the system says of a full disk."""
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

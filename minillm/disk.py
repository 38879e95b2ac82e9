"""Where checkpoints meet the disk: each of their writes is one of these operations.

Tests put another disk in the place of the real one: one that records, so that every state which a power cut may leave
can be enumerated, or one that is full.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

from minillm import fault

Content = bytes | bytearray | memoryview


class Disk(Protocol):
    """The operations. Each raises ``OSError`` where it cannot be done."""

    def make_folder(self, path: Path) -> None:
        """Makes a folder that was not there."""

    def create(self, path: Path) -> int:
        """Makes a file that was not there, and gives the descriptor to write it by."""

    def write(self, file: int, content: memoryview) -> None:
        """Adds bytes to a file, all of them."""

    def sync(self, file: int) -> None:
        """Waits until a file's bytes are on the disk."""

    def close(self, file: int) -> None:
        """Lets go of a descriptor."""

    def sync_folder(self, path: Path) -> None:
        """Waits until the names in a folder are on the disk."""

    def rename(self, source: Path, target: Path) -> None:
        """Gives a folder another name beside its present one, in one step."""

    def remove(self, path: Path) -> None:
        """Removes a file, a link or an empty folder."""


class RealDisk:
    """The machine's own. After each operation it passes the fault point ``disk.OPERATION``."""

    def make_folder(self, path: Path) -> None:
        """Makes a folder that was not there."""
        path.mkdir()
        fault.point("disk.make_folder", path.name)

    def create(self, path: Path) -> int:
        """Makes a file that was not there; a link of that name counts as being there."""
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        fault.point("disk.create", path.name)
        return file

    def write(self, file: int, content: memoryview) -> None:
        """Adds bytes to a file; the system may take them in several pieces."""
        while content:
            content = content[os.write(file, content) :]
        fault.point("disk.write")

    def sync(self, file: int) -> None:
        """Waits until a file's bytes are on the disk."""
        os.fsync(file)
        fault.point("disk.sync")

    def close(self, file: int) -> None:
        """Lets go of a descriptor."""
        os.close(file)

    def sync_folder(self, path: Path) -> None:
        """Waits until the names in a folder are on the disk: a rename alone survives the program's end only."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        fault.point("disk.sync_folder", path.name)

    def rename(self, source: Path, target: Path) -> None:
        """Gives a folder another name."""
        source.rename(target)
        fault.point("disk.rename", target.name)

    def remove(self, path: Path) -> None:
        """Removes a file, a link or an empty folder; what a link leads to stays."""
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
        fault.point("disk.remove", path.name)


DISK = RealDisk()


class Sink:
    """Takes one file's bytes to the disk, counted and hashed on their way: no file is read again or held whole."""

    def __init__(self, disk: Disk, file: int) -> None:
        self._disk, self._file, self._hash = disk, file, hashlib.sha256()
        self.bytes = 0

    @property
    def sha256(self) -> str:
        """Of what was written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, content: Content) -> None:
        """Adds bytes. An array's buffer may be given as it is, where its elements follow each other in memory."""
        view = memoryview(content)
        if view.nbytes:
            view = view.cast("B")
            self._disk.write(self._file, view)
            self._hash.update(view)
            self.bytes += view.nbytes


def write_file(disk: Disk, path: Path, content: Content) -> None:
    """A new file of these bytes, on the disk when this returns but for its name, which its folder's sync brings."""
    file = disk.create(path)
    try:
        Sink(disk, file).write(content)
        disk.sync(file)
    finally:
        disk.close(file)


def remove_tree(disk: Disk, folder: Path) -> None:
    """Removes a folder and all that is in it; links are removed, not followed, and so is ``folder`` if it is one."""
    # os.walk does not follow the links that it meets, but it follows the one that it is given.
    for at, folders, files in () if folder.is_symlink() else os.walk(folder, topdown=False):
        for name in sorted([*folders, *files]):
            disk.remove(Path(at) / name)
    disk.remove(folder)


def sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's names, to the disk: a rename alone survives a crash of the program only."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

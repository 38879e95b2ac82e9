"""A small file that the ranks of one node write their state into and their supervisor reads: alive, and doing what.

It is mapped into memory, so that a beat or a change of phase costs no system call and waits for nobody. Each rank has a
slot of its own and is its only writer.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

_SLOT = struct.Struct("=qqd64s")
_PID, _BEATS, _PHASE = struct.Struct("=q"), struct.Struct("=q"), struct.Struct("=d64s")


class Seen(NamedTuple):
    """What a rank has written."""

    pid: int
    """0 for one that has not begun to beat."""
    beats: int
    since: float
    """When it entered its phase, by ``time.monotonic``, which all processes of a Linux node share."""
    phase: str
    """``""`` before it has named one."""


class Board:
    """The slots of ``ranks`` ranks in the file at ``path``, which ``made`` has made."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.ranks = len(self._map) // _SLOT.size

    @classmethod
    def made(cls, path: Path, *, ranks: int) -> Board:
        """A new, empty board."""
        path.write_bytes(bytes(_SLOT.size * ranks))  # written out: a hole could meet a full disk when it is filled
        return cls(path)

    def read(self, slot: int) -> Seen:
        """What stands in a slot, counted from 0 on each node."""
        pid, beats, since, phase = _SLOT.unpack_from(self._map, slot * _SLOT.size)
        return Seen(pid, beats, since, phase.rstrip(b"\0").decode("utf-8", "replace"))

    def claim(self, slot: int, pid: int) -> bool:
        """Whether this process may write there: the first that asks may, and not a child that it starts later."""
        at = slot * _SLOT.size
        if not 0 <= slot < self.ranks or _PID.unpack_from(self._map, at)[0]:
            return False
        _PID.pack_into(self._map, at, pid)
        return True

    def beat(self, slot: int, count: int) -> None:
        """The rank runs: ``count`` differs from the last one."""
        _BEATS.pack_into(self._map, slot * _SLOT.size + _PID.size, count)

    def enter(self, slot: int, phase: str, since: float) -> None:
        """The rank does something else from now on."""
        name = phase.encode()[:64]
        _PHASE.pack_into(self._map, slot * _SLOT.size + _PID.size + _BEATS.size, since, name)

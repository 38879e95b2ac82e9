"""Which row had an id first, exact, in a few bytes a row: the ids of millions are kept on the disk."""

from __future__ import annotations

import hashlib
import json
import tempfile
import weakref
from array import array
from bisect import bisect_left
from typing import IO

FRESH = 16_384
"""Ids that are kept in memory as they are before they are put away."""


class RowNames:
    """Ids and where their rows are. Of those that are put away 16 bytes each are in memory: a digest, and the place of
    the id itself in a file that nobody else sees, which is read where two digests are the same."""

    def __init__(self, *, fresh: int = FRESH) -> None:
        self._most, self._fresh = fresh, dict[str, str]()
        self._digests, self._offsets = array("Q"), array("Q")
        self._file: IO[bytes] | None = None

    def first(self, name: str) -> str | None:
        """Where the row is that has this id; None where there is none."""
        if (place := self._fresh.get(name)) is not None or not self._digests:
            return place
        digest = _digest(name)
        at = bisect_left(self._digests, digest)
        while at < len(self._digests) and self._digests[at] == digest:
            stored, place = self._stored(self._offsets[at])
            if stored == name:
                return place
            at += 1
        return None

    def add(self, name: str, place: str) -> None:
        """Notes where the first row of this id is."""
        self._fresh[name] = place
        if len(self._fresh) >= self._most:
            self._put_away()

    def _put_away(self) -> None:
        import numpy

        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (as long as this object)
            weakref.finalize(self, self._file.close)
        offset = self._file.seek(0, 2)
        digests, offsets = array("Q"), array("Q")
        for name, place in self._fresh.items():
            digests.append(_digest(name))
            offsets.append(offset)
            offset += self._file.write(json.dumps([name, place]).encode() + b"\n")
        self._fresh.clear()
        every = numpy.concatenate([numpy.frombuffer(part, "uint64") for part in (self._digests, digests) if part])
        places = numpy.concatenate([numpy.frombuffer(part, "uint64") for part in (self._offsets, offsets) if part])
        order = numpy.argsort(every, kind="stable")  # of two sorted runs: a merge
        self._digests, self._offsets = array("Q"), array("Q")
        self._digests.frombytes(every[order].tobytes())
        self._offsets.frombytes(places[order].tobytes())

    def _stored(self, offset: int) -> tuple[str, str]:
        assert self._file is not None
        self._file.seek(offset)
        name, place = json.loads(self._file.readline())
        return name, place


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")

"""Whether a name that stands in a file may lead to a place on the disk: one function decides."""

from __future__ import annotations

from pathlib import Path

from minillm.errors import DataError
from minillm.stage_base import is_component

LONGEST = 255
"""Bytes that file systems give a name."""


def inside(root: Path, name: str, *, source: Path) -> Path:
    """Where a file or folder of this name stands in ``root``; ``DataError`` naming ``source``, the file that the name
    is from, unless it is the name of one and stands there once links are followed.
    """
    if not (is_component(name) and len(name) <= LONGEST):
        shown = name if len(name) <= LONGEST else name[:LONGEST] + "…"
        raise DataError(
            f"{source}: names {shown!r}, wanted letters, digits, '.', '_' and '-', {LONGEST} at most\n"
            "  the file was changed, or is of another program; fetch or make it again"
        )
    path = root / name
    try:
        kept = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a ring
        kept = False
    if not kept:
        raise DataError(
            f"{source}: names {name!r}, a link that leads out of {root}\n  put what it leads to in its place"
        )
    return path

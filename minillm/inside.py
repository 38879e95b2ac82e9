"""Whether a name that stands in a file may lead to a place on the disk: one function decides."""

from __future__ import annotations

from pathlib import Path

from minillm.errors import DataError
from minillm.stage_base import LONGEST_NAME, is_component


def inside(root: Path, name: str, *, source: Path) -> Path:
    """Where a file or folder of this name stands in ``root``; ``DataError`` naming ``source``, the file that the name
    is from, unless it is the name of one and stands there once links are followed.
    """
    if not is_component(name):
        shown = name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…"
        raise DataError(
            f"{source}: names {shown!r}, wanted letters, digits, '.', '_' and '-', {LONGEST_NAME} at most\n"
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

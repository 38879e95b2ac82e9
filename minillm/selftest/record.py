"""Where the outcome of a self-test goes when a file is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.errors import DataError
from minillm.store import require_writable, write_text

FIELDS = ("passed", "failed", "versions", "checks")


def require_usable(file: Path) -> None:
    """Raise ``DataError`` unless this file can be written, and is new or holds an earlier outcome."""
    require_writable(file)
    if file.exists() and not _is_an_outcome(file):
        raise DataError(f"{file} is there, and not the outcome of a self-test\n  name another file, or remove this one")


def write_outcome(file: Path, outcome: dict[str, Any]) -> None:
    """Writes it whole or not at all."""
    assert tuple(outcome) == FIELDS, tuple(outcome)
    write_text(file, json.dumps(outcome, indent=2, allow_nan=False) + "\n")


def _is_an_outcome(file: Path) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and set(FIELDS) <= found.keys()

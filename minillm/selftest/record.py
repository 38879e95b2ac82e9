"""Where the outcome of a self-test goes when a file is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minillm.own_files import OwnFile, json_file

FIELDS = ("passed", "failed", "versions", "checks")


def require_usable(file: Path) -> None:
    """Raise ``DataError`` unless this file can be written, and is new or holds an earlier outcome."""
    _own(file).require()


def write_outcome(file: Path, outcome: dict[str, Any]) -> None:
    """Writes it whole or not at all."""
    assert tuple(outcome) == FIELDS, tuple(outcome)
    _own(file).write((json.dumps(outcome, indent=2, allow_nan=False) + "\n").encode())


def _own(file: Path) -> OwnFile:
    return json_file(file, what="the outcome of a self-test", fits=lambda found: set(FIELDS) <= found.keys())

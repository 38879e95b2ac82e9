"""Answers on the disk, so that an interrupted or repeated judging asks nothing twice. The key is never in it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.errors import DataError
from minillm.judge.prompts import is_verdict

TEXTS = ("key", "reply", "model")
"""What a line has beside its verdict."""


def fingerprint(
    *, endpoint: str, model: str, messages: Sequence[Mapping[str, str]], settings: Mapping[str, Any], form: str
) -> str:
    """SHA-256 of what was asked of whom."""
    asked = [endpoint, model, [dict(message) for message in messages], dict(settings), form]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Cache:
    """A file of JSON lines that only grows; broken lines are counted and passed over. Safe for several threads."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, threading.Lock()
        self.broken: list[int] = []
        """Numbers of the lines that could not be read."""
        self._rows: dict[str, dict[str, Any]] = {}
        try:
            raw = file.read_bytes()
        except FileNotFoundError:
            raw = b""
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; move it away, or name another --out") from None
        for number, line in enumerate(raw.split(b"\n"), start=1):
            if not line.strip():
                continue
            row = _row(line)
            if row is None:
                self.broken.append(number)
            else:
                self._rows[row["key"]] = row
        # A process that was killed while writing left a line without its end; the next one must not join it.
        self._ragged = bool(raw) and not raw.endswith(b"\n")

    def get(self, key: str) -> dict[str, Any] | None:
        """What was answered, if it was."""
        with self._lock:
            return self._rows.get(key)

    def put(self, row: dict[str, Any]) -> None:
        """Keeps an answer, on the disk at once."""
        with self._lock:
            self._rows[row["key"]] = row
            with self._file.open("a", encoding="utf-8") as file:
                file.write(("\n" if self._ragged else "") + json.dumps(row) + "\n")
            self._ragged = False


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's content; None where it is not what this class writes."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in TEXTS):
        return None
    return row if is_verdict(row.get("verdict")) else None

"""Records beside files that we wrote: JSON of a strict class of settings, or an error that says how to mend it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from minillm.errors import ConfigError, DataError
from minillm.settings import Settings, headed

LONGEST = 300
"""Digits of a whole number in JSON: one that no real number reaches ends arithmetic further on."""
Record = TypeVar("Record", bound=Settings)


def parsed(text: str | bytes) -> Any:
    """The value that a JSON text says; whatever is wrong with it is a ``ValueError``: bytes that are not UTF-8, numbers
    without end, and lists in lists without end, where ``json`` itself raises something else."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _whole(digits: str) -> int:
    if len(digits) > LONGEST:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def read_record(file: Path, kind: type[Record], *, fault: type[DataError], again: str) -> Record | None:
    """The record in ``file``, or None where there is none; ``fault`` with the remedy ``again`` where it cannot be
    read."""
    if not file.is_file():
        return None
    try:
        values = parsed(file.read_bytes())
    except ValueError as error:
        raise fault(f"{file}: not JSON: {error}\n  {again}") from error
    if not isinstance(values, dict):
        raise fault(f"{file}: holds no JSON object, so it is no manifest\n  {again}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise fault(f"{headed(str(error).splitlines(), source=str(file))}\n  {again}") from error


def sha256_of(file: Path) -> str:
    """Of a file's bytes, read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

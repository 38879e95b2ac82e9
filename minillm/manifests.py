"""Records beside files that we wrote: JSON of a strict class of settings, or an error that says how to mend it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TypeVar

from minillm.errors import ConfigError, DataError
from minillm.settings import Settings, headed

Record = TypeVar("Record", bound=Settings)


def read_record(file: Path, kind: type[Record], *, fault: type[DataError], again: str) -> Record | None:
    """The record in ``file``, or None where there is none; ``fault`` with the remedy ``again`` where it cannot be
    read."""
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # not UTF-8 is one too; records within records without end
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

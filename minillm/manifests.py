"""Records beside files that we wrote: JSON of a strict class of settings, or an error that says how to mend it."""

from __future__ import annotations

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
    except ValueError as error:  # not UTF-8 is one too
        raise fault(f"{file}: not JSON: {error}\n  {again}") from error
    if not isinstance(values, dict):
        raise fault(f"{file}: holds no JSON object, so it is no manifest\n  {again}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise fault(f"{headed(str(error).splitlines(), source=str(file))}\n  {again}") from error

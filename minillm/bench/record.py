"""Where figures go: one section of a JSON file that all benchmarks share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.errors import DataError
from minillm.manifests import parsed
from minillm.results import versions
from minillm.store import require_writable, write_text

SCHEMA = 1


def write_section(file: Path, name: str, section: Mapping[str, Any]) -> None:
    """Puts a benchmark's figures (plain values, or dataclasses of them), with the versions they were measured with,
    under its name; other sections stay.

    Raises ``DataError`` where the file is there and holds something else.
    """
    found = sections(file)
    found[name] = {**section, "versions": versions()}
    write_text(file, json.dumps(found, indent=2, default=dataclasses.asdict) + "\n")


def sections(file: Path) -> dict[str, Any]:
    """What stands in a file of benchmarks; nothing but its schema where there is none yet.

    Raises ``DataError`` where the file is there and holds something else, and where it could not be written.
    """
    require_writable(file)
    if not file.exists():
        return {"schema": SCHEMA}
    try:
        found = parsed(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}\n  name another file") from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}\n  name another file, or remove this one") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise DataError(f"{file} is not a file of benchmarks\n  name another file, or remove this one")
    return found


def mebibytes(size: int) -> str:
    """Bytes in MiB, without a fraction."""
    return f"{size / 2**20:,.0f}"

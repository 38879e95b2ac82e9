"""Files that a command writes where its user says, which take the place of nothing but its own earlier ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.errors import DataError
from minillm.store import require_writable, write_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFile:
    """A file that a command was asked to write, and how it knows one that it wrote there before."""

    file: Path
    what: str
    """What the command writes, such as "the figures of a comparison"."""
    known: Callable[[bytes], bool]
    """Whether these bytes are such a file."""

    def require(self) -> None:
        """Raise ``DataError`` unless the file can be written, and is new or an earlier one of this command."""
        require_writable(self.file)
        # A link to nowhere is somebody's, too, and what is no file (a pipe) could not be read back.
        if os.path.lexists(self.file) and not self._is_own():
            raise DataError(
                f"{self.file} is there, and not {self.what}; nothing was touched\n"
                "  name another file, or remove this one"
            )

    def write(self, content: bytes) -> None:
        """Writes it whole or not at all. Looks once more before: hours may have passed since the command began."""
        self.require()
        write_bytes(self.file, content)

    def _is_own(self) -> bool:
        try:
            return self.file.is_file() and self.known(self.file.read_bytes())
        except OSError:
            return False


def json_file(file: Path, *, what: str, fits: Callable[[Mapping[str, Any]], bool]) -> OwnFile:
    """One with an object in JSON, told from other objects by ``fits``."""

    def known(content: bytes) -> bool:
        try:
            found = json.loads(content)
            return isinstance(found, dict) and fits(found)
        # Another shape, or nested beyond what the reader can follow.
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return False

    return OwnFile(file=file, what=what, known=known)


def page_file(file: Path, *, made_by: str) -> OwnFile:
    """A page whose head names ``made_by`` as its generator, as ``report_parts.frame`` writes it."""
    mark = generator(made_by).encode()
    # The head alone: further down there may be text of anybody.
    return OwnFile(
        file=file, what=f"a page by `{made_by}`", known=lambda content: mark in content.partition(b"<title>")[0]
    )


def generator(made_by: str) -> str:
    """The line of a page's head that says who made it."""
    return f'<meta name="generator" content="{made_by}">'

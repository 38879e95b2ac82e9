"""What a check found: how bad it is, why it matters, how to mend it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minillm import exits
from minillm.errors import MinillmError, visible

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")
"""From nothing to what keeps a run from starting, or makes its result wrong."""
_LISTED = re.compile(r": \d+ problems$")
"""What the first line of a message ends with that lists several (``settings.headed``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    id: str
    """Of the check, such as ``tokenizer-ids``."""
    level: Level
    found: str
    why: str = ""
    """Why it matters; "" where all is well."""
    mend: str = ""
    """How to mend it; "" where there is nothing to mend."""


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(id=name, level="ok", found=found)


def note(name: str, found: str, *, why: str, mend: str = "") -> Finding:
    """Good to know; nothing need be done."""
    return Finding(id=name, level="note", found=found, why=why, mend=mend)


def warning(name: str, found: str, *, why: str, mend: str) -> Finding:
    """The run goes, and its result may not be what was meant."""
    return Finding(id=name, level="warning", found=found, why=why, mend=mend)


def error(name: str, found: str, *, why: str, mend: str) -> Finding:
    """The run does not start, breaks off, or is surely wrong."""
    return Finding(id=name, level="error", found=found, why=why, mend=mend)


def of_error(name: str, raised: MinillmError | OSError, *, why: str) -> Finding:
    """What a run would end with: its message's last line says how to mend it, where it has several; not where it is the
    last problem of a list."""
    text = visible(str(raised))
    *lines, last = text.split("\n")
    if not lines or _LISTED.search(lines[0]):
        found, mend = text, "mend what is named there"
    else:
        found, mend = "\n".join(lines), last.strip()
    return error(name, f"{type(raised).__name__}: {found}", why=why, mend=mend)


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """How many there are of each level."""
    by_level = Counter(finding.level for finding in findings)
    return {level: by_level[level] for level in LEVELS}


def exit_code(findings: Sequence[Finding], *, strict: bool = False) -> int:
    """``exits.MENDABLE`` where there is an error, or, if ``strict``, a warning; else ``exits.DONE``."""
    bad = {"error", "warning"} if strict else {"error"}
    return exits.MENDABLE if any(finding.level in bad for finding in findings) else exits.DONE


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Plain records, for a file."""
    return [asdict(finding) for finding in findings]


def in_a_line(finding: Finding) -> str:
    """What was found and how to mend it, for the log of a run."""
    parts = [finding.found.replace("\n", " "), finding.mend.replace("\n", " ")]
    return visible("; ".join(part for part in parts if part))

"""Which hosts a launch runs on: a hostfile in DeepSpeed's form, a line for each host.

# comments and empty lines are passed over
gpu-1 slots=8
gpu-2 slots=8
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import ConfigError

_LINE = re.compile(r"(\S+)\s+slots\s*=\s*(\d+)")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@:%-]*")
"""No leading '-', which ssh would read as an option of its own."""


@dataclass(frozen=True, slots=True)
class Host:
    """A line of a hostfile."""

    name: str
    """As ssh takes it: a name, an address, or USER@NAME."""
    slots: int
    """Ranks on it."""

    @property
    def address(self) -> str:
        """Where its ranks can be reached."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file, in its order: the first one has rank 0.

    ``ConfigError``, with the number of the line, where one is no host with its slots, where a host stands twice, and
    where hosts have other numbers of slots.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise ConfigError(
            f"hostfile {path}: {why}\n  wanted a text file with a line 'HOST slots=RANKS' each"
        ) from error
    hosts, seen = list[Host](), dict[str, int]()
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = _host(text, at=f"hostfile {path}, line {number}")
        if host.address in seen:  # whoever logs in there: GPUs and port are the same
            raise ConfigError(
                f"hostfile {path}, line {number}: {host.address} stands in line {seen[host.address]} already\n"
                "  give each host one line, with the number of all its ranks"
            )
        if hosts and host.slots != hosts[0].slots:
            raise ConfigError(
                f"hostfile {path}, line {number}: {host.name} has slots={host.slots} and {hosts[0].name} "
                f"slots={hosts[0].slots}\n  every rank gets an equal share of the work and of the memory: give all "
                "hosts as many slots as the smallest has"
            )
        hosts.append(host)
        seen[host.address] = number
    if not hosts:
        raise ConfigError(f"hostfile {path}: names no host\n  wanted a line 'HOST slots=RANKS' for each")
    return tuple(hosts)


def _host(text: str, *, at: str) -> Host:
    found = _LINE.fullmatch(text)
    if found is None or int(found[2]) < 1:
        raise ConfigError(f"{at}: got {text[:80]!r}\n  wanted HOST slots=RANKS, such as gpu-1 slots=8")
    if not _NAME.fullmatch(found[1]):
        raise ConfigError(f"{at}: {found[1][:80]!r} is no name of a host\n  wanted a name, an address or USER@NAME")
    return Host(found[1], int(found[2]))

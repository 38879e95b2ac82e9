"""Two "hosts" on this machine: a stand-in for ssh, and a launch over a hostfile that names them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.stops.jobs import Job, start

# Like ssh: nothing of the environment comes along, no signal goes through, and what it started outlives it.
SSH = """#!/bin/bash
[[ $1 != "{closed}" ]] || {{ echo "ssh: connect to host $1: refused" >&2; exit 255; }}
echo $$ >"{folder}/ssh-$1"
[[ $1 != "{hangs}" ]] || exec sleep 600
host=$1; shift
{enter} setsid env --default-signal=INT -i PATH="$PATH" HOME="{folder}" TMPDIR="{folder}" \\
  bash -c "echo \\$\\$ >{folder}/launcher-$host; $*" <&0 &
wait $!
"""
NAMES = ("one", "two")


def stand_in(folder: Path, *, closed: str = "", hangs: str = "", enter: str = "") -> Path:
    """A program that runs on this machine what it is told to run on a host; ``closed`` is a host that cannot be
    reached, ``hangs`` one that answers nothing, and ``enter`` what leads into another one, with ``$host`` in it."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "ssh"
    program.write_text(SSH.format(folder=folder, closed=closed, hangs=hangs, enter=enter), encoding="utf-8")
    program.chmod(0o700)
    return program


def on_hosts(
    folder: Path, *words: str, slots: int = 1, limit_s: float = 20.0, command: Sequence[str] = (), closed: str = "",
    master: str = "127.0.0.1", port: int = 0, options: Sequence[str] = (), environment: dict[str, str] | None = None,
    enter: str = "", hangs: str = "",
) -> Job:  # fmt: skip
    """A job on two hosts: the toy, a rank on each, or another command."""
    ssh = stand_in(folder, closed=closed, hangs=hangs, enter=enter)
    hosts = folder / "hosts"
    hosts.write_text("".join(f"{name} slots={slots}\n" for name in NAMES), encoding="utf-8")
    launch = [
        sys.executable,
        "-m",
        "minillm",
        "launch",
        "--hostfile",
        str(hosts),
        "--ssh",
        str(ssh),
        "--master",
        master,
    ]
    launch += ["--master-port", str(port), "--limit", str(limit_s), *options]
    command = command or [sys.executable, "-m", "tests.stops.toy", str(folder), *words]
    return start(folder, [*launch, *command], environment)

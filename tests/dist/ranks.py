"""Starts the ranks of a test: processes on loopback, forked from one that has imported everything, killed as a tree
when they take too long."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STARTS_S = 120.0
"""For the server to have imported everything; a busy machine takes half a minute."""


def start_ranks(module: str, *arguments: str, ranks: int = 2, limit_s: float = 240.0) -> str:
    """Runs ``python -m module arguments`` on each rank and returns what they printed; fails with it if a rank fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        prints = [Path(folder) / str(rank) for rank in range(ranks)]
        asked = {
            "module": module, "arguments": arguments, "prints": list(map(str, prints)),
            "environments": [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)],
        }  # fmt: skip
        codes = _served(asked, limit_s=limit_s)
        text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in prints if file.exists())
    assert codes == [0] * ranks, f"exit codes {codes}: {text[-6000:]}"
    return text


def _served(asked: dict[str, Any], *, limit_s: float) -> list[int]:
    """The exit codes of ranks; those that take too long are killed."""
    server = _server()
    assert server.stdin is not None
    server.stdin.write(json.dumps(asked).encode() + b"\n")
    server.stdin.flush()
    pids = _answer(server, STARTS_S)
    assert pids is not None, "the server of ranks does not start"
    codes = _answer(server, limit_s)
    if codes is None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        codes = _answer(server, STARTS_S)
    assert codes is not None, "the server of ranks does not answer"
    return codes


def _answer(server: subprocess.Popen[bytes], limit_s: float) -> list[int] | None:
    """Its next line; None where it takes too long."""
    assert server.stdout is not None
    until, line = time.monotonic() + limit_s, b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([server.stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        part = os.read(server.stdout.fileno(), 1)  # no more: the next line is the next answer
        assert part, "the server of ranks has ended"
        line += part
    found: list[int] = json.loads(line)
    return found


_servers: list[subprocess.Popen[bytes]] = []


def _server() -> subprocess.Popen[bytes]:
    """One for all tests of this process, from the first that asks; it ends with its input. One that died is followed by
    another: its tests have failed, and not those to come."""
    if _servers and _servers[-1].poll() is None:
        return _servers[-1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.dist.fork_server"], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    )  # fmt: skip
    _servers.append(server)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    server.stdin.close()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()

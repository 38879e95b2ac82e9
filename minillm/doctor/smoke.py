"""A smoke test of the ranks: they are started as ``minillm launch`` starts them, talk to each other, and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minillm import exits
from minillm.doctor.findings import Finding, error, ok, warning
from minillm.errors import visible

LIMIT_S = 120.0
"""Seconds for all of it, the loading of torch on every rank included."""
LEAVES_S = 10.0
"""Seconds between asking the launcher to end and killing it, which its ranks do not survive."""
SAID = 6
"""Lines of what the ranks said that a finding shows."""
SLOW = 100.0
"""Millions of bytes a second of a large message below which training waits for the wire more than for the models."""
PLACES = {"NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "GROUP_RANK", "LOCAL_RANK",
          "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"}  # fmt: skip
"""Variables that say where a node or rank stands in a launch; the ranks of this test are a launch of their own, and
would wait for nodes that nobody starts."""
WORKER = (sys.executable, "-u", "-m", "minillm.doctor.smoke_worker")
_WHY = "every step of a run needs these collectives; it would end, or hang, at its first"


def collectives(ranks: int, *, limit_s: float = LIMIT_S, worker: tuple[str, ...] = WORKER) -> Iterator[Finding]:
    """Whether so many ranks of this node find each other, add right, and how fast; whatever goes wrong is a finding."""
    with tempfile.TemporaryDirectory(prefix="minillm-doctor-") as folder:
        file = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "minillm", "launch", "--ranks", str(ranks)]
        # A process of its own, as a user would start it: a rank that dies takes nothing of this one along.
        process = subprocess.Popen(
            [*launcher, *worker, str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name not in PLACES},
            start_new_session=True,
        )
        said, late = _waited(process, limit_s)
        if late or process.returncode != exits.DONE:
            yield _broken(ranks, said, code=process.returncode, late=late, limit_s=limit_s)
            return
        try:
            found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            yield _broken(ranks, said, code=process.returncode, late=False, limit_s=limit_s)
            return
    yield _told(found)


def _waited(process: subprocess.Popen[bytes], limit_s: float) -> tuple[str, bool]:
    """What was said, and whether time ran out; nothing of it runs afterwards."""
    late = False
    try:
        said, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        late = True
        process.send_signal(signal.SIGTERM)
        try:
            said, _ = process.communicate(timeout=LEAVES_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks do not outlive it
            said, _ = process.communicate()
    except BaseException:  # an interruption must not leave ranks behind
        process.kill()
        process.wait()
        raise
    return said.decode("utf-8", "replace"), late


def _broken(ranks: int, said: str, *, code: int, late: bool, limit_s: float) -> Finding:
    how = f"did not come to an end in {limit_s:.0f} s" if late else f"ended with exit code {code}"
    lines = [line for line in visible(said).splitlines() if line.strip()]
    return error(
        "collectives",
        "\n".join([f"{ranks} ranks {how}", *lines[-SAID:]]),
        why=_WHY,
        mend="start no more ranks than there are GPUs; look at the lines above, at a firewall on the loopback device, "
        "and at NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME",
    )


def _told(found: Mapping[str, Any]) -> Finding:
    parts = []
    for name, speed in found["mb_per_s"].items():
        each = ", ".join(f"{float(rate):,.0f} MB/s at {int(size) / 2**20:g} MiB" for size, rate in speed.items())
        parts.append(f"{name} {each}")
    words = f"{found['ranks']} ranks on {found['device']} ({found['backend']}): {'; '.join(parts)}"
    if not found["right"]:
        return error(
            "collectives",
            f"{words}; sums or parts are wrong",
            why="gradients would be wrong, unseen",
            mend="try another backend or driver; do not train on this machine",
        )
    slowest = min(max(map(float, speed.values())) for speed in found["mb_per_s"].values())
    if slowest < SLOW:
        return warning(
            "collectives",
            words,
            why=f"under {SLOW:.0f} MB/s a step waits for the wire",
            mend="ranks of one node on shared memory or NVLink, nodes on a fast network; or fewer ranks",
        )
    return ok("collectives", words)

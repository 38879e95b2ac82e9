"""Processes that each do a MiniLLM step when they are told to, and wait without working in between.

A team is one run of several ranks, or several runs of one rank; all of it steps at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch

from minillm.bench.step import Ours, StepCase
from minillm.errors import MinillmError
from minillm.ranks import Ranks

LAST_LINES = 12


class WorkerLost(MinillmError, ChildProcessError):
    """A process of a benchmark ended before its work was done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """What one process of a team is told at its start."""

    case: StepCase
    """Its rows are this process's own."""
    settings: str
    rank: int
    ranks: int
    port: int
    device: int
    log: Path


class Team:
    """Some processes that are ready to step; made by ``team``."""

    def __init__(self, lines: Sequence[Connection], workers: Sequence[SpawnProcess], logs: Sequence[Path]) -> None:
        self.workers, self._lines, self._logs = workers, lines, logs
        self._wait_for_all()

    def step(self) -> None:
        """One step of every process; comes back when the slowest is done. ``WorkerLost`` if one ends instead."""
        for line in self._lines:
            with contextlib.suppress(BrokenPipeError):  # it is gone, which the wait below finds out
                line.send("step")
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        # Whichever answers first: the partner of one that died would not answer for a long time.
        waiting = list(self._lines)
        while waiting:
            for line in wait(waiting):
                assert isinstance(line, Connection)
                try:
                    line.recv()
                except (EOFError, ConnectionResetError):
                    raise self._lost(self._lines.index(line)) from None
                waiting.remove(line)

    def _lost(self, place: int) -> WorkerLost:
        self.workers[place].join(timeout=10)
        code = self.workers[place].exitcode
        last = self._logs[place].read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        said = "".join(f"\n  | {line}" for line in last) or " nothing"
        return WorkerLost(
            f"process {place} of {len(self.workers)} ended ({how}) before it had answered; nothing was measured.\n"
            f"  if it ran out of memory, take a smaller --batch or --new-tokens. Its last words:{said}"
        )


@contextlib.contextmanager
def team(case: StepCase, *, settings: str, joined: bool, size: int = 2) -> Iterator[Team]:
    """``size`` processes on this machine, ready to step: the ranks of one run, or runs of their own. Rows are those
    of one process. None of them is left when the block ends."""
    context = multiprocessing.get_context("spawn")
    lines: list[Connection] = []
    workers: list[SpawnProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{place}.log") for place in range(size)]
        port = _free_port()
        try:
            for place, log in enumerate(logs):
                mine, theirs = context.Pipe()
                rank, ranks = (place, size) if joined else (0, 1)
                seat = Seat(case=case, settings=settings, rank=rank, ranks=ranks, port=port, device=place, log=log)
                worker = context.Process(target=serve, args=(seat, theirs), daemon=True)
                worker.start()
                theirs.close()  # ours must not keep it open: that it closes is how we hear that the worker ended
                workers.append(worker)
                lines.append(mine)
            yield Team(lines, workers, logs)
        finally:
            for worker in workers:
                _end(worker)
            for line in lines:
                line.close()


def serve(seat: Seat, line: Connection) -> None:
    """The life of a worker: gets ready, says so, and steps at each word until there is nobody to say one."""
    os.setsid()  # a group of its own, to be ended as a whole; an interruption at the terminal is for the parent
    with seat.log.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["LOCAL_RANK"] = str(seat.device)
    if seat.ranks > 1:
        os.environ.update(
            RANK=str(seat.rank), WORLD_SIZE=str(seat.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(seat.port)
        )
    case = dataclasses.replace(seat.case, settings=seat.settings)
    ours = Ours(case, ranks=Ranks(threads=case.threads))
    with contextlib.suppress(EOFError):
        line.send("ready")
        while line.recv():
            ours.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            line.send("done")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end(worker: SpawnProcess) -> None:
    """Ends a worker with all that it started, and waits until it is gone."""
    if worker.is_alive():
        assert worker.pid is not None
        try:
            os.killpg(worker.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            worker.kill()
    worker.join()
    worker.close()

"""One rank as its supervisor sees it: does it run, what does it do, how did it end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from minillm.board import Board
from minillm.guardian import kill_group

_WORKS = 0.05
"""Share of one processor that tells work from threads that only wait for Python's lock (0.6 % each, measured)."""
_TICKS = os.sysconf("SC_CLK_TCK")


class Proc(NamedTuple):
    """What Linux says of a process; ``state`` is ``""`` where there is no /proc."""

    state: str
    """R runs or wants to, S sleeps, D waits for a disk, T was stopped by a signal, t by a debugger."""
    used_s: float
    """Processor time used by all of its threads."""


@dataclass(slots=True)
class RankProcess:
    """A rank of this node. ``look`` brings what it says up to date."""

    number: int
    slot: int
    process: subprocess.Popen[bytes]
    board: Board
    code: int | None = None
    """Exit code, or minus the signal that ended it; None while it runs."""
    when: float = 0.0
    """When it was seen to have failed."""
    stuck: bool = False
    ended_by_us: bool = False
    heard: int = 0
    """Signals that were handed on to it."""
    _beats: int = 0
    _base: tuple[float, float] = (0.0, 0.0)
    """When it last gave a sign of life, and the processor time that it had used then."""
    _looked: float = 0.0
    _silent_s: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether it failed by itself, and not because it was made to end."""
        return self.stuck or (not self.ended_by_us and self.code is not None and self.code != 0)

    def look(self, now: float, *, silence_s: float) -> None:
        """Notes an end, and calls the rank stuck after ``silence_s`` without a sign of life."""
        if self.code is not None:
            return
        self.code = self.process.poll()
        if self.code is not None:
            self.when = self.when or now
        elif not self.stuck:
            # If it was us who were stopped, that time is not the rank's silence.
            self._silent_s = 0.0 if self._lives(now) else self._silent_s + min(now - self._looked, 1.0)
            self._looked = now
            if self._silent_s >= silence_s:
                self.stuck, self.when = True, now

    def _lives(self, now: float) -> bool:
        """Whether it has beaten or worked since it last did, or may not be judged."""
        seen = self.board.read(self.slot)
        proc = read_proc(seen.pid or self.process.pid)
        began, used_s = self._base
        lives = (
            seen.beats != self._beats
            or proc.state in {"R", "D", "t"}
            or proc.used_s - used_s > _WORKS * (now - began) + 2 / _TICKS
            # A rank that has not begun to beat may sleep for reasons of its own, but not be stopped.
            or (not seen.pid and proc.state != "T")
        )
        if lives:
            self._beats, self._base = seen.beats, (now, proc.used_s)
        return lives

    def signal(self, number: int) -> None:
        """Gives a signal to the process that beats; to the one that we started, until it does."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.board.read(self.slot).pid or self.process.pid, number)

    def end(self, number: int) -> None:
        """Gives a signal to the rank and all that it has started."""
        if self.code is None:
            self.ended_by_us = True
            kill_group(self.process.pid, number)

    def how(self) -> str:
        """How it failed, in a sentence that names the phase it was in."""
        seen = self.board.read(self.slot)
        who = f"rank {self.number} (pid {seen.pid or self.process.pid})"
        where = f"in phase {seen.phase or 'start'}"
        if self.stuck:
            return f"{who} gave no sign of life for {self._silent_s:.0f} s {where}"
        assert self.code is not None
        if self.code > 0:
            return f"{who} ended with exit code {self.code} {where}"
        hint = " (by hand, or by the kernel for want of memory)" if self.code == -signal.SIGKILL else ""
        return f"{who} was killed by {signal_name(-self.code)} {where}{hint}"


@dataclass(slots=True)
class Voice:
    """What a rank other than 0 prints, or another host, passed on line by line with its number or name before it."""

    pipe: IO[bytes]
    into: IO[str]
    prefix: str
    spoken: bool = False
    """Whether anything has come."""
    _begun: bytes = field(default=b"")

    def pass_on(self) -> bool:
        """Writes out the whole lines that are there; False at the end of the pipe."""
        try:
            heard = os.read(self.pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        self.spoken = self.spoken or bool(heard)
        *lines, self._begun = (self._begun + heard).split(b"\n")
        if not heard and self._begun:
            lines, self._begun = [self._begun], b""
        for line in lines:
            self.into.write(f"{self.prefix}{line.decode('utf-8', 'replace')}\n")
        self.into.flush()
        return bool(heard)


def signal_name(number: int) -> str:
    """``SIGTERM`` for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def read_proc(pid: int) -> Proc:
    """State and processor time of a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
        return Proc(fields[0], (int(fields[11]) + int(fields[12])) / _TICKS)
    except (OSError, IndexError):
        return Proc("", 0.0)

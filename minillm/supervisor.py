"""Starts the ranks of one node and answers for their end.

A signal is handed on to every rank once. A rank that dies, or that gives no sign of life, ends the others within
``limit_s`` seconds and is named. Whatever happens to the supervisor itself, no rank outlives it (``guardian``).

Life is judged apart from the collectives, whose own time-out has to allow for a rollout of many minutes: by the exit of
the process, and by the beats of ``phases``. Before silence counts as death, the process must also have done no work: a
long call into C that holds Python's lock does not beat either.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from minillm import exits, phases
from minillm.board import Board
from minillm.guardian import Guardian
from minillm.leash import Leash
from minillm.rank_process import RankProcess, Voice, signal_name
from minillm.stops import SAME_S, SIGNALS

LIMIT_S = 20.0
"""Seconds within which a rank that is dead or stuck ends all of them."""
FIRST_HAS_SPOKEN_S = 1.0
"""Seconds for the others once rank 0 has ended with an error, which it has told for all."""
LEAVES_S = 2.0
"""Seconds between a second signal, which ranks answer by leaving at once, and SIGKILL."""
_ROUND_S = 0.2
_TELLS_ITSELF = {exits.MENDABLE, exits.NON_FINITE, exits.ALARMED, exits.RANK_LOST, exits.SAVE_FAILED}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where these ranks stand among all: ``ranks`` on each of ``nodes`` nodes, which meet at ``master:port``."""

    ranks: int
    port: int
    nodes: int = 1
    node: int = 0
    master: str = "127.0.0.1"

    def rank(self, local: int) -> int:
        """Rank among all of the ``local``-th of this node."""
        return self.node * self.ranks + local

    def environment(self, local: int) -> dict[str, str]:
        """What torch and DeepSpeed read."""
        return {
            "RANK": str(self.rank(local)),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(self.ranks * self.nodes),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.master,
            "MASTER_PORT": str(self.port),
        }


class Supervisor:
    """Runs ``command`` on each rank of this node; ``run`` gives one exit code for all of them."""

    def __init__(
        self,
        command: Sequence[str],
        place: Place,
        *,
        limit_s: float = LIMIT_S,
        environment: Mapping[str, str] | None = None,
        leash: int | None = None,
    ) -> None:
        """``leash`` is the descriptor from which to hear of signals and of the end of who started us (``leash``)."""
        self._command, self._place, self._limit_s = list(command), place, limit_s
        self._leash = None if leash is None else Leash(leash, self._hear, lost=self._leash_lost, limit_s=limit_s)
        self._environment = dict(os.environ if environment is None else environment)
        self._ranks: list[RankProcess] = []
        self._signals: list[tuple[int, float]] = []
        self._announced = False
        self._failed_at = self._asked_at = 0.0

    def run(self) -> int:
        """Starts the ranks and waits for their end.

        Returns 0 if all ended with 0; the exit code of the rank that failed first; ``exits.RANK_LOST`` if that one was
        killed or gave no sign of life; ``exits.by_signal`` if a signal that was handed on ended it.
        """
        folder = Path(tempfile.mkdtemp(prefix="minillm-launch-"))
        guardian = Guardian(folder)
        try:
            with heard(self._hear), selectors.DefaultSelector() as voices:
                board = Board.made(folder / "board", ranks=self._place.ranks)
                if self._leash is not None:
                    voices.register(self._leash, selectors.EVENT_READ, self._leash)
                for local in range(self._place.ranks):
                    self._ranks.append(self._started(local, folder / "board", board, voices))
                    guardian.watch(self._ranks[-1].process.pid)
                while any(rank.code is None for rank in self._ranks):
                    listen(voices, wait_s=_ROUND_S)
                    self._go_round(time.monotonic())
                while listen(voices, wait_s=0):  # a grandchild may keep a pipe open: no waiting for its end
                    pass
        finally:
            guardian.dismiss()
        return self._verdict()

    def _started(self, local: int, path: Path, board: Board, voices: selectors.BaseSelector) -> RankProcess:
        number = self._place.rank(local)
        first = number == 0
        process = subprocess.Popen(
            self._command,
            env={**self._environment, **self._place.environment(local), phases.BOARD: str(path)},
            stdin=subprocess.DEVNULL,
            stdout=None if first else subprocess.PIPE,  # rank 0 has the terminal, and its width and colours
            stderr=None if first else subprocess.PIPE,
            start_new_session=True,
        )
        for pipe, into in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                voices.register(pipe, selectors.EVENT_READ, Voice(pipe, into, f"rank {number}| "))
        return RankProcess(number=number, slot=local, process=process, board=board)

    def _hear(self, number: int) -> None:
        """Runs as a signal handler: hands on at once, since a rank that got the signal from elsewhere, too, may be gone
        from where a second one does no harm."""
        if number == signal.SIGKILL:  # by the leash
            self._end_all(number)
            return
        now = time.monotonic()
        if not self._signals or now - self._signals[-1][1] >= SAME_S:
            self._signals.append((number, now))
        self._hand_on()

    def _leash_lost(self) -> None:
        """Has the ranks save and stop. Where a signal has asked them to already, another one would end them at once."""
        if not self._signals:
            self._hear(signal.SIGTERM)

    def _hand_on(self) -> None:
        """Gives each rank each signal once."""
        for rank in self._ranks:
            while rank.heard < len(self._signals):
                rank.heard += 1
                rank.signal(self._signals[rank.heard - 1][0])

    def _go_round(self, now: float) -> None:
        for rank in self._ranks:
            rank.look(now, silence_s=self._limit_s / 2)
        self._hand_on()  # also to a rank that was only just started when the signal came
        if self._signals and not self._announced:
            self._announced = True
            name = signal_name(self._signals[0][0])
            say(f"{name}: the ranks save and stop where they next can; once more ends them at once")
        if len(self._signals) > 1 and now - self._signals[1][1] > LEAVES_S:
            self._end_all(signal.SIGKILL)  # a rank that could not answer
        if self._leash is not None and self._leash.look(now):
            self._end_all(signal.SIGKILL)  # nobody is left who could ask it to
        failed = [rank for rank in self._ranks if rank.failed]
        if failed:
            self._failed_at = self._failed_at or now
            self._end_the_others(now, failed)

    def _end_the_others(self, now: float, failed: Sequence[RankProcess]) -> None:
        """Once a rank has failed: some time for the others' own words, then SIGTERM, then SIGKILL."""
        for rank in failed:
            if rank.stuck:
                rank.end(signal.SIGKILL)  # it answers nothing else
        if not self._asked_at and now - self._failed_at >= self._grace(failed):
            self._asked_at = now
            self._end_all(signal.SIGTERM)
        if self._asked_at and now - self._asked_at >= self._limit_s / 8:
            self._end_all(signal.SIGKILL)

    def _end_all(self, number: int) -> None:
        for rank in self._ranks:
            rank.end(number)

    def _grace(self, failed: Sequence[RankProcess]) -> float:
        """Seconds in which the others may end by themselves."""
        if all(rank.code == exits.STOPPED for rank in failed):
            return self._limit_s  # all stop at one place, and rank 0 may still close what it writes
        if any(rank.number == 0 and (rank.code or 0) > 0 for rank in failed):
            return min(FIRST_HAS_SPOKEN_S, self._limit_s / 4)
        return self._limit_s / 4

    def _verdict(self) -> int:
        codes = {rank.code for rank in self._ranks}
        if codes == {exits.DONE}:
            return exits.DONE
        if len(self._signals) > 1 and not codes <= {exits.DONE, exits.STOPPED}:
            return exits.by_signal(self._signals[1][0])
        failed = [rank for rank in self._ranks if rank.failed]
        if not failed:  # all were ended by the leash, because of another host
            return exits.RANK_LOST
        culprit = min(failed, key=_blame)
        assert culprit.code is not None
        if not culprit.stuck and -culprit.code in {number for number, _ in self._signals}:
            return exits.by_signal(-culprit.code)
        if culprit.code != exits.STOPPED and not (culprit.number == 0 and culprit.code in _TELLS_ITSELF):
            say(f"{culprit.how()}; all ranks have ended")
        return culprit.code if culprit.code > 0 and not culprit.stuck else exits.RANK_LOST


def _blame(rank: RankProcess) -> tuple[int, float, bool, int]:
    """Least for the rank that failed first. One that says that it was left alone, or that it stopped as it was asked
    to, is no cause, whenever it was seen; of two seen at once, the one that a signal killed comes first."""
    code = rank.code or 0
    no_cause = {exits.RANK_LOST: 1, exits.STOPPED: 2}.get(code, 0)
    return no_cause, rank.when, code > 0, rank.number


def listen(voices: selectors.BaseSelector, *, wait_s: float) -> bool:
    """Passes on what the ranks have said; waits for so long where they are silent. Whether any said something."""
    if not voices.get_map():
        time.sleep(wait_s)
        return False
    ready = voices.select(wait_s)
    for key, _ in ready:
        if not key.data.pass_on():
            voices.unregister(key.fileobj)
    return bool(ready)


@contextlib.contextmanager
def heard(hear: Callable[[int], None]) -> Iterator[None]:
    """Tells of ``SIGNALS`` for the time of the block, but for those that are ignored already."""

    def handler(number: int, frame: FrameType | None) -> None:
        hear(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, old in before.items() if old is not signal.SIG_IGN]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def say(line: str) -> None:
    """A line of the launcher's own."""
    print(f"launch: {line}", file=sys.stderr, flush=True)

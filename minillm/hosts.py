"""Starts the launcher of every host over ssh, and answers for the end of all of them.

Each host has a supervisor of its own, which watches its ranks; here only the supervisors are watched. They are held on
a leash, their standard input (``leash``): what is to end goes over it, and so does a sign of life each second.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from minillm import exits
from minillm.hostfile import Host
from minillm.leash import BEAT_S
from minillm.rank_process import Voice, signal_name
from minillm.stops import SAME_S
from minillm.supervisor import LEAVES_S, heard, listen, say

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
"""Asks for no password, and ends within 20 seconds where a host does not answer any more."""
PASSED = ("CUDA_DEVICE_", "CUDA_LAUNCH_BLOCKING", "DEEPSPEED_", "DS_", "FI_", "GLOO_", "HF_", "LD_LIBRARY_PATH",
          "NCCL_", "OMP_", "PYTHON", "PYTORCH_", "TOKENIZERS_", "TORCH_", "TRACKIO_", "TRANSFORMERS_", "UCX_",
          "WANDB_")  # fmt: skip
"""What the environment's variables begin with that each host gets. Not CUDA_VISIBLE_DEVICES: which GPUs are
free is each host's own."""
SECRET = re.compile(r"AUTH|CREDENTIAL|KEY|PASS|SECRET|TOKEN(?!IZERS_)", re.IGNORECASE)
"""Names with such a word are not passed unasked: a command line can be read by everyone on a host."""
_WITH_LOGIN = re.compile(r"://[^/\s@]+@")
"""An address that holds a name or password, which is not passed unasked either."""
SHARE = 0.75
"""Of the limit, for each host's own supervisor; the rest is for telling the others."""
_SSH_FAILED = 255
"""What ssh ends with where the way to the host is lost."""
_ROUND_S = 0.2
_SSH_GOES_S = 5.0
"""Seconds for ssh to end once the launcher behind it must have."""


@dataclass(frozen=True, slots=True)
class HostLaunch:
    """The launcher of one host."""

    host: str
    words: tuple[str, ...]
    """The command that starts it from here."""


def passed_on(environment: Mapping[str, str], also: Iterable[str] = ()) -> dict[str, str]:
    """Those variables that every host gets: ``PASSED``, without secrets, and those named in ``also``."""
    also = set(also)
    return {
        name: value
        for name, value in environment.items()
        if name in also or (name.startswith(PASSED) and not SECRET.search(name) and not _WITH_LOGIN.search(value))
    }


def passed_in_words(environment: Mapping[str, str], passed: Collection[str]) -> str:
    """A line of the names that hosts get, and of those that they might be thought to get."""
    kept = [name for name in environment if name.startswith((*PASSED, "CUDA_VISIBLE_DEVICES")) and name not in passed]
    words = f"hosts get of this environment: {', '.join(sorted(passed)) or 'nothing'}"
    return f"{words}; not {', '.join(sorted(kept))} (--env NAME passes it)" if kept else words


def host_launches(
    hosts: Sequence[Host], command: Sequence[str], *,
    ssh: str, master: str, port: int, limit_s: float, environment: Mapping[str, str],
) -> list[HostLaunch]:  # fmt: skip
    """What starts ``command`` on all hosts, in this folder, by this interpreter, with these variables; ``master`` is
    the first host where it is empty."""
    settings = [f"{name}={value}" for name, value in sorted(environment.items())]
    launches = []
    for node, host in enumerate(hosts):
        words = [
            *("exec", "env", *settings, sys.executable, "-u", "-m", "minillm", "launch", "--leash"),
            *("--ranks", str(host.slots), "--nodes", str(len(hosts)), "--node-rank", str(node)),
            *("--master", master or hosts[0].address, "--master-port", str(port)),
            *("--limit", f"{max(1.0, SHARE * limit_s):g}", *command),
        ]
        script = f"cd {shlex.quote(os.getcwd())} || exit {exits.MENDABLE}; {shlex.join(words)}"
        launches.append(HostLaunch(host.name, (*shlex.split(ssh), host.name, script)))
    return launches


@dataclass(slots=True)
class _Host:
    """A host as we see it: the ssh that leads to its launcher."""

    name: str
    node: int
    process: subprocess.Popen[bytes]
    says: Voice
    code: int | None = None
    when: float = 0.0
    ended_by_us: bool = False
    heard: int = 0
    """Signals that were handed on to it."""
    told: set[int] = field(default_factory=set)

    @property
    def failed(self) -> bool:
        """Whether it failed by itself, and not because it was made to end."""
        return not self.ended_by_us and self.code is not None and self.code != exits.DONE

    def look(self, now: float) -> None:
        """Notes an end."""
        if self.code is None and (code := self.process.poll()) is not None:
            self.code, self.when = code, now

    def tell(self, number: int) -> None:
        """Gives a signal to its launcher, or a sign of life: 0."""
        assert self.process.stdin is not None
        if self.code is None and not self.process.stdin.closed:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                os.write(self.process.stdin.fileno(), b"%d\n" % number)

    def end(self, number: int) -> None:
        """Has its launcher end, once for each signal."""
        if self.code is None and number not in self.told:
            self.ended_by_us = True
            self.told.add(number)
            self.tell(number)

    @property
    def reached(self) -> bool:
        """Whether its launcher is known to have begun."""
        return self.says.spoken

    def how(self) -> str:
        """How it failed, in a sentence."""
        assert self.code is not None
        who = f"host {self.name} (node {self.node})"
        code = f"exit code {self.code}" if self.code > 0 else signal_name(-self.code)
        if not self.reached:
            return (
                f"{who} did not start its launcher ({code}); the same working folder and interpreter are wanted there, "
                "and ssh without a password"
            )
        return f"{who} ended with {code}"


class Hosts:
    """Runs the launchers of all hosts; ``run`` gives one exit code for all of them."""

    def __init__(self, launches: Sequence[HostLaunch], *, limit_s: float) -> None:
        self._launches, self._limit_s = launches, limit_s
        self._hosts: list[_Host] = []
        self._signals: list[tuple[int, float]] = []
        self._announced = False
        self._failed_at = self._asked_at = self._beaten = 0.0

    def run(self) -> int:
        """Starts the launchers and waits for their end.

        Returns 0 if all ended with 0; the exit code of the one that failed first; ``exits.RANK_LOST`` where the way to
        it was lost, ``exits.MENDABLE`` where it was never found.
        """
        try:
            with heard(self._hear), selectors.DefaultSelector() as voices:
                for node, launch in enumerate(self._launches):
                    self._hosts.append(_started(launch, node, voices))
                while any(host.code is None for host in self._hosts):
                    listen(voices, wait_s=_ROUND_S)
                    self._go_round(time.monotonic())
                while listen(voices, wait_s=0):
                    pass
        finally:
            self._let_go()
        return self._verdict()

    def _hear(self, number: int) -> None:
        """Runs as a signal handler."""
        now = time.monotonic()
        if not self._signals or now - self._signals[-1][1] >= SAME_S:
            self._signals.append((number, now))
        self._hand_on()

    def _hand_on(self) -> None:
        for host in self._hosts:
            while host.heard < len(self._signals):
                host.heard += 1
                host.tell(self._signals[host.heard - 1][0])

    def _go_round(self, now: float) -> None:
        for host in self._hosts:
            host.look(now)
            if now - self._beaten >= BEAT_S:
                host.tell(0)
        self._beaten = now if now - self._beaten >= BEAT_S else self._beaten
        self._hand_on()
        if self._signals and not self._announced:
            self._announced = True
            name = signal_name(self._signals[0][0])
            say(f"{name}: all hosts save and stop where they next can; once more ends them at once")
        if len(self._signals) > 1 and now - self._signals[1][1] > LEAVES_S + _SSH_GOES_S:
            self._let_go()
        if failed := [host for host in self._hosts if host.failed]:
            self._failed_at = self._failed_at or now
            self._end_the_others(now, failed)

    def _end_the_others(self, now: float, failed: Sequence[_Host]) -> None:
        """Once a host has failed: some time for the others' own words, then SIGTERM, SIGKILL, and no more waiting."""
        stopped = all(host.code == exits.STOPPED for host in failed)
        if not self._asked_at and now - self._failed_at >= self._limit_s / (1 if stopped else 8):
            self._asked_at = now
            self._end_all(signal.SIGTERM)
        if self._asked_at and now - self._asked_at >= self._limit_s / 8:
            self._end_all(signal.SIGKILL)
        if self._asked_at and now - self._asked_at >= self._limit_s / 8 + _SSH_GOES_S:
            self._let_go()

    def _end_all(self, number: int) -> None:
        for host in self._hosts:
            host.end(number)

    def _let_go(self) -> None:
        """Ends what leads to the hosts. A launcher that still lives there loses its leash with it."""
        for host in self._hosts:
            assert host.process.stdin is not None
            with contextlib.suppress(OSError):
                host.process.stdin.close()
            if host.process.poll() is None:
                host.ended_by_us = True
                host.process.kill()

    def _verdict(self) -> int:
        codes = {host.code for host in self._hosts}
        if codes == {exits.DONE}:
            return exits.DONE
        if len(self._signals) > 1 and not codes <= {exits.DONE, exits.STOPPED}:
            return exits.by_signal(self._signals[1][0])
        failed = [host for host in self._hosts if host.failed]
        if not failed:  # each was being ended by us when it ended
            return exits.STOPPED if codes <= {exits.DONE, exits.STOPPED} else exits.RANK_LOST
        culprit = min(failed, key=_blame)
        assert culprit.code is not None
        if culprit.code == exits.STOPPED:
            return exits.STOPPED
        say(f"{culprit.how()}; all hosts have ended")
        if not culprit.reached:
            return exits.MENDABLE
        return exits.RANK_LOST if culprit.code < 0 or culprit.code == _SSH_FAILED else culprit.code


def _blame(host: _Host) -> tuple[int, float, int]:
    """Least for the host that failed first; one that says that it was left alone, or that it stopped as it was asked
    to, is no cause."""
    no_cause = {exits.RANK_LOST: 1, exits.STOPPED: 2}.get(host.code or 0, 0)
    return no_cause, host.when, host.node


def _started(launch: HostLaunch, node: int, voices: selectors.BaseSelector) -> _Host:
    process = subprocess.Popen(
        launch.words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is ours to hand on: it would end ssh, and with it what the host says
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    os.set_blocking(process.stdin.fileno(), False)
    prefix = "" if node == 0 else f"{launch.host}| "  # rank 0 speaks for all
    says = Voice(process.stdout, sys.stdout, prefix)
    for voice in (says, Voice(process.stderr, sys.stderr, prefix)):
        os.set_blocking(voice.pipe.fileno(), False)
        voices.register(voice.pipe, selectors.EVENT_READ, voice)
    return _Host(name=launch.host, node=node, process=process, says=says)

"""A fork server for lives of a run on one rank or several: what is imported once is not imported again for each.

Each rank is the real command line in a fork of this process, under the real supervisor where there are several. This
process must have one thread and no process group, so that a fork is safe.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import torch

from minillm import cli, fault, supervisor
from minillm.cli.places import _free_port
from minillm.ranks import prepare_deepspeed
from minillm.supervisor import Place, Supervisor
from tests import quick

LIMIT_S = 8.0
"""Seconds within which a rank that is killed must end the others; users have 20."""
_OF_AN_ATTEMPT = re.compile(r"-[0-9a-f]{8}(?=$|\.)")
_LATER = (
    "minillm.api", "minillm.cli.runs", "minillm.stages", "minillm.report", "matplotlib.pyplot",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama", "rouge_score.rouge_scorer", "torch._dynamo",
    "deepspeed.runtime.zero.muon.original_muon",
)  # fmt: skip
"""Modules that a run imports on its way."""
_UNDRAWN = contextlib.ExitStack()
_FILES = 1024
"""Above the number of any file that is open here."""


def prepare() -> None:
    """Imports what runs need, and takes out of them what costs time and is not theirs: drawings, long collections."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    for name in _LATER:
        importlib.import_module(name)
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")  # made once
    _UNDRAWN.enter_context(quick.undrawn())
    quick.short_collections()


class _Rank:
    """A forked process with as much of ``subprocess.Popen`` as a supervisor uses."""

    stdout = stderr = None

    def __init__(self, words: list[str], environment: Mapping[str, str], *, plan: fault.Plan, log: Path) -> None:
        ready, told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.write(told, b"1")
            _live(words, environment, plan, log)
        os.close(told)
        os.read(ready, 1)  # from here on it has a process group, which may be killed
        os.close(ready)
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self) -> int:
        """The same, once it has ended."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code


def apart(work: Callable[[], object]) -> None:
    """Does something in a fork, so that no thread that it starts is left here."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def _live(words: list[str], environment: Mapping[str, str], plan: fault.Plan, log: Path) -> NoReturn:
    code: Any = 1
    try:
        os.closerange(3, _FILES)  # as ``subprocess`` does: a guardian waits for the end of a pipe
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source, target)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.environ.update(environment)
        sys.argv = ["minillm", *words]
        with fault.planned(plan):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def live(words: list[str], *, plans: list[fault.Plan], log: Path) -> int:
    """How the command ends on as many ranks as there are plans: its exit code, as ``minillm launch`` gives it with
    several, else minus the signal that ended it where one did."""
    assert threading.active_count() == 1
    if len(plans) == 1:
        return _Rank(words, {}, plan=plans[0], log=log).wait()

    def start(command: list[str], env: Mapping[str, str], **_: Any) -> _Rank:
        return _Rank(command, env, plan=plans[int(env["RANK"])], log=log)

    place = Place(ranks=len(plans), port=_free_port())
    stand_in = SimpleNamespace(Popen=start, PIPE=-1, DEVNULL=-3)
    with mock.patch.object(supervisor, "subprocess", stand_in), log.open("a") as file, mock.patch("sys.stderr", file):
        return Supervisor(words, place, limit_s=LIMIT_S).run()


def nothing(name: str, detail: str) -> None:
    """The plan of a rank that nothing happens to."""


def recorded(file: Path) -> fault.Plan:
    """Writes the points that are passed into a file, a line each."""
    descriptor: list[int] = []

    def plan(name: str, detail: str) -> None:
        if not descriptor:
            descriptor.append(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666))
        os.write(descriptor[0], f"{point_name(name, detail)}\n".encode())

    return plan


def ended_at(number: int, hit: Path, *, how: signal.Signals = signal.SIGKILL) -> fault.Plan:
    """Sends the process a signal at the point of this number, counted from 0, and writes down which one that was."""
    passed = [0]

    def plan(name: str, detail: str) -> None:
        if passed[0] == number:
            hit.write_text(point_name(name, detail), encoding="utf-8")
            os.kill(os.getpid(), how)
        passed[0] += 1

    return plan


def point_name(name: str, detail: str) -> str:
    """A point by name and detail, without the random part of a staging folder's name."""
    return f"{name} {_OF_AN_ATTEMPT.sub('', detail)}".strip()

"""A rank that dies or hangs ends the whole job within the limit, with an exit code that is not 0, and is named with
what it did (R7, F12). Two ranks each, all cases at once."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillm import exits
from minillm.rank_process import read_proc
from minillm.supervisor import LIMIT_S
from tests.stops.jobs import Job, bare, launched

SHORT_S = 6.0
"""The limit in these tests; a rank is stuck after half of it."""
KILLED = [("kill", phase) for phase in ("rollout", "scoring", "learning", "validation", "save")]
SILENT = [("stop", "rollout"), ("stop", "learning"), ("freeze", "scoring")]
OTHERS = [(plan, "rollout") for plan in ("alarm", "mistake", "child", "compute", "speak")]
Jobs = dict[tuple[str, str], Job]
Told = dict[tuple[str, str], tuple[int, str, float]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """All of them, started together."""
    folder = tmp_path_factory.mktemp("jobs")
    started = {words: launched(folder / "-".join(words), *words, limit_s=SHORT_S) for words in KILLED + SILENT + OTHERS}
    yield started
    for job in started.values():
        job.process.kill()


@pytest.fixture(scope="module")
def told(jobs: Jobs) -> Told:
    """Exit code, output, and seconds from the fault to the end of the job."""
    found, waiting = {}, dict(jobs)
    while waiting:
        for words, job in list(waiting.items()):
            if job.process.poll() is not None or (words[0] == "child" and (job.folder / "child-1").exists()):
                acted = float(job.await_file("acts-1"))
                if words[0] == "child":  # the supervisor itself, as no handler can see it
                    job.process.kill()
                found[words] = (*job.end(), time.time() - acted)
                del waiting[words]
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("words", KILLED, ids=lambda words: words[1])
def test_a_rank_that_is_killed_ends_the_job_and_is_named(words: tuple[str, str], jobs: Jobs, told: Told) -> None:
    code, printed, seconds = told[words]
    (pid,) = (jobs[words].folder / "pid-1").read_text().split()
    assert code == exits.RANK_LOST and seconds < SHORT_S
    assert f"launch: rank 1 (pid {pid}) was killed by SIGKILL in phase {words[1]} " in printed
    assert jobs[words].left() == [] and not list(jobs[words].folder.glob("saved-*"))
    assert not list(jobs[words].folder.glob("minillm-launch-*"))


@pytest.mark.parametrize("words", SILENT, ids="-".join)
def test_a_rank_that_hangs_ends_the_job_and_is_named(words: tuple[str, str], jobs: Jobs, told: Told) -> None:
    code, printed, seconds = told[words]
    assert code == exits.RANK_LOST and seconds < SHORT_S
    assert re.search(rf"launch: rank 1 \(pid \d+\) gave no sign of life for 3 s in phase {words[1]};", printed)
    assert jobs[words].left() == []


def test_control_without_the_supervisor_the_other_rank_waits(tmp_path: Path) -> None:
    ranks = [bare(tmp_path, "stop", rank=rank, ranks=2) for rank in range(2)]
    ranks[0].await_file("acts-1")
    with pytest.raises(AssertionError, match="does not end"):
        ranks[0].end(patience_s=SHORT_S)
    assert read_proc(ranks[1].process.pid).state == "T"
    ranks[1].rest()


def test_a_rank_that_computes_without_a_beat_is_left_alone(jobs: Jobs, told: Told) -> None:
    words = ("compute", "rollout")
    assert told[words][0] == exits.STOPPED and len(list(jobs[words].folder.glob("saved-*"))) == 2
    assert float((jobs[words].folder / "computed-1").read_text()) > SHORT_S / 2, "too short to tell"


def test_the_exit_code_is_that_of_the_rank_that_failed_first(told: Told) -> None:
    code, printed, seconds = told["alarm", "rollout"]
    assert code == exits.ALARMED and "rank 1 (pid" in printed and "ended with exit code 4 in phase rollout" in printed
    assert seconds < SHORT_S
    code, printed, _ = told["mistake", "rollout"]
    assert code == 1 and "rank 1| ZeroDivisionError" in printed and "ended with exit code 1 in phase" in printed


def test_what_other_ranks_print_has_their_number(told: Told) -> None:
    _, printed, _ = told["speak", "rollout"]
    assert {"rank 1| a word", "rank 1| half a line"} <= set(printed.splitlines()) and "launch:" not in printed


def test_nobody_outlives_a_supervisor_that_is_killed(jobs: Jobs, told: Told) -> None:
    words = ("child", "rollout")
    assert told[words][0] == -signal.SIGKILL
    assert len(jobs[words].pids()) == 2 and len(jobs[words].pids("child")) == 1
    jobs[words].await_nobody()


def test_control_without_the_guardian_they_would(tmp_path: Path) -> None:
    job = launched(tmp_path, "child", limit_s=SHORT_S)
    job.await_file("child-1")
    (guardian,) = (pid for pid in children(job.process.pid) if pid not in job.pids())
    os.kill(guardian, signal.SIGKILL)
    job.process.kill()
    job.process.wait()
    left = job.left()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    job.rest()
    assert len(left) == 3


def children(pid: int) -> list[int]:
    """Processes that this one has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_the_limit_is_twenty_seconds(tmp_path: Path) -> None:
    job = launched(tmp_path, "stop")
    acted = float(job.await_file("acts-1"))
    code, printed = job.end()
    assert code == exits.RANK_LOST and "for 10 s in phase rollout" in printed
    assert time.time() - acted < LIMIT_S == 20

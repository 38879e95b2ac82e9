"""SIGTERM and SIGINT save at the next step on all ranks and end with a documented code; a second one leaves at once and
saves nothing (R8, F13). Real signals to real processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from minillm import exits
from minillm.stops import SAME_S, SIGNALS, WAITS_S, Stops, told_ends
from tests.stops.jobs import Job, bare, launched, start

BOTH = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


def going(folder: Path, *words: str, ranks: int = 2) -> Job:
    """A job in the midst of its steps."""
    job = launched(folder, *words, ranks=ranks)
    for rank in range(ranks):
        job.await_file(f"going-{rank}")
    return job


def saved(job: Job, ranks: int = 2) -> set[str]:
    """Step and signal at which each rank has saved: one, where they agree."""
    files = [job.folder / f"saved-{rank}" for rank in range(ranks)]
    return {path.read_text() if path.exists() else "" for path in files}


@BOTH
def test_a_signal_to_the_supervisor_saves_on_all_ranks(number: signal.Signals, tmp_path: Path) -> None:
    job = going(tmp_path)
    job.process.send_signal(number)
    code, printed = job.end()
    assert code == exits.STOPPED == 75 and job.left() == []
    (what,) = saved(job)
    assert what.endswith(number.name) and f"launch: {number.name}: the ranks save and stop" in printed


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_on_all_ranks(rank: int, tmp_path: Path) -> None:
    job = going(tmp_path)
    os.kill(int(job.await_file(f"pid-{rank}")), signal.SIGTERM)
    assert job.end()[0] == exits.STOPPED
    (what,) = saved(job)
    assert what.endswith("SIGTERM")


def test_control_without_the_agreement_one_rank_stops_alone(tmp_path: Path) -> None:
    job = launched(tmp_path, "alone")
    code, printed = job.end()
    assert code == exits.RANK_LOST and "" in saved(job) and len(saved(job)) == 2, printed


def test_signals_at_almost_one_time_are_one(tmp_path: Path) -> None:
    """As where a cluster signals every process of a job, the supervisor among them."""
    job = going(tmp_path)
    for pid in (job.process.pid, *job.pids()):
        os.kill(pid, signal.SIGTERM)
    assert job.end()[0] == exits.STOPPED
    assert len(saved(job)) == 1 and "" not in saved(job)


@pytest.mark.parametrize("plan", ["sleep", "deaf"])
def test_a_second_signal_leaves_at_once_and_saves_nothing(plan: str, tmp_path: Path) -> None:
    """Also a rank that answers no signal."""
    job = launched(tmp_path, plan)
    job.await_file("sleeps-1")
    job.process.send_signal(signal.SIGTERM)
    time.sleep(SAME_S + 0.2)
    assert job.process.poll() is None, "the first one waits for the end of the step"
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == exits.by_signal(signal.SIGINT) == 130
    assert saved(job) == {""} and job.left() == []


@BOTH
def test_one_process_needs_no_supervisor(number: signal.Signals, tmp_path: Path) -> None:
    job = bare(tmp_path / "once")
    job.await_file("going-0")
    job.process.send_signal(number)
    assert job.end()[0] == exits.STOPPED and saved(job, 1).pop().endswith(number.name)

    job = bare(tmp_path / "twice", "sleep")
    job.await_file("sleeps-0")
    job.process.send_signal(signal.SIGINT)
    time.sleep(SAME_S + 0.2)
    assert job.process.poll() is None
    job.process.send_signal(number)
    assert job.end()[0] == exits.by_signal(number) and saved(job, 1) == {""}


def test_a_job_without_a_boundary_ends_by_the_signal(tmp_path: Path) -> None:
    """Before a run has begun, and in commands that save nothing: there is nothing to wait for."""
    job = launched(tmp_path, command=["bash", "-c", "touch $0/here-$RANK; sleep 600", str(tmp_path)])
    for rank in range(2):
        job.await_file(f"here-{rank}")
    job.process.send_signal(signal.SIGTERM)
    code, printed = job.end()
    assert code == exits.by_signal(signal.SIGTERM) == 143 and "rank 1" not in printed


TOLD = "SIGTERM in phase loading: ends without a save, code 143; the same command goes on from what is saved, or begins"


def loading(folder: Path, how: str) -> Job:
    """A run's command before its first step."""
    job = start(folder, [sys.executable, "-m", "tests.stops.loads", str(folder), how])
    job.await_file("loads-0")
    job.process.send_signal(signal.SIGTERM)
    return job


def test_a_signal_while_loading_is_told_and_ends_the_process_by_itself(tmp_path: Path) -> None:
    code, printed = loading(tmp_path, "python").end()
    assert code == -signal.SIGTERM and printed.splitlines() == [TOLD]


def test_a_signal_in_a_long_call_is_told_too(tmp_path: Path) -> None:
    code, printed = loading(tmp_path, "c").end()
    assert code == exits.by_signal(signal.SIGTERM) == 143 and printed.splitlines() == [TOLD]


def test_control_without_the_watching_thread_a_long_call_hears_nothing(tmp_path: Path) -> None:
    job = loading(tmp_path, "patient")
    time.sleep(WAITS_S + 0.5)
    assert job.process.poll() is None
    job.rest()


def test_the_end_of_a_forked_child_is_none_of_its_parent(tmp_path: Path) -> None:
    code, printed = loading(tmp_path, "forks").end()
    assert code == -signal.SIGTERM and printed.splitlines() == [f"child ended by {signal.SIGTERM}, parent lives", TOLD]


def test_a_signal_that_the_steps_have_taken_is_theirs(tmp_path: Path) -> None:
    code, printed = loading(tmp_path, "steps").end()
    assert code == exits.STOPPED and printed.splitlines() == ["Stopped: SIGTERM: saved"]


def test_a_signal_while_ranks_load_is_told_once(tmp_path: Path) -> None:
    job = launched(tmp_path, "python", module="tests.stops.loads")
    for rank in range(2):
        job.await_file(f"loads-{rank}")
    job.process.send_signal(signal.SIGTERM)
    code, printed = job.end()
    assert code == 143 and printed.count(TOLD) == 1 and "rank" not in printed.replace("the ranks", "")


def test_nothing_is_left_of_the_telling() -> None:
    """A test or a notebook may call a command many times."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        open_before, threads_before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for _ in range(20):
            with told_ends():
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        patience = time.monotonic() + 10
        while threading.active_count() > threads_before and time.monotonic() < patience:
            time.sleep(0.01)
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (open_before, threads_before)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(signal.SIGTERM, before)


class One:
    """The only rank."""

    size = 1

    def most(self, value: int) -> int:
        raise AssertionError("one process makes no collective")


@pytest.mark.parametrize("late", [False, True])
def test_the_flag_is_all_that_a_signal_sets(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with Stops() as stops:
            assert stops.agreed(One()) == ""  # type: ignore[arg-type]
            signal.raise_signal(signal.SIGTERM)
            assert [stops.agreed(One()) for _ in range(2)] == ["SIGTERM"] * 2  # type: ignore[arg-type]
            if late:
                later = time.monotonic() + SAME_S
                monkeypatch.setattr(time, "monotonic", lambda: later)
        if not late:  # the same signal by another way, when the run has ended
            signal.raise_signal(signal.SIGTERM)
        assert ([signal.getsignal(number) for number in SIGNALS] == before) is late
    finally:
        for number, owner in zip(SIGNALS, before, strict=True):
            signal.signal(number, owner)


class Other:
    """Ranks of which another one has got the signal."""

    size = 2

    def most(self, value: int) -> int:
        return signal.SIGTERM


def test_a_signal_that_comes_after_that_of_another_rank_ends_nothing() -> None:
    """Signals to the hosts of a cluster come one after the other, and ranks that have saved are on their way out."""
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with Stops() as stops:
            assert stops.agreed(Other()) == "SIGTERM"  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGTERM)  # would end this process
        assert [signal.getsignal(number) for number in SIGNALS] != before
    finally:
        for number, owner in zip(SIGNALS, before, strict=True):
            signal.signal(number, owner)


def test_a_signal_that_nobody_answered_is_not_lost() -> None:
    heard = list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with Stops():
            signal.raise_signal(signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
        with pytest.raises(ValueError), Stops():  # an error says more
            signal.raise_signal(signal.SIGTERM)
            raise ValueError
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_is_installed_where_signals_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        _nothing_is_installed(monkeypatch)
    finally:
        signal.signal(signal.SIGINT, ours)


def _nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    inside = list[object]()

    def enter() -> None:
        with Stops() as stops:
            inside.extend(signal.getsignal(number) for number in SIGNALS)
            assert stops.agreed(One()) == ""  # type: ignore[arg-type]

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == before
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    enter()
    assert inside == before * 2
    monkeypatch.delattr(sys, "ps1")
    enter()
    assert not set(inside[4:]) & set(before), "control: here they are ours"


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stops():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

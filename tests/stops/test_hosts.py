"""Launchers of several hosts end together, however one of them ends, and nobody outlives who started them (R8, D10).

Two hosts stand on this machine, behind a program in the place of ssh; the processes and signals are real.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minillm import exits
from minillm.hosts import Hosts, _Host
from minillm.rank_process import Voice
from minillm.stops import SAME_S
from minillm.supervisor import Place, Supervisor
from tests.stops.hosts import on_hosts
from tests.stops.jobs import ROOT, Job

LIMIT_S = 4.0


def going(folder: Path, *words: str, limit_s: float = 20.0) -> Job:
    """A job in the midst of its steps, on both hosts."""
    job = on_hosts(folder, *words, limit_s=limit_s)
    for rank in range(2):
        job.await_file(f"going-{rank}")
    return job


def saved(job: Job) -> set[str]:
    """Step and signal at which each rank has saved."""
    files = [job.folder / f"saved-{rank}" for rank in range(2)]
    return {path.read_text() if path.exists() else "" for path in files}


def test_ranks_of_all_hosts_are_numbered_through_and_get_what_is_passed_on(tmp_path: Path) -> None:
    told = ["bash", "-c", 'env >"$0/env-$RANK"; pwd >>"$0/env-$RANK"; echo "spoken by $RANK"', str(tmp_path)]
    job = on_hosts(
        tmp_path, slots=2, command=told, port=23457, options=["--env", "MY_OWN"],
        environment={"GLOO_SOCKET_IFNAME": "lo", "MY_OWN": "a b'c", "MY_OTHER": "1", "HF_TOKEN": "secret"},
    )  # fmt: skip
    code, printed = job.end()
    assert code == exits.DONE, printed
    for rank in range(4):
        lines = set(job.await_file(f"env-{rank}").splitlines())
        assert {f"RANK={rank}", f"LOCAL_RANK={rank % 2}", "WORLD_SIZE=4", "LOCAL_WORLD_SIZE=2"} <= lines
        assert {"MASTER_ADDR=127.0.0.1", "MASTER_PORT=23457", "GLOO_SOCKET_IFNAME=lo", "MY_OWN=a b'c"} <= lines
        assert str(ROOT) in lines, "the working folder comes along"
        assert not any(line.startswith(("MY_OTHER", "HF_TOKEN")) for line in lines)
    words = printed.splitlines()
    assert {"spoken by 0", "rank 1| spoken by 1", "two| rank 2| spoken by 2", "two| rank 3| spoken by 3"} <= set(words)
    assert any(re.fullmatch(r"two\| launch: node 1 of 2, on \S+: 2 ranks", line) for line in words)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_on_all_hosts(number: signal.Signals, tmp_path: Path) -> None:
    job = going(tmp_path)
    job.process.send_signal(number)
    code, printed = job.end()
    assert code == exits.STOPPED and job.left() == [], printed
    (what,) = saved(job)
    assert what.endswith(number.name)


def test_a_second_signal_ends_all_hosts_at_once(tmp_path: Path) -> None:
    job = on_hosts(tmp_path, "deaf")
    job.await_file("sleeps-1")
    job.process.send_signal(signal.SIGTERM)
    time.sleep(SAME_S + 0.5)
    assert job.process.poll() is None, "the first one waits for the end of the step"
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == exits.by_signal(signal.SIGINT)
    assert saved(job) == {""} and job.left() == []


@pytest.mark.parametrize(("plan", "code"), [("kill", exits.RANK_LOST), ("alarm", exits.ALARMED), ("mistake", 1)])
def test_a_rank_that_fails_ends_all_hosts_with_its_code(plan: str, code: int, tmp_path: Path) -> None:
    job = on_hosts(tmp_path, plan, limit_s=LIMIT_S)
    began = float(job.await_file("acts-1"))
    found, printed = job.end()
    # Of two hosts that end with 5 the one that was left alone may say so first; the rank is named in any case.
    host = "(one|two)" if code == exits.RANK_LOST else "two"
    assert found == code and re.search(rf"launch: host {host} \(node \d\) ended with exit code {code};", printed), (
        printed
    )
    assert "two| launch: rank 1 (pid " in printed
    assert time.time() - began < LIMIT_S + 2 and job.left() == []


def test_a_host_whose_launcher_is_killed_ends_the_other(tmp_path: Path) -> None:
    job = going(tmp_path, limit_s=LIMIT_S)
    os.kill(int(job.await_file("launcher-two")), signal.SIGKILL)
    began = time.monotonic()
    code, printed = job.end()
    assert code in {exits.RANK_LOST, 137}, printed  # 137: as the remote shell, or ssh itself, tells it
    assert time.monotonic() - began < LIMIT_S + 2
    job.await_nobody()


def test_a_way_to_a_host_that_is_lost_ends_both(tmp_path: Path) -> None:
    job = going(tmp_path, limit_s=LIMIT_S)
    os.kill(int(job.await_file("ssh-two")), signal.SIGKILL)
    code, printed = job.end()
    assert code == exits.RANK_LOST and "host two (node 1) ended with SIGKILL" in printed
    job.await_nobody()


def test_hosts_save_and_stop_where_the_first_launcher_is_killed(tmp_path: Path) -> None:
    job = going(tmp_path)
    job.process.kill()
    job.await_nobody()
    (what,) = saved(job)
    assert what.endswith("SIGTERM")
    job.process.communicate()


def test_hosts_save_and_stop_where_nothing_is_heard_any_more(tmp_path: Path) -> None:
    """As where a cable is cut: no end of the input arrives."""
    job = going(tmp_path, limit_s=1.0)
    job.process.send_signal(signal.SIGSTOP)
    job.await_nobody()
    (what,) = saved(job)
    job.process.send_signal(signal.SIGCONT)
    code, printed = job.end()
    assert what.endswith("SIGTERM") and code == exits.STOPPED, printed


def test_control_a_launcher_without_a_leash_outlives_its_input(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "minillm", "launch", "--ranks", "1", "sleep", "600"]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4)
    process.terminate()
    assert process.wait(timeout=20) == exits.by_signal(signal.SIGTERM)


def test_ranks_that_answer_nothing_end_with_a_lost_leash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By force, once they have had their time."""
    from minillm import leash

    heard, clock = list[int](), [100.0]
    ours, theirs = os.pipe()
    monkeypatch.setattr(leash.time, "monotonic", lambda: clock[0])
    lost = list[float]()
    held = leash.Leash(ours, heard.append, lost=lambda: lost.append(clock[0]), limit_s=2.0)
    os.write(theirs, b"0\n1")
    assert held.pass_on() and not held.look(101.0) and heard == []
    os.write(theirs, b"5\nnonsense\n9")
    assert held.pass_on() and heard == [signal.SIGTERM], "a line counts when it is whole, and nothing else does"
    os.close(theirs)
    assert not held.pass_on() and not held.pass_on() and heard == [signal.SIGTERM] and lost == [100.0]
    assert not held.look(100.0 + leash.PATIENCE * 2.0) and held.look(100.1 + leash.PATIENCE * 2.0)
    os.close(ours)


COUNTS = """
import pathlib, signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
pathlib.Path(sys.argv[1], "going").touch()
until = time.monotonic() + 60
while time.monotonic() < until and not pathlib.Path(sys.argv[1], "done").exists():
    time.sleep(0.05)
pathlib.Path(sys.argv[1], "heard").write_text(str(len(heard)))
sys.exit(75)
"""


@pytest.mark.parametrize("asked_before", [True, False])
def test_a_leash_that_is_lost_does_not_ask_twice(asked_before: bool, tmp_path: Path) -> None:
    """A second signal would end a save that is under way."""
    ours, theirs = os.pipe()

    def holder() -> None:
        while not (tmp_path / "going").exists():
            time.sleep(0.02)
        if asked_before:
            os.write(theirs, b"%d\n" % signal.SIGTERM)
            time.sleep(SAME_S + 0.3)
        os.close(theirs)
        time.sleep(1.0)
        (tmp_path / "done").touch()

    thread = threading.Thread(target=holder)
    thread.start()
    place = Place(ranks=1, port=1)
    code = Supervisor([sys.executable, "-c", COUNTS, str(tmp_path)], place, leash=ours).run()
    thread.join()
    os.close(ours)
    assert code == exits.STOPPED and (tmp_path / "heard").read_text() == "1"


class Way:
    """An ssh that has ended, or does not."""

    def __init__(self, code: int | None) -> None:
        self.code, self.returncode = code, code
        self.stdin = io.BytesIO()

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.code = -9


def hosts_that(*codes: int | None) -> Hosts:
    launch = Hosts([], limit_s=4.0)
    says = Voice(io.BytesIO(), sys.stdout, "", spoken=True)
    launch._hosts = [
        _Host(name=f"h{node}", node=node, process=Way(code), says=says)  # type: ignore[arg-type]
        for node, code in enumerate(codes)
    ]
    return launch


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [([75, 75], exits.STOPPED), ([0, 75], exits.STOPPED), ([75, -9], exits.RANK_LOST), ([0, 0], exits.DONE)],
)
def test_hosts_that_all_ended_while_they_were_being_ended_have_a_verdict(codes: list[int], verdict: int) -> None:
    launch = hosts_that(*codes)
    for host, code in zip(launch._hosts, codes, strict=True):
        host.ended_by_us, host.code = True, code
    assert launch._verdict() == verdict


def test_a_host_that_was_let_go_is_told_nothing_more() -> None:
    launch = hosts_that(None, 0)
    launch._let_go()
    for host in launch._hosts:  # its end has not been seen yet
        assert host.code is None and host.process.stdin is not None and host.process.stdin.closed
        host.tell(0)
        host.end(signal.SIGTERM)
    launch._go_round(time.monotonic())
    assert [host.code for host in launch._hosts] == [-9, 0] and launch._verdict() == exits.RANK_LOST


def test_a_host_that_cannot_be_reached_is_told_as_something_to_mend(tmp_path: Path) -> None:
    job = on_hosts(tmp_path, closed="two", limit_s=LIMIT_S)
    code, printed = job.end()
    assert code == exits.MENDABLE, printed
    assert "two| ssh: connect to host two: refused" in printed
    assert "launch: host two (node 1) did not start its launcher (exit code 255)" in printed
    job.await_nobody()


def test_a_host_that_answers_nothing_is_not_waited_for(tmp_path: Path) -> None:
    job = on_hosts(tmp_path, hangs="two", limit_s=LIMIT_S, command=["bash", "-c", "exit 3"])
    began = time.monotonic()
    code, printed = job.end()
    assert code == 3 and "launch: host one (node 0) ended with exit code 3" in printed
    assert time.monotonic() - began < 30, "beside other processes"

"""Two processes do not work in one run's folder, and a dead one keeps nobody out."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import run_lock as module
from minillm.errors import RunInUse
from minillm.run_lock import LOCK, owner, run_lock

ROOT = Path(__file__).resolve().parents[2]
HOLDS = """
import sys, time
from pathlib import Path
from minillm.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(30)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process, once it holds the lock."""
    other = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def test_the_second_is_refused_by_name_until_the_first_is_dead(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        for _ in range(2):  # being refused changes nothing
            with pytest.raises(RunInUse, match=f"process {other.pid} on .* works in it"), run_lock(tmp_path):
                pass
        other.kill()
        other.wait(timeout=20)
    with run_lock(tmp_path):
        assert str(other.pid) not in (tmp_path / LOCK).read_text()
    with run_lock(tmp_path):  # an owner that ended well lets go, too
        pass


def test_who_only_asks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``owner`` holds the lock for an instant; here until the starter has waited once."""
    with run_lock(tmp_path):
        pass
    pauses = list[float]()
    with (tmp_path / LOCK).open(encoding="utf-8") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)

        def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if seconds:
                fcntl.flock(asking, fcntl.LOCK_UN)

        monkeypatch.setattr(module.time, "sleep", sleep)
        with run_lock(tmp_path):
            assert len(pauses) == 2 and owner(tmp_path).startswith(f"process {os.getpid()}")


def test_control_without_a_second_try_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSES_S", ())
    with run_lock(tmp_path):
        pass
    with (tmp_path / LOCK).open(encoding="utf-8") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        with pytest.raises(RunInUse), run_lock(tmp_path):
            pass


def test_control_without_the_kernels_lock_both_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path) as other:
        monkeypatch.setattr(module.fcntl, "flock", lambda file, how: None)
        with run_lock(tmp_path):
            assert other.poll() is None and str(other.pid) not in (tmp_path / LOCK).read_text(), "two owners"
        other.kill()

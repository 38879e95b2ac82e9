"""A log that the disk refuses: whole lines only, none lost, told once, and an error only where it must be whole."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minillm import exits, unfinished
from minillm.errors import DataError, DiskError, MinillmError, RankLost, SaveFailed, as_disk_error, told_to_all
from minillm.ranks import Ranks
from minillm.run_log import RunLog
from minillm.store import UNFINISHED, RunFolder, replaced_folder, told_as_disk_error, write_text
from minillm.unfinished import Keeper
from tests.faults.sides import alone, in_threads

Err = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[2]
LINES = [json.dumps({"step": step, "loss": "x" * step}) + "\n" for step in range(6)]


@contextmanager
def largest(size: int) -> Iterator[None]:
    """The kernel refuses to let this process's files grow beyond so many bytes: a real error of the system, which also
    takes the beginning of a write. Nothing else of a test may be written meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def whole(file: Path) -> list[str]:
    """What of the lines stands in a file; fails where there is half a line."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    assert "".join(LINES).startswith(text) and (not text or text.endswith("\n")), text
    return text.splitlines(keepends=True)


def test_at_every_byte_the_log_has_whole_lines_and_once_there_is_room_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr("minillm.run_log.note", notes.append)
    ends = [sum(map(len, LINES[: number + 1])) for number in range(len(LINES))]
    for room in range(ends[3] + 1):
        notes.clear()
        log = RunLog(tmp_path / f"log-{room}")
        with largest(room):
            for line in LINES[:4]:
                log.add(line)
            there = whole(tmp_path / f"log-{room}")
            assert there == LINES[: sum(end <= room for end in ends)][:4]
            if len(there) < 4:
                with pytest.raises(DiskError, match=rf"{4 - len(there)} lines? not written.*: File too large"):
                    log.length()
        log.add(LINES[4])
        assert whole(tmp_path / f"log-{room}") == LINES[:5] and log.length() == ends[4]
        said = ["cannot be written (File too large); its lines are kept", "is written again, and has all its lines"]
        assert len(notes) == (0 if len(there) == 4 else 2)
        assert all(words in note for words, note in zip(said, notes, strict=False))
    print(f"{ends[3] + 1} places in a log")


def test_control_a_log_that_only_goes_on_tears_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: RunLog, line: str) -> None:
        with (tmp_path / "log").open("a") as file:
            file.write(line)

    monkeypatch.setattr(RunLog, "add", add)
    log = RunLog(tmp_path / "log")
    with largest(len(LINES[0]) // 2), pytest.raises(OSError, match="File too large"):
        log.add(LINES[0])
    with pytest.raises(AssertionError):
        whole(tmp_path / "log")


def test_a_device_that_is_always_full(tmp_path: Path, capsys: Err) -> None:
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    folder = RunFolder(tmp_path, writes=True)
    heard: list[object] = []
    folder.listen(heard.append)
    for step in range(3):
        folder.log({"step": step})
    told = capsys.readouterr().err
    assert told.count("No space left on device") == 1 and len(heard) == 3
    with pytest.raises(DiskError, match=r"3 lines not written: .*: No space left on device\n.*make room"):
        folder.require_log()
    file.unlink()
    folder.require_log()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 1, 2]
    assert "has all its lines" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["gone", "cut", "its folder"])
def test_a_log_that_lost_lines_is_not_begun_again(lost: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    log, file = RunLog(run / "log"), run / "log"
    log.add(LINES[0])
    kept = file.read_bytes()
    if lost == "cut":
        file.write_bytes(b"")
    else:
        file.unlink()
    if lost == "its folder":
        run.rmdir()
    log.add(LINES[1])
    with pytest.raises(DiskError, match="1 line not written"):
        log.flush()
    assert not file.exists() or not file.read_bytes()
    run.mkdir(exist_ok=True)
    file.write_bytes(kept)  # put back
    log.flush()
    assert whole(file) == LINES[:2]


def test_what_a_run_says_on_its_way_comes_later(tmp_path: Path, capsys: Err) -> None:
    folder = RunFolder(tmp_path, writes=True)
    folder.set_status(state="running")
    with largest(0):
        folder.tell_status(stages={"one": 1})
        with pytest.raises(DiskError, match=r"run.json: File too large"):
            folder.set_status(state="done")
    assert "the run goes on" in capsys.readouterr().err and folder.status() == {"state": "running"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]
    folder.set_status(state="done")
    assert folder.status() == {"state": "done", "stages": {"one": 1}}


def test_an_evaluation_goes_on_without_the_rows_that_it_keeps(tmp_path: Path, capsys: Err) -> None:
    keeper = Keeper(tmp_path, asked={"a": 1}, ranks=alone(), say=print)
    with largest(10):
        keeper.keep("samples", [((0, 0, 0), {"uid": "x"})])
    assert "the evaluation goes on" in capsys.readouterr().err and not list(tmp_path.iterdir())
    keeper.keep("samples", [((0, 0, 0), {"uid": "x"})])
    assert unfinished.asked_before(tmp_path) == {"a": 1} and (tmp_path / UNFINISHED).is_file()


def rust(number: int) -> Exception:
    return Exception(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


MEETS: dict[str, tuple[Callable[[], Exception], type[Exception], type[Exception]]] = {
    "of the user": (lambda: DataError("mend it"), DataError, DataError),
    "failed save": (lambda: SaveFailed("no room"), SaveFailed, SaveFailed),
    "of the disk": (lambda: OSError(28, "No space left on device"), DiskError, DiskError),
    "of the disk, in Rust": (lambda: rust(28), DiskError, DiskError),
    "read-only": (lambda: OSError(30, "Read-only file system", "run.json"), DiskError, DiskError),
    "a mistake of ours": (lambda: ZeroDivisionError("by zero\nmore"), ZeroDivisionError, RankLost),
    "a broken pipe": (lambda: BrokenPipeError(32, "Broken pipe"), BrokenPipeError, RankLost),
}


@pytest.mark.parametrize("what", MEETS)
def test_what_the_first_rank_meets_ends_all(what: str) -> None:
    error, mine, others = MEETS[what]
    ranks = Ranks()

    def fails() -> None:
        raise error()

    def of_first(side: Ranks) -> None:
        assert isinstance(Ranks.of_first(side, fails), type(None))

    with pytest.raises(mine) as alone_found:
        ranks.of_first(fails)
    ended = in_threads(2, of_first)
    assert [type(one) for one in ended] == [mine, others] and type(alone_found.value) is mine
    if others is RankLost:
        assert "rank 0 failed (" in str(ended[1]) and "more" not in str(ended[1])
    if mine is DiskError:
        assert ended[0].exit_code == exits.SAVE_FAILED and "make room" in str(ended[1]) and ended[0].__cause__


def test_control_an_error_that_is_not_told_leaves_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_first(self: Ranks, work: Callable[[], object]) -> object:
        told = [work()] if self.first else []
        return self.gather_objects(told)[0]

    monkeypatch.setattr("tests.faults.sides.LIMIT_S", 0.2)
    ended = in_threads(2, lambda side: of_first(side, lambda: 1 // 0))
    assert isinstance(ended[0], ZeroDivisionError) and not isinstance(ended[1], MinillmError)


def test_an_error_says_file_reason_and_remedy() -> None:
    found = as_disk_error(OSError(28, "No space left on device", "runs/a/run.json"), what="the end")
    assert str(found).splitlines()[0] == "the end: runs/a/run.json: No space left on device"
    assert as_disk_error(ValueError("28")) is None and isinstance(told_to_all(ValueError("28")), RankLost)
    with pytest.raises(ZeroDivisionError), told_as_disk_error():
        raise ZeroDivisionError


@pytest.mark.parametrize("at", ["write", "sync", "first rename", "second rename"])
def test_a_folder_that_cannot_be_replaced_stays_and_leaves_nothing(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename, renamed = tmp_path / "student", Path.rename, [0]
    with replaced_folder(folder) as staging:
        write_text(staging / "a", "old")

    def refuses(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def renaming(self: Path, target: Path) -> Path:
        renamed[0] += 1
        if renamed[0] == 1 + (at == "second rename"):
            refuses()
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"), replaced_folder(folder) as staging:
        (staging / "a").write_text("new")
        if at == "write":
            refuses()
        elif at == "sync":
            patch.setattr("minillm.store.sync", refuses)
        else:
            patch.setattr(Path, "rename", renaming)
    assert [path.name for path in tmp_path.iterdir()] == ["student"] and (folder / "a").read_text() == "old"


OUTPUT = """
import contextlib, sys
from minillm.terminal import lasting_output
with lasting_output() if sys.argv[1] == "lasting" else contextlib.nullcontext():
    print("step 1", flush=True)
    print("step 2", file=sys.stderr)
    {room}
    print("step 3", flush=True)
open(sys.argv[2], "w").close()
"""


@pytest.mark.parametrize(("how", "ends"), [("lasting", True), ("as it was", False)])
def test_output_that_goes_nowhere_ends_nothing(how: str, ends: bool, tmp_path: Path) -> None:
    """As where the terminal's log is on the disk that is full; the second is the control."""
    code = OUTPUT.format(room="")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, how, str(tmp_path / "ended")], cwd=ROOT, stdout=full, stderr=full, check=False
        )
    assert (done.returncode == 0) == ends == (tmp_path / "ended").exists()


def test_output_that_was_lost_is_counted(tmp_path: Path) -> None:
    room = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))"
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3, -1))\n" + OUTPUT.format(room=room)
    with (tmp_path / "out").open("w") as out:
        subprocess.run(
            [sys.executable, "-c", code, "lasting", str(tmp_path / "ended")], cwd=ROOT, stdout=out, check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
    assert (tmp_path / "out").read_text() == (
        "ste\nnote: 4 bytes of output could not be written (File too large)\nstep 3\n"
    )

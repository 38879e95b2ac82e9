"""A full disk, at every byte and operation where it may show: the save fails on all ranks and leaves nothing.

The checkpoints before it are as they were, and once there is room the same save is made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from minillm.checkpoints import Checkpoint, Checkpoints
from minillm.disk import DISK, Disk, Sink
from minillm.errors import SaveFailed
from tests.faults.disks import Full, Recording
from tests.faults.power_cut import snapshot
from tests.faults.sides import in_threads
from tests.faults.toy import is_right, save, store

ROOT = Path(__file__).resolve().parents[2]


def prepared(run: Path) -> Path:
    """A run with two checkpoints, which the next save brings over the limit."""
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    for step in (1, 2):
        save(store(run), step)
    return run


def boundaries(disk: Recording) -> Iterator[dict[str, int]]:
    """Every place at which a disk may turn out full: before each operation, and within each write."""
    yield from ({"at": number} for number in range(len(disk.done)))
    sizes = [len(operation.content) for operation in disk.done if operation.kind == "write"]
    for size, end in zip(sizes, accumulate(sizes), strict=True):
        yield from ({"room": end - size + inner} for inner in sorted({0, 1, size // 2, size - 1}))


def on(run: Path, disks: list[Disk]) -> tuple[list[Any], list[str]]:
    """(What the save of step 3 ends in on each rank, what was said)."""
    said: list[str] = []
    ended = in_threads(
        len(disks), lambda ranks: save(store(run, ranks=ranks, disk=disks[ranks.rank], said=said.append), 3, ranks)
    )
    return ended, said


def check(run: Path, ended: list[Any], said: list[str]) -> str:
    """How a save ended on a full disk, once everything is as it must be then."""
    there = {path.name for path in (run / "checkpoints").iterdir()}
    if all(isinstance(one, Checkpoint) for one in ended):  # only the oldest could not be removed, which is said
        assert is_right(ended[0]) and any("cannot be removed" in line for line in said)
        how = "saved"
    else:
        assert all(isinstance(one, SaveFailed) for one in ended), ended
        assert all("No space left on device" in str(one) for one in ended)
        how = "failed"
        if "step-00000003" in there:  # the rename was made, its sync was not
            how = "failed in the last sync"
        else:
            assert there == {"step-00000001", "step-00000002"}
    found = store(run).choose(True)
    assert found is not None and is_right(found) and found.manifest.step == (2 if how == "failed" else 3)
    again = store(run)
    again.clean()
    step = 3 if how == "failed" else 4
    assert is_right(save(again, step)) and again.steps() == [step, step - 1]
    assert all(not name.startswith(".") for name in os.listdir(again.root))
    return how


def test_one_rank_at_every_boundary(tmp_path: Path) -> None:
    disk = Recording()
    on(prepared(tmp_path / "run"), [disk])
    places, ways = list(boundaries(disk)), Counter[str]()
    for place in places:
        run = prepared(tmp_path / "run")
        ways[check(run, *on(run, [Full(**place)]))] += 1
    print(f"{len(places)} boundaries: {dict(ways)}")
    assert len(places) >= 35 and ways["failed"] >= 28 and ways["failed in the last sync"] == 1 and ways["saved"] >= 4


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_of_two_at_every_boundary_of_its_own(rank: int, tmp_path: Path) -> None:
    disk = Recording()
    on(prepared(tmp_path / "run"), [disk if one == rank else DISK for one in range(2)])
    places = list(boundaries(disk))
    for place in places:
        run = prepared(tmp_path / "run")
        check(run, *on(run, [Full(**place) if one == rank else DISK for one in range(2)]))
    print(f"rank {rank} of 2: {len(places)} boundaries")
    assert len(places) >= (35, 7)[rank]


def test_what_is_no_full_disk_is_told_too_and_is_no_failed_save(tmp_path: Path) -> None:
    """A mistake of the program on one rank must neither leave the others waiting nor be gone on from."""

    def broken(sink: Sink) -> None:
        sink.write(b"begun")
        raise ZeroDivisionError

    run = prepared(tmp_path / "run")
    before = snapshot(run)
    for files in ({"a.json": broken}, {"a.pt": broken}, {"../a.json": broken}, {"MANIFEST.json": broken}):
        ended = in_threads(
            2,
            lambda ranks, files=files: store(run, ranks=ranks).save(  # type: ignore[misc]
                step=3, stage="s", fingerprints={}, files=files if ranks.rank == 1 else {}
            ),
        )
        assert isinstance(ended[0], RuntimeError) and "rank 1 failed" in str(ended[0]) and snapshot(run) == before
        assert isinstance(ended[1], Exception) and not isinstance(ended[1], SaveFailed)
    ended = in_threads(
        2, lambda ranks: store(run, ranks=ranks).save(
            step=3, stage="s", fingerprints={}, files={"same.json": lambda sink: sink.write(b"1")}
        ),
    )  # fmt: skip
    assert sorted(type(one).__name__ for one in ended) == ["FileExistsError", "RuntimeError"]
    assert snapshot(run) == before


def test_control_without_agreement_the_other_rank_does_not_learn_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(self: Checkpoints, staging: Path, files: Any) -> Any:
        return {name: self._write_one(staging, name, write) for name, write in files.items()}

    monkeypatch.setattr(Checkpoints, "_write", alone)
    monkeypatch.setattr("tests.faults.sides.LIMIT_S", 0.2)
    ended, _ = on(prepared(tmp_path / "run"), [DISK, Full(room=0)])
    assert isinstance(ended[1], OSError) and not isinstance(ended[0], SaveFailed)


LIMITED = """
import resource, signal, sys
from pathlib import Path
from minillm.errors import SaveFailed
from tests.faults.toy import save, store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    save(store(Path(sys.argv[1])), 3)
except SaveFailed as error:
    print(error)
"""


def test_a_limit_that_the_kernel_sets_is_a_failed_save(tmp_path: Path) -> None:
    """A real error of the system, in a process of its own."""
    run = prepared(tmp_path / "run")
    before = snapshot(run)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(run)], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert "rank 0 failed" in done.stdout and "File too large" in done.stdout
    assert snapshot(run) == before

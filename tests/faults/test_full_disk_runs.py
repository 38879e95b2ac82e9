"""Whole runs on a disk that becomes full, or goes away, on their way: how they end, and that nothing is lost by it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minillm import exits
from tests.dist.ranks import ROOT, start_ranks

MEGABYTES = 24
ON_A_SMALL_DISK = f'mount -t tmpfs -o size={MEGABYTES}m tmpfs "$0" && exec "$1" -m tests.faults.full_worker "$0" small'


def small_disk(folder: Path) -> list[str]:
    """The beginning of a command that mounts a disk of its own there, which goes with the process; none where the
    system does not let us."""
    for how in (["unshare", "-rm"], ["unshare", "-m"]):
        try:
            command = [*how, "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0"', str(folder)]
            if subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0:
                return how
        except OSError:
            pass
    return []


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each run of the worker told."""
    folder = tmp_path_factory.mktemp("full")
    plain = [sys.executable, "-m", "tests.faults.full_worker", str(folder), "any"]
    how = small_disk(folder)
    command = [*how, "sh", "-c", ON_A_SMALL_DISK, str(folder), sys.executable] if how else plain
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {found["what"]: found for found in map(json.loads, done.stdout.splitlines())}


def last_lines(said: str) -> list[str]:
    """The error that a run ended with, without what came before it."""
    lines = said.splitlines()
    begin = max(number for number, line in enumerate(lines) if line and not line.startswith(" "))
    return lines[begin:]


def test_a_student_that_finds_no_room_at_any_page_leaves_the_one_before(told: dict[str, dict[str, Any]]) -> None:
    """The worker holds every file against what it was."""
    if "publishing" not in told:
        pytest.skip("this system lets us mount no disk of our own")
    found = told["publishing"]
    print(f"published with 0 to {found['pages']} free pages")
    assert len(found["failed"]) == found["pages"] >= 8
    for line in found["failed"]:
        assert line.startswith("/published: a student of 19,520 bytes") and line.endswith("No space left on device")


def test_a_disk_that_takes_nothing_is_found_before_the_first_step(told: dict[str, dict[str, Any]]) -> None:
    if "beginning" not in told:
        pytest.skip("this system lets us mount no disk of our own")
    found = told["beginning"]
    for what, reason, codes in (
        ("full", "No space left on device", {exits.MENDABLE, exits.SAVE_FAILED}),
        ("read-only", "Read-only file system", {exits.MENDABLE}),
    ):
        code, said = found[what]
        assert code in codes and reason in said and "Traceback" not in said and "validation  loss" not in said, said
    assert not found["left"]


ENDS = {
    "a better student": ("student: a student of 19,520 bytes", "goes on from step-00000003"),
    "results": ("results/samples.jsonl", "goes on from step-00000004"),
    "done": ("done/run.json", "goes on from step-00000004"),
    "no save may fail": (
        "preparing: DiskError: 1 line not written",
        "no checkpoint is there: the same command starts over",
    ),
    "gone": ("4 lines not written", "no checkpoint is there"),
}


@pytest.mark.parametrize("what", ENDS)
def test_a_run_that_finds_no_room_says_so_and_ends_the_same_once_there_is(
    what: str, told: dict[str, dict[str, Any]]
) -> None:
    found, (where, way_on) = told[what], ENDS[what]
    first, *rest = last_lines(found["said"])
    assert found["code"] == exits.SAVE_FAILED == 6 and "Traceback" not in found["said"]
    assert first.startswith(("DiskError: ", "SaveFailed: ")) and where in first
    reasons = ("No space left on device", "File too large", "it has 0 bytes of the")
    assert any(reason in first for reason in reasons) and any("make room there" in line for line in rest)
    assert way_on in rest[-1] and not found["hidden"]
    assert found["again"] == exits.DONE and found["left"] == told["whole"]["left"]


def test_the_student_that_was_best_before_is_handed_on_until_there_is_a_better_one(
    told: dict[str, dict[str, Any]],
) -> None:
    before, after = told["a better student"]["students"], told["a better student"]["left"]["students"]
    assert before["stages/one/student"] == after["one"] and before["student"] != after["last"]
    assert told["results"]["students"]["student"] == after["last"]


def test_a_run_goes_on_through_a_while_without_room(told: dict[str, dict[str, Any]]) -> None:
    found = told["for a while"]
    assert found["code"] == exits.DONE and found["left"] == told["whole"]["left"]
    said = found["said"]
    assert said.count("its lines are kept and tried again") == said.count("and has all its lines") == 1
    assert "save 1 of 3 that may fail" in said and "preparing: DiskError: 1 line not written" in said
    assert said.count("run.json: File too large; the run goes on, and this is written later") == 1


def test_a_run_whose_folder_goes_away_tries_to_save_and_fails(told: dict[str, dict[str, Any]]) -> None:
    assert "save 2 of 3 that may fail" in told["gone"]["said"]


def test_two_ranks_end_alike_where_the_first_alone_finds_no_room(tmp_path: Path) -> None:
    """Its files may not grow, at a save and when a student is published; then it makes a mistake of ours; at last it
    finds room."""
    text = start_ranks("tests.faults.full_ranks_worker", str(tmp_path), limit_s=120)
    told = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    by_rank = [{found["what"]: found for found in told if found["rank"] == rank} for rank in (0, 1)]
    for what, types in {
        "no save": ["SaveFailed", "SaveFailed"],
        "no room": ["DiskError", "DiskError"],
        "mistake": ["ZeroDivisionError", "RankLost"],
        "room": ["", ""],
    }.items():
        assert [found[what]["error"] for found in by_rank] == types, told
        assert abs(by_rank[0][what]["at"] - by_rank[1][what]["at"]) < 5, "both at once"
    assert "a student of" in by_rank[1]["no room"]["text"] and "preparing" in by_rank[1]["no save"]["text"]
    assert by_rank[0]["room"]["lines"] == 7 and by_rank[0]["room"]["state"] == "done"

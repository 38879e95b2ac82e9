"""Whatever a power cut leaves of a save, the old checkpoint or the new one is found whole; a returned one is not lost.

The operations of a real save are recorded, every disk that a power cut may leave after each of them is laid out, and
the real loader reads it. Without one of the syncs it must find less, and does.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from minillm import checkpoint_manifest
from minillm.checkpoints import Checkpoints
from minillm.errors import CheckpointError
from tests.faults.disks import Killed, Recording
from tests.faults.power_cut import State, after_each, everything, lay_out, snapshot
from tests.faults.sides import in_threads
from tests.faults.toy import is_right, save, store

READINGS = {"ordered": True, "subset": False}
Save = Callable[[Path, Recording], object]


def one(run: Path, disk: Recording) -> object:
    return save(store(run, disk=disk), 3)


def two_ranks(run: Path, disk: Recording) -> object:
    ended = in_threads(2, lambda ranks: save(store(run, ranks=ranks, disk=disk), 3, ranks))
    assert not any(isinstance(one, Exception) for one in ended), ended
    return ended


class Judge:
    """The real loader, asked once for each disk: the step that it finds, 0 for none, -1 for a torn one."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._told = folder, dict[State, int]()

    def __call__(self, state: State) -> int:
        if state not in self._told:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir()
            lay_out(state, self._folder)
            try:
                found = store(self._folder).choose("auto")
            except CheckpointError:  # there are some, and none is whole
                found = None
            self._told[state] = 0 if found is None else found.manifest.step if is_right(found) else -1
        return self._told[state]


def prepared(run: Path, steps: Iterable[int]) -> State:
    run.mkdir()
    for step in steps:
        save(store(run), step)
    return snapshot(run)


def judged(
    tmp_path: Path, *, old: tuple[int, ...], do: Save, ordered: bool, without: int | None = None
) -> Counter[str]:
    """How many disks there are, and how many are torn or lost, for a save of step 3 after the ``old`` ones."""
    run, judge = tmp_path / f"run-{ordered}-{without}-{len(old)}", Judge(tmp_path / "judged")
    before, disk = prepared(run, old), Recording(without=without)
    do(run, disk)
    assert everything(run, before, disk.done) == snapshot(run)  # so nothing was written past the seam
    found = Counter[str]()
    for count, state in after_each(run, before, disk.done, ordered=ordered, only_last=without is not None):
        step = judge(state)
        found["states"] += 1
        found["torn"] += step == -1
        returned = count == len(disk.done)
        found["lost"] += (step == 0 and bool(old)) or (returned and step != 3)
        assert step in {-1, 0, max(old, default=0), 3}
    return found


CASES = {"first": ((), one, 16, 28), "third": ((1, 2), one, 24, 73), "two ranks": ((1, 2), two_ranks, 24, 80)}
"""Steps that were saved before, the save, and how many disks there are at least in the two readings."""


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("case", CASES)
def test_no_power_cut_leaves_a_torn_or_a_lost_checkpoint(case: str, reading: str, tmp_path: Path) -> None:
    old, do, *least = CASES[case]
    found = judged(tmp_path, old=old, do=do, ordered=READINGS[reading])
    print(f"{case}, {reading}: {dict(found)}")
    assert found["states"] >= least[not READINGS[reading]]
    assert found["torn"] == found["lost"] == 0


def syncs(tmp_path: Path, old: tuple[int, ...]) -> int:
    disk = Recording()
    prepared(tmp_path / "counted", old)
    one(tmp_path / "counted", disk)
    return disk.syncs


@pytest.mark.parametrize("old", [(), (1, 2)])
def test_control_without_any_one_sync_a_save_that_returned_is_lost(old: tuple[int, ...], tmp_path: Path) -> None:
    count = syncs(tmp_path, old)
    lost = {number: judged(tmp_path, old=old, do=one, ordered=False, without=number)["lost"] for number in range(count)}
    print(f"lost without the sync of each number: {lost}")
    # Number 0 is of the folder that holds all checkpoints' folder: of use to the first save alone.
    assert count == 6 and [number for number in lost if not lost[number]] == ([0] if old else [])


class Unsynced(Recording):
    """One that syncs nothing."""

    def _sync(self) -> bool:
        return False


@pytest.mark.parametrize("checked", [True, False])
def test_control_without_syncs_the_manifest_alone_keeps_torn_ones_out(
    checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, judge, disk = tmp_path / "run", Judge(tmp_path / "judged"), Unsynced()
    before = prepared(run, (2,))
    one(run, disk)
    if not checked:
        monkeypatch.setattr(checkpoint_manifest, "_compare", lambda file, wanted, *, whole: None)
    states = list(after_each(run, before, disk.done, ordered=False))
    found = Counter(judge(state) for _, state in states)
    print(f"nothing synced, {'checked' if checked else 'not checked'}: {len(states)} disks, {dict(found)}")
    assert len(states) > 250 and (found[-1] == 0) is checked


def test_a_save_after_a_killed_one_survives_a_power_cut_too(tmp_path: Path) -> None:
    """What the killed process left unsynced is still unsynced when the next one begins."""
    disks, judge = 0, Judge(tmp_path / "judged")
    for dies_at in range(100):
        run, disk = tmp_path / f"run-{dies_at}", Recording(dies_at=dies_at)
        before = prepared(run, ())
        try:
            one(run, disk)
        except Killed:
            pass
        else:
            break
        again = Recording()
        checkpoints: Checkpoints = store(run, disk=again)
        checkpoints.clean()
        save(checkpoints, 3 if not checkpoints.steps() else 4)
        found = [judge(state) for _, state in after_each(
            run, before, [*disk.done, *again.done], ordered=False, only_last=True
        )]  # fmt: skip
        disks += len(found)
        assert set(found) == {checkpoints.steps()[0]}
    print(f"{dies_at} deaths, {disks} disks")
    assert dies_at > 15 and disks > 100

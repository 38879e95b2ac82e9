"""A checkpoint in which one byte of one file is not as it was written is not used, and the file is named.

Each file of each of three checkpoints × {empty, half, one byte less, one bit flipped at eight places, deleted, in the
place of another step's}, and a file too many: ``auto`` takes the newest that is whole, a path to the broken one is
refused, and what was in memory is as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm import checkpoint_manifest
from minillm import checkpoints as checkpoints_module
from minillm.checkpoint_manifest import MANIFEST, FileEntry, Manifest, folder_name, manifest_text, read_manifest
from minillm.checkpoints import Checkpoints
from minillm.errors import CheckpointError
from tests.faults.sides import in_threads
from tests.faults.toy import is_right, save, store

STEPS = (1, 2, 3)
FILES = ("model.safetensors", "rank00000.json", MANIFEST)
Spoil = Callable[[Path], object]


def flipped(place: int) -> Spoil:
    """Flips a bit in the byte that stands at ``place`` eighths of a file."""

    def spoil(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[place * (len(content) - 1) // 7] ^= 1 << place
        file.write_bytes(content)

    return spoil


def spoilings(folder: Path, name: str) -> Iterator[tuple[str, Spoil]]:
    """What is done to a file."""
    step = int(folder.name[-8:])
    other = folder.with_name(folder_name(step % 3 + 1)) / name
    yield "empty", lambda file: file.write_bytes(b"")
    yield "half", lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    yield "one byte less", lambda file: file.write_bytes(file.read_bytes()[:-1])
    yield from ((f"flipped at {place}", flipped(place)) for place in range(8))
    yield "deleted", lambda file: file.unlink()
    yield "another step's", lambda file: file.write_bytes(other.read_bytes())


def three(run: Path) -> Checkpoints:
    """Three checkpoints, whatever is said going to a list of the store's."""
    run.mkdir(exist_ok=True)
    for step in STEPS:
        checkpoints = Checkpoints(run / "checkpoints", ranks=store(run)._ranks, say=said.append, keep=3)
        save(checkpoints, step)
    return checkpoints


said: list[str] = []


def load(checkpoints: Checkpoints, resume: object, state: dict[str, bytes]) -> None:
    """A loader such as the loop's: what it reads takes the place of what there is once all of it is chosen."""
    found = checkpoints.choose(resume)  # type: ignore[arg-type]
    if found is not None:
        state.update({name: found.file(name).read_bytes() for name in found.manifest.files})


def accepted(checkpoints: Checkpoints, folder: Path, name: str) -> list[str]:
    """Why a store with one broken file is not treated as it must be; [] where it is."""
    step, wrong, before = int(folder.name[-8:]), list[str](), {"model.safetensors": b"before"}
    said.clear()
    chosen = checkpoints.choose("auto")
    if chosen is None or chosen.manifest.step != (2 if step == 3 else 3) or not is_right(chosen):
        wrong.append(f"auto took {chosen}")
    if step == 3 and not any(folder.name in line and name in line for line in said):
        wrong.append(f"auto did not name {name}: {said}")
    state = dict(before)
    try:
        load(checkpoints, folder, state)
        wrong.append("the path was taken")
    except CheckpointError as error:
        if name not in str(error) or state != before or len(str(error).splitlines()) != 2:
            wrong.append(f"the path was refused by {error}")
    return wrong


def matrix(tmp_path: Path) -> tuple[int, list[str]]:
    """(Cases, those that were not refused as they must be)."""
    checkpoints = three(tmp_path)
    cases, wrong = 0, list[str]()
    for step in STEPS:
        folder = checkpoints.root / folder_name(step)
        for name in FILES:
            for how, spoil in spoilings(folder, name):
                content = (folder / name).read_bytes()
                spoil(folder / name)
                cases += 1
                wrong += [f"{folder.name}/{name} {how}: {one}" for one in accepted(checkpoints, folder, name)]
                (folder / name).write_bytes(content)
        for name in ("rank00007.json", "optim.pt", "rng.pkl", ".hidden", "more"):
            (folder / name).mkdir() if name == "more" else (folder / name).write_bytes(b"\x80\x04K\x01.")
            cases += 1
            wrong += [f"{folder.name}/{name} extra: {one}" for one in accepted(checkpoints, folder, name)]
            shutil.rmtree(folder / name) if name == "more" else (folder / name).unlink()
    chosen = checkpoints.choose(True)
    assert chosen is not None and chosen.manifest.step == 3 and is_right(chosen)  # all is mended again
    return cases, wrong


def test_no_broken_file_is_used_and_each_is_named(tmp_path: Path) -> None:
    cases, wrong = matrix(tmp_path)
    print(f"{cases} cases")
    assert cases >= 132 and wrong == []


def test_control_without_hashes_flipped_bits_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_manifest, "_compare", lambda file, wanted, *, whole: None)
    _, wrong = matrix(tmp_path)
    assert sum("flipped" in one and "model.safetensors" in one for one in wrong) >= 3 * 8


def test_control_without_its_own_hash_a_changed_manifest_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_manifest, "_as_written", lambda file, manifest: True)
    _, wrong = matrix(tmp_path)
    assert any(f"{MANIFEST} flipped" in one for one in wrong)


def test_every_bit_of_a_manifest_counts_and_ends_in_no_traceback(tmp_path: Path) -> None:
    save(store(tmp_path), 1)
    folder = tmp_path / "checkpoints" / folder_name(1)
    content = (folder / MANIFEST).read_bytes()
    for place in range(len(content)):
        for bit in {0, place % 8}:  # another letter of the same kind, and any bit
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            (folder / MANIFEST).write_bytes(changed)
            with pytest.raises(CheckpointError, match="MANIFEST"):
                read_manifest(folder)


def test_the_two_newest_may_be_broken_and_all_may(tmp_path: Path) -> None:
    checkpoints = three(tmp_path)
    for step in (3, 2):
        (checkpoints.root / folder_name(step) / "rank00000.json").unlink()
    chosen = checkpoints.choose("auto")
    assert chosen is not None and chosen.manifest.step == 1 and is_right(chosen)
    (checkpoints.root / folder_name(1) / MANIFEST).write_text("{}")
    said.clear()
    for resume in ("auto", True):
        said.clear()
        with pytest.raises(CheckpointError, match="none of 3 checkpoints can be used, wanted one"):
            checkpoints.choose(resume)  # type: ignore[arg-type]
        assert len(said) == 3
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoints.choose(tmp_path / "nowhere")


def test_a_broken_byte_that_only_one_rank_reads_is_heard_by_all(tmp_path: Path) -> None:
    checkpoints = three(tmp_path)
    for name in ("model.safetensors", "rank00000.json"):  # the first is read by rank 0, the second by rank 1
        file = checkpoints.root / folder_name(3) / name
        content = file.read_bytes()
        flipped(3)(file)
        found = in_threads(2, lambda ranks: store(tmp_path, ranks=ranks).choose("auto"))
        assert [one.manifest.step for one in found] == [2, 2]
        refused = in_threads(2, lambda ranks: store(tmp_path, ranks=ranks).choose(checkpoints.root / folder_name(3)))
        assert [str(one).count(name) for one in refused] == [1, 1]
        file.write_bytes(content)


def test_a_broken_checkpoint_is_written_again_and_a_whole_one_is_not(tmp_path: Path) -> None:
    checkpoints = three(tmp_path)
    with pytest.raises(CheckpointError, match="is there and whole"):
        save(checkpoints, 3)
    flipped(2)(checkpoints.root / folder_name(3) / "model.safetensors")
    assert is_right(save(checkpoints, 3))
    assert sorted(path.name for path in checkpoints.root.iterdir()) == [folder_name(step) for step in STEPS]


@pytest.mark.parametrize("broken", [(), (3,), (3, 4), (2, 3, 4), (1, 2, 3, 4)])
def test_retention_spares_the_two_newest_that_verify(broken: tuple[int, ...], tmp_path: Path) -> None:
    tmp_path.joinpath("checkpoints").mkdir()
    keep_all = Checkpoints(tmp_path / "checkpoints", ranks=store(tmp_path)._ranks, say=print, keep=9)
    for step in (1, 2, 3, 4):
        save(keep_all, step)
    for step in broken:
        flipped(1)(keep_all.root / folder_name(step) / "model.safetensors")
    save(store(tmp_path), 5)
    whole = sorted({1, 2, 3, 4, 5} - set(broken))[-2:]
    # Beyond two, what is older than the two that verify goes; broken ones that are newer stay to be looked at.
    assert keep_all.steps() == sorted(range(whole[0], 6) if len(whole) == 2 else range(1, 6), reverse=True)
    assert all(keep_all.choose(keep_all.root / folder_name(step)) for step in whole)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of files that are hashed from now on."""
    read, plain = list[str](), checkpoint_manifest.sha256_of

    def hashing(file: Path) -> str:
        read.append(file.parent.name)
        return plain(file)

    monkeypatch.setattr(checkpoint_manifest, "sha256_of", hashing)
    return read


def test_retention_reads_nothing_again_that_its_process_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, checkpoints = counting(monkeypatch), store(tmp_path)
    for step in range(1, 6):
        save(checkpoints, step)
    assert read == [] and checkpoints.steps() == [5, 4]
    another = store(tmp_path)
    save(another, 6)
    assert set(read) == {folder_name(5)}, "what another process wrote is read, once"
    save(another, 7)
    assert set(read) == {folder_name(5)} and another.steps() == [7, 6]
    read.clear()
    third = store(tmp_path)
    assert third.choose("auto") is not None and third.choose("auto") is not None
    assert read == [folder_name(7)] * 4, "who goes on from one reads it, whatever is known of it"
    save(third, 8)
    assert read == [folder_name(7)] * 4


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", FILES)
def test_retention_reads_what_no_longer_stands_as_it_stood(ranks: int, name: str, tmp_path: Path) -> None:
    """A bit flipped in place after the save, length and time of change as before."""

    def work(mine: Any) -> list[int]:
        checkpoints = store(tmp_path, ranks=mine)
        for step in (1, 2):
            save(checkpoints, step, mine)
        mine.exchange(None)
        if mine.first:
            file = checkpoints.root / folder_name(2) / name
            at = file.stat()
            with file.open("r+b") as opened:
                opened.seek(at.st_size // 2)
                byte = opened.read(1)[0]
                opened.seek(at.st_size // 2)
                opened.write(bytes([byte ^ 1]))
            os.utime(file, ns=(at.st_atime_ns, at.st_mtime_ns))
        mine.exchange(None)
        save(checkpoints, 3, mine)
        return checkpoints.steps()

    assert in_threads(ranks, work) == [[3, 2, 1]] * ranks


def test_control_without_the_time_of_its_record_it_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoints_module, "standing", lambda folder: [(at.name, at.stat().st_size) for at in sorted(folder.iterdir())]
    )
    checkpoints = store(tmp_path)
    for step in (1, 2):
        save(checkpoints, step)
    flipped(3)(checkpoints.root / folder_name(2) / "model.safetensors")
    save(checkpoints, 3)
    assert checkpoints.steps() == [3, 2], "one of the two that stay is broken"


def test_only_folders_with_the_very_name_of_a_step_are_listed(tmp_path: Path) -> None:
    checkpoints = three(tmp_path)
    for name in ("step-0000000003", "step-００００００03", "step-3", "step-00000004.bak", ".staging-step-00000005-a"):
        shutil.copytree(checkpoints.root / folder_name(3), checkpoints.root / name)
    assert checkpoints.steps() == [3, 2, 1]


NAMES = (
    *("..", "../x.json", "/tmp/x.json", "a/b.json", "a\\b.json", "~/x.json", "", ".", "x\0.json", "x" * 300 + ".json"),
    *("x.json\n", "ｘ.json", "optim.pt", "rng.pkl", "pytorch_model.bin", MANIFEST, "C:x.json", " .json"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_cannot_name_what_is_no_file_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / folder_name(7)
    folder.mkdir()
    entry = FileEntry(bytes=0, sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    manifest = Manifest(step=7, stage="s", ranks=1, fingerprints={}, files={name: entry})
    (folder / MANIFEST).write_text(manifest_text(manifest))
    (tmp_path / "x.json").touch()
    if len(name) < 200 and "/" not in name and "\0" not in name and name not in {"", ".", "..", MANIFEST}:
        (folder / name).touch()  # not even where there is such a file
    with pytest.raises(CheckpointError, match=MANIFEST):
        store(tmp_path).choose(folder)


@pytest.mark.parametrize("what", ["file out", "file in", "manifest", "folder"])
def test_links_in_a_checkpoint_are_not_followed(what: str, tmp_path: Path) -> None:
    checkpoints = three(tmp_path / "run")
    folder, outside = checkpoints.root / folder_name(3), tmp_path / "outside"
    if what == "folder":
        shutil.move(folder, outside)
        folder.symlink_to(outside)
    else:
        name = MANIFEST if what == "manifest" else "model.safetensors"
        target = folder.with_name(folder_name(2)) / "m.safetensors" if what == "file in" else outside
        shutil.move(folder / name, target)  # the very bytes that are wanted
        (folder / name).symlink_to(target)
    chosen = checkpoints.choose("auto")
    assert chosen is None or chosen.manifest.step < 3
    with pytest.raises(CheckpointError, match="link"):
        checkpoints.choose(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"step": NaN}', "\ufeff{}", '{"fingerprints": {"a": 1e999}}', "\0"])
def test_a_manifest_of_anything_else_is_refused(text: str, tmp_path: Path) -> None:
    checkpoints = three(tmp_path)
    folder = checkpoints.root / folder_name(3)
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    assert accepted(checkpoints, folder, MANIFEST) == []


def test_a_number_that_is_not_finite_in_a_manifest_is_refused(tmp_path: Path) -> None:
    checkpoints = three(tmp_path)
    folder = checkpoints.root / folder_name(3)
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, "fingerprints": {"a": float("nan")}}))
    assert accepted(checkpoints, folder, MANIFEST) == []

"""What a checkpoint says of itself, and whether its folder still is what it says."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from minillm.errors import CheckpointError, DataError
from minillm.inside import inside
from minillm.manifests import read_record, sha256_of
from minillm.settings import Count, Settings, Text, Whole
from minillm.store import record_text

MANIFEST = "MANIFEST.json"
SUFFIXES = (".safetensors", ".json", ".jsonl")
"""Of the files of a checkpoint: none that could run code when it is read."""
REMEDY = "resume from another one, or copy this one again from where it was whole"

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileEntry(Settings):
    """One file as it was written."""

    bytes: Whole
    """Its length."""
    sha256: Sha256
    """Of its bytes."""


class Manifest(Settings):
    """The record of a checkpoint."""

    format: Literal["minillm checkpoint 1"] = "minillm checkpoint 1"
    """Which form of record this is."""
    step: Whole
    """Updates that were made by then, of all stages; numbers the folder."""
    stage: Text
    """Name of the stage."""
    ranks: Count
    """Processes that wrote it."""
    fingerprints: dict[str, Any]
    """Whatever must be equal for the run to go on as if it had not stopped."""
    files: dict[str, FileEntry]
    """All but the manifest."""
    sha256: str = ""
    """Of the text of all of the above, as ``manifest_text`` writes it."""


def manifest_text(manifest: Manifest) -> str:
    """The one text that such a manifest has; ``sha256`` is made anew."""
    record = manifest.model_dump(exclude={"sha256"})
    return record_text({**record, "sha256": hashlib.sha256(record_text(record).encode()).hexdigest()})


def folder_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def refuse_name(name: str) -> str:
    """Why no file of a checkpoint may be called so; "" where it may."""
    if name == MANIFEST:
        return f"{name} is the manifest's own name"
    if not name.endswith(SUFFIXES):
        return f"{name!r} is no file of a checkpoint; wanted one that ends in {', '.join(SUFFIXES)}"
    return ""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; ``CheckpointError`` unless it is there, as it was written, and this folder's."""
    file = folder / MANIFEST
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder}: {'a link' if folder.is_symlink() else 'no such folder'}, wanted a checkpoint")
    if file.is_symlink():
        raise CheckpointError(f"{file}: a link, wanted a file")
    manifest = read_record(file, Manifest, fault=CheckpointError, again=REMEDY)
    if manifest is None:
        raise CheckpointError(f"{file}: not there, so nothing says what the checkpoint holds")
    if not _as_written(file, manifest):
        raise CheckpointError(f"{file}: not as it was written; its own SHA-256 is of another text")
    if folder.name != folder_name(manifest.step):
        raise CheckpointError(f"{file}: of step {manifest.step:,}, wanted the one of {folder.name}")
    return manifest


def _as_written(file: Path, manifest: Manifest) -> bool:
    try:
        return file.read_bytes() == manifest_text(manifest).encode()
    except (ValueError, RecursionError):  # a number that is not finite, or records within records without end
        return False


def in_a_line(error: CheckpointError) -> str:
    """All that is wrong with a checkpoint, without what may be done about it."""
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip() != REMEDY)


def verified(folder: Path, *, rank: int = 0, ranks: int = 1) -> Manifest:
    """The manifest of a checkpoint that is as it was written; ``CheckpointError`` naming the file that is not.

    Names and lengths are compared of all files, the bytes of each ``ranks``-th: together the ranks read every byte.
    """
    try:
        manifest = read_manifest(folder)
        _compare_names(folder, manifest)
        for place, (name, wanted) in enumerate(sorted(manifest.files.items())):
            _compare(folder / name, wanted, whole=place % ranks == rank)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error
    return manifest


def standing(folder: Path) -> tuple[tuple[str, int, int, int, int], ...]:
    """Of each file of a folder what changes with its content, without reading it: name, length, times in nanoseconds of
    the last change of its bytes and of its record, number of the record; () where it cannot be looked at.

    The second time cannot be set back by a program, so only what goes round the file system escapes: a bit that the
    disk loses, a writer on another node whose clock is behind.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino) for name, at in found))


def _compare_names(folder: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if reason := refuse_name(name):
            raise CheckpointError(f"{folder / MANIFEST}: {reason}")
        try:
            inside(folder, name, source=folder / MANIFEST)
        except DataError as error:
            raise CheckpointError(str(error).splitlines()[0]) from error
    with os.scandir(folder) as entries:
        found = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    if more := sorted(found.keys() - manifest.files.keys() - {MANIFEST}):
        raise CheckpointError(f"{folder / more[0]}: not a file that the manifest lists")
    for name in sorted(manifest.files):
        if not found.get(name, False):
            raise CheckpointError(f"{folder / name}: {'a link or a folder' if name in found else 'not there'}")


def _compare(file: Path, wanted: FileEntry, *, whole: bool) -> None:
    size = file.stat().st_size
    if size != wanted.bytes:
        raise CheckpointError(f"{file}: {size:,} bytes, wanted {wanted.bytes:,}")
    if whole and (sha256 := sha256_of(file)) != wanted.sha256:
        raise CheckpointError(f"{file}: its SHA-256 begins {sha256[:12]}, wanted {wanted.sha256[:12]}")

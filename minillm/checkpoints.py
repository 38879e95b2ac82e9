"""Checkpoints that are whole or not there, and that prove it before anything of them is used.

CHECKPOINTS/step-00000120/{MANIFEST.json, …}: written under another name by all ranks, synced, then published by one
rename, and never touched again. Nothing points to the newest: whoever looks for it takes the newest that verifies.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from minillm import fault
from minillm.checkpoint_manifest import (
    MANIFEST,
    REMEDY,
    FileEntry,
    Manifest,
    folder_name,
    in_a_line,
    manifest_text,
    refuse_name,
    standing,
    verified,
)
from minillm.disk import DISK, Disk, Sink, remove_tree, write_file
from minillm.errors import CheckpointError, DiskError, SaveFailed, did_you_mean
from minillm.inside import inside

if TYPE_CHECKING:
    from minillm.ranks import Ranks

Result = TypeVar("Result")
STAGING, REMOVED = ".staging-", ".removed-"
"""How folders begin that no reader looks at: those being written and those being removed."""
SPARED = 2
"""The newest checkpoints that verify; retention keeps so many at least, since one may turn out broken."""
ASIDE = "aside-"
"""How folders begin that a run which went back has set aside."""
_NAME = re.compile(r"step-([0-9]{8,})")

Write = Callable[[Sink], None]
"""Writes the content of one file."""
Files = Mapping[str, Write] | Callable[[], Mapping[str, Write]]
"""By name; or what makes them, without a collective, where a rank may fail at that alone."""
Resume = Literal["auto", True] | Path
"""What to go on from: the newest that verifies if there is one, the newest that verifies, or this one."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was verified on every rank."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where one of its files stands; ``CheckpointError`` for a name that the manifest does not list."""
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path}: has no {name!r}{did_you_mean(name, self.manifest.files)}\n  {REMEDY}")
        return inside(self.path, name, source=self.path / MANIFEST)


@dataclass(frozen=True, slots=True)
class OneRank:
    """In the place of ``Ranks`` where one process looks after checkpoints and nothing is trained."""

    rank: int = 0
    size: int = 1
    first: bool = True

    def of_first(self, work: Callable[[], Result]) -> Result:
        """What it gives."""
        return work()

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """One's own."""
        return mine


def names_in(root: Path) -> list[str]:
    """All that stands in a folder of checkpoints, in order; nothing where there is no such folder.

    ``CheckpointError`` where it is a link: whoever made the run's folder may wait for a run to write into what it leads
    to, or to empty it.
    """
    if root.is_symlink():
        raise CheckpointError(
            f"{root}: a link, wanted a folder\n  remove it; to keep a run on another disk, set out in its configuration"
        )
    return sorted(os.listdir(root)) if root.is_dir() else []


def steps_in(root: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, whole or not, newest first; ``CheckpointError`` for a link."""
    names = names_in(root)
    steps = {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    return sorted((step for step in steps if folder_name(step) in names), reverse=True)


class Checkpoints:
    """The checkpoints in one folder. Every rank has one and makes the same calls; all hear the same result."""

    def __init__(
        self, root: Path, *, ranks: Ranks | OneRank, say: Callable[[str], None], keep: int = SPARED, disk: Disk = DISK
    ) -> None:
        assert keep >= SPARED, keep
        self.root = root
        self._ranks, self._keep, self._disk = ranks, keep, disk
        self._say: Callable[[str], None] = say if ranks.first else lambda line: None
        # What retention does not read again, on rank 0: checkpoints that this process has written (hashed on the way to
        # the disk, synced, published) or has read from end to end, as they stood then. It removes older ones on that
        # word; a checkpoint that a run goes on from is read, whatever stands here.
        self._whole: dict[Path, object] = {}

    def save(self, *, step: int, stage: str, fingerprints: Mapping[str, Any], files: Files) -> Checkpoint:
        """Writes the checkpoint of a step, then removes the oldest; it survives a power cut once this returns.

        Each rank gives the ``files`` that it writes, under names of its own. ``SaveFailed`` on all ranks if one of them
        cannot write, or what makes its files cannot read; nothing is left of the attempt then (if the last sync alone
        failed: a checkpoint that is whole).
        """
        target = self.root / folder_name(step)
        self._make_way(target)
        staging = self._ranks.of_first(lambda: self._start(target))
        try:
            manifest = Manifest(
                step=step,
                stage=stage,
                ranks=self._ranks.size,
                fingerprints=dict(fingerprints),
                files=self._write(staging, files),
            )
            text = manifest_text(manifest)
            self._ranks.of_first(lambda: self._publish(staging, target, text.encode()))
            self._whole[target] = standing(target)
        except BaseException:
            if self._ranks.first:
                with contextlib.suppress(OSError):  # the first error says more; what is left, ``clean`` removes
                    remove_tree(self._disk, staging)
            raise
        try:
            self.remove_all_but(self._keep)
        except DiskError as error:  # what was saved is saved
            self._say(f"note: older checkpoints stay: {str(error).splitlines()[0]}")
        return Checkpoint(target, manifest)

    def steps(self) -> list[int]:
        """Those that have a checkpoint, whole or not, newest first."""

        return self._ranks.of_first(lambda: steps_in(self.root))

    def choose(self, resume: Resume, *, refuse: Callable[[Manifest], str] = lambda manifest: "") -> Checkpoint | None:
        """What to resume from, every byte of it read and found as it was written.

        ``"auto"`` and ``True`` take the newest that verifies, and say of each newer one which file is wrong. Where
        there is none, ``"auto"`` says so and gives None. ``CheckpointError`` for ``True`` then, for a path that does
        not verify, and where there are some and none verifies: starting over would throw away what may be mended.
        ``refuse`` says why one that verifies is of no use, "" where it is. The newest that verifies is then an error as
        well: going on from an older one would give up what it has.
        """
        if isinstance(resume, Path):
            try:
                return self._useful(resume.absolute(), refuse)
            except CheckpointError as error:
                raise CheckpointError(f"{error}\n  {REMEDY}") from error
        steps = self.steps()
        for step in steps:
            try:
                found = self._verified(self.root / folder_name(step))
            except CheckpointError as error:
                self._say(f"note: {folder_name(step)} is not used: {error}")
                continue
            if reason := refuse(found.manifest):
                raise CheckpointError(f"{found.path}: {reason}")
            return found
        what = f"{self.root}: {f'none of {len(steps):,} checkpoints can be used' if steps else 'no checkpoint'}"
        if steps or resume is True:
            raise CheckpointError(
                f"{what}, wanted one to resume from\n  mend or put back what is named, or start over with --fresh"
            )
        self._say(f"{what}; starting from the beginning")
        return None

    def set_aside_after(self, step: int) -> None:
        """Gives those after a step another name, under which nobody looks for them: a run that goes on from an earlier
        one writes its own."""
        newer = [self.root / folder_name(other) for other in self.steps() if other > step]

        def rename() -> None:
            for folder in newer:
                aside = folder.with_name(f"{ASIDE}{folder.name}-{secrets.token_hex(4)}")
                self._disk.rename(folder, aside)
                self._say(f"note: {folder.name} is set aside as {aside.name}")
            if newer:
                self._disk.sync_folder(self.root)

        self._ranks.of_first(rename)

    def clean(self) -> None:
        """Removes what broken-off saves and removals left. For the one process that may write here."""

        def remove() -> None:
            names = names_in(self.root)
            self._remove(self.root / name for name in names if name.startswith((STAGING, REMOVED)))

        self._ranks.of_first(remove)

    def _useful(self, folder: Path, refuse: Callable[[Manifest], str]) -> Checkpoint:
        found = self._verified(folder)
        if reason := refuse(found.manifest):
            raise CheckpointError(f"{folder}: {reason}")
        return found

    def _verified(self, folder: Path) -> Checkpoint:
        """The ranks share the reading; ``CheckpointError`` of one line, the same on all, if one of them finds fault."""
        manifest, reason, stands = None, "", standing(folder)
        try:
            manifest = verified(folder, rank=self._ranks.rank, ranks=self._ranks.size)
        except CheckpointError as error:
            reason = in_a_line(error)
        if reasons := [told for told in self._ranks.gather_objects([reason]) if told]:
            raise CheckpointError(reasons[0])
        assert manifest is not None
        self._whole[folder] = stands
        return Checkpoint(folder, manifest)

    def _make_way(self, target: Path) -> None:
        """Removes a broken checkpoint of the step that is to be saved; a whole one is nobody's to replace."""
        if target.name not in self._ranks.of_first(lambda: names_in(self.root)):
            return
        try:
            self._verified(target)
        except CheckpointError as error:
            self._say(f"note: {target.name} is written again: {error}")
            self._ranks.of_first(lambda: self._remove([target]))
        else:
            raise CheckpointError(
                f"{target}: is there and whole, wanted a step without a checkpoint\n"
                "  resume from it, or move it away with those after it"
            )

    def _start(self, target: Path) -> Path:
        """A staging folder of this attempt's own: a rank of a killed run may still write into an earlier one."""
        staging = target.with_name(f"{STAGING}{target.name}-{secrets.token_hex(4)}")
        with _told_as_failed(target):
            if not self.root.is_dir():
                self._disk.make_folder(self.root)
            # Each time: whoever made it may have been killed before its name was on the disk.
            self._disk.sync_folder(self.root.parent)
            self._disk.make_folder(staging)
        return staging

    def _write(self, staging: Path, files: Files) -> dict[str, FileEntry]:
        """Every rank's files, once all are on the disk; raises on all ranks if one could not write its own."""
        entries, failure, name = dict[str, FileEntry](), None, "preparing"
        try:
            for name, write in (files() if callable(files) else files).items():
                entries[name] = self._write_one(staging, name, write)
                fault.point("checkpoint.file.synced", name)
        except Exception as error:  # whatever it is, the others must hear of it or wait for ever
            failure = error
        # Two ranks that give one name are a mistake of ours: the staging folder was new.
        of_disk = isinstance(failure, OSError) and not isinstance(failure, FileExistsError)
        reason = f"{name}: {type(failure).__name__}: {failure}".splitlines()[0] if failure else ""
        mine = (self._ranks.rank, entries, reason, of_disk)
        told = self._ranks.gather_objects([mine])
        fault.point("checkpoint.agreed")
        failed = [(rank, reason, full) for rank, _, reason, full in told if reason]
        if failed:
            if failure is not None and not of_disk:
                raise failure
            # Not of the disk: a mistake of the program, which must not be taken for a full disk and gone on from.
            rank, reason, full = min(failed, key=lambda one: one[2])
            what = f"{staging}: not written, since rank {rank} failed: {reason}"
            raise (SaveFailed(f"{what}\n  {_MEND}") if full else RuntimeError(what)) from failure
        return {name: entry for _, found, _, _ in told for name, entry in found.items()}

    def _write_one(self, staging: Path, name: str, write: Write) -> FileEntry:
        if reason := refuse_name(name):
            raise CheckpointError(reason)
        file = self._disk.create(inside(staging, name, source=staging))
        try:
            sink = Sink(self._disk, file)
            write(sink)
            self._disk.sync(file)
        finally:
            self._disk.close(file)
        return FileEntry(bytes=sink.bytes, sha256=sink.sha256)

    def _publish(self, staging: Path, target: Path, manifest: bytes) -> None:
        with _told_as_failed(target):
            write_file(self._disk, staging / MANIFEST, manifest)
            self._disk.sync_folder(staging)
            self._disk.rename(staging, target)
            self._disk.sync_folder(self.root)
        fault.point("checkpoint.published", target.name)

    def remove_set_aside(self) -> None:
        """Removes those that a run which went back has set aside."""

        def remove() -> None:
            names = names_in(self.root)
            self._remove(self.root / name for name in names if name.startswith(ASIDE))

        self._ranks.of_first(remove)

    def remove(self) -> None:
        """Removes them all, with what was set aside and their folder, for a run that is done."""

        def remove() -> None:
            names = names_in(self.root)
            mine = [name for name in names if _NAME.fullmatch(name) or name.startswith((STAGING, REMOVED, ASIDE))]
            self._remove(self.root / name for name in mine)
            with contextlib.suppress(OSError):  # it is not there, or holds something else
                self._disk.remove(self.root)

        self._ranks.of_first(remove)

    def remove_all_but(self, keep: int, *, whole: int = SPARED) -> None:
        """Removes all but the ``keep`` newest, and never one of the ``whole`` newest that verify: those are read again
        before, unless this process wrote or read them and they stand as they stood then. One that does not verify goes
        only once so many newer ones do."""
        newest = [self.root / folder_name(step) for step in self.steps()]
        old, spared = newest[keep:], 0
        while old and spared < whole and newest:
            folder = newest.pop(0)
            with contextlib.suppress(CheckpointError):
                if not self._ranks.of_first(lambda folder=folder: self._as_it_stood(folder)):  # type: ignore[misc]
                    self._verified(folder)
                spared += 1
        if spared == whole:
            old = [folder for folder in old if folder in newest]
            self._ranks.of_first(lambda: self._remove(reversed(old)))

    def _as_it_stood(self, folder: Path) -> bool:
        stood = self._whole.get(folder)
        return bool(stood) and stood == standing(folder)

    def _remove(self, folders: Iterable[Path]) -> None:
        """Removes folders, each under another name first, so that none stands in part under its own; what cannot be
        removed is said, and no reason to stop."""
        for folder in folders:
            hidden = folder
            try:
                if not folder.name.startswith((STAGING, REMOVED)):
                    hidden = folder.with_name(f"{REMOVED}{folder.name}-{secrets.token_hex(4)}")
                    self._disk.rename(folder, hidden)
                remove_tree(self._disk, hidden)
            except OSError as error:
                self._say(f"note: {hidden} cannot be removed: {error.strerror}")


_MEND = "the checkpoints before it are untouched; make room there, or mend what is named"


@contextlib.contextmanager
def _told_as_failed(target: Path) -> Iterator[None]:
    """What the disk refuses, as an error that ``of_first`` tells to all ranks."""
    try:
        yield
    except OSError as error:
        raise SaveFailed(f"{target}: not written: {error}\n  {_MEND}") from error

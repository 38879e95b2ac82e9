"""A folder of data that was made ready once and is mapped into memory ever after: prompts, and the tokens of corpora.

What is kept is named by a hash over everything that decides it, so nothing in it is ever out of date, and any of it may
be removed at any time. One process makes an entry while others wait; it is staged under another name and renamed when
it is whole. Entries hold Arrow data or numbers beside a manifest in JSON: reading one runs no code out of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from minillm.checkpoint_manifest import FileEntry, Sha256
from minillm.disk import DISK, Sink, remove_tree, write_file
from minillm.errors import ConfigError, DataError, DiskError, MinillmError, as_disk_error
from minillm.manifests import parsed, read_record, sha256_of
from minillm.settings import Settings
from minillm.store import record_text

DATA, MANIFEST = "data", "manifest.json"
WAIT_S = 0.1
"""Between two looks whether another process is done."""
SETTLED_NS = 2 * 10**9
"""A file that was changed less than this ago may change again without a sign: its sum is not remembered."""
Opened = TypeVar("Opened")


class Manifest(Settings):
    """The record of an entry."""

    format: Literal["minillm data 1"] = "minillm data 1"
    """Which form of record this is."""
    asked: dict[str, Any]
    """Everything that decides the data."""
    file: FileEntry
    """The data."""
    data_sha256: Sha256
    """Of the rows or blocks (``prompts.data_hash``)."""
    words: tuple[str, ...]
    """What there was to be told when it was made, the report of what was dropped last."""
    sha256: str = ""
    """Of the text of all of the above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """What ``make`` says of the data that it wrote."""

    data_sha256: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Generic[Opened]):
    """An entry, open."""

    data: Opened
    made: Made
    path: Path
    word: str
    """Whether it was there, in a line for the terminal."""


def default_folder() -> Path:
    """Where caches are by convention: ``$HF_HOME/minillm``, else ``$XDG_CACHE_HOME/minillm``, else
    ``~/.cache/minillm``."""
    for variable in ("HF_HOME", "XDG_CACHE_HOME"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser() / "minillm"
    return Path.home() / ".cache" / "minillm"


class DataCache:
    """The folder, which is made when something is first kept in it."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder

    @cached_property
    def folder(self) -> Path:
        """Where it is; ``ConfigError`` where nobody says so, and there is no home to have it in."""
        try:
            return default_folder() if self._folder is None else Path(self._folder).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{error}, to keep large data in\n  set data.cache to a folder with room") from error

    def sha256_of(self, file: Path) -> str:
        """Of a file's bytes; those of a file that stands as it stood when it was last summed are not read again.

        As it stood is: the same path, inode, size, and times of the last change of its bytes and of its entry. The
        last of these (ctime) no program can set back, so that an edit shows even where the file's date was kept.
        """
        file = file.resolve()
        stands = _standing(file)
        memo = self.folder / "sums" / f"{hashlib.sha256(os.fsencode(file)).hexdigest()[:32]}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            known = parsed(memo.read_bytes())
            if known["stands"] == stands and isinstance(known["sha256"], str):
                return str(known["sha256"])
        found = sha256_of(file)
        if time.time_ns() - max(stands["mtime_ns"], stands["ctime_ns"]) > SETTLED_NS and _standing(file) == stands:
            with contextlib.suppress(OSError):  # a help, never needed
                memo.parent.mkdir(parents=True, exist_ok=True)
                part = memo.with_suffix(f".{os.getpid()}.part")
                part.write_text(record_text({"path": str(file), "stands": stands, "sha256": found}), encoding="utf-8")
                part.rename(memo)
        return found

    def entry(
        self, asked: Mapping[str, Any], *, make: Callable[[Path, Sink], Made], opened: Callable[[Path], Opened],
        name: str,
    ) -> Found[Opened]:  # fmt: skip
        """What was asked for, mapped by ``opened``; where it is not there, or not as it was written, ``make`` writes it
        (it hears the file's path and where to write its bytes).

        ``opened`` raises ``ValueError`` for data that is none. Raises ``DiskError`` where the disk refuses, and what
        ``make`` raises; either way nothing is left that could be taken for an entry.
        """
        key = hashlib.sha256(record_text(asked).encode()).hexdigest()[:40]
        place, broken = self.folder / "data" / key, ""
        try:
            with contextlib.suppress(FileNotFoundError):
                try:
                    return self._there(place, asked, opened=opened, name=name)
                except _Broken as fault:
                    broken = str(fault)
            with self._locked(key, name):
                if not broken:
                    with contextlib.suppress(FileNotFoundError, _Broken):  # another process may have made it meanwhile
                        return self._there(place, asked, opened=opened, name=name)
                self._write(place, asked, make=make)
                found = self._there(place, asked, opened=opened, name=name)
        except _Broken as fault:
            raise DiskError(f"{place}: not as it was written a moment ago: {fault}\n  mend the disk") from fault
        except OSError as error:
            if isinstance(error, MinillmError):
                raise
            refused = as_disk_error(error, what=f"{name}: the data cache {self.folder}")
            assert refused is not None
            raise DiskError(f"{refused}\n  data.cache puts it elsewhere") from error
        word = f"{name}: kept in {place}"
        if broken:
            word = f"{name}: {place} was not as it was written ({broken}), and was made again"
        return Found(data=found.data, made=found.made, path=place, word=word)

    def _there(
        self, place: Path, asked: Mapping[str, Any], *, opened: Callable[[Path], Opened], name: str
    ) -> Found[Opened]:
        """The entry; ``FileNotFoundError`` where there is none, ``_Broken`` where it is not as it was written."""
        os.stat(place, follow_symlinks=False)
        try:
            manifest = read_record(place / MANIFEST, Manifest, fault=DataError, again="")
        except DataError as error:
            raise _Broken("its manifest cannot be read") from error
        if manifest is None or manifest.sha256 != _sealed(manifest).sha256 or manifest.asked != _plain(asked):
            raise _Broken("its manifest is missing or another one")
        file = place / DATA
        if file.is_symlink() or not file.is_file() or file.stat().st_size != manifest.file.bytes:
            raise _Broken("its data are missing or cut")
        if self.sha256_of(file) != manifest.file.sha256:
            raise _Broken("its data have another SHA-256")
        try:
            data = opened(file)
        except ValueError as error:
            raise _Broken(str(error)) from error
        made = Made(data_sha256=manifest.data_sha256, words=manifest.words)
        return Found(data=data, made=made, path=place, word=f"{name}: from the cache {place}")

    def _write(self, place: Path, asked: Mapping[str, Any], *, make: Callable[[Path, Sink], Made]) -> None:
        """Makes the entry; the lock is held, so what is staged under this name is nobody's."""
        staging = place.with_name(f".{place.name}.part")
        if os.path.lexists(staging):
            remove_tree(DISK, staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            DISK.make_folder(staging)
            descriptor = DISK.create(staging / DATA)
            try:
                sink = Sink(DISK, descriptor)
                made = make(staging / DATA, sink)
                DISK.sync(descriptor)
            finally:
                DISK.close(descriptor)
            manifest = Manifest(
                asked=_plain(asked), file=FileEntry(bytes=sink.bytes, sha256=sink.sha256),
                data_sha256=made.data_sha256, words=made.words,
            )  # fmt: skip
            write_file(DISK, staging / MANIFEST, record_text(_sealed(manifest).model_dump(mode="json")).encode())
            DISK.sync_folder(staging)
            if os.path.lexists(place):
                remove_tree(DISK, place)
            DISK.rename(staging, place)
            DISK.sync_folder(place.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                remove_tree(DISK, staging)
            raise

    @contextlib.contextmanager
    def _locked(self, key: str, name: str) -> Iterator[None]:
        """One process at a time makes an entry; the kernel lets go of a dead one's lock."""
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        file, told = os.open(folder / key, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), False
        try:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told and os.environ.get("RANK", "0") == "0":
                        print(f"{name}: another process makes it ready; waiting", flush=True)
                    told = True
                    time.sleep(WAIT_S)
            yield
        finally:
            os.close(file)


class _Broken(Exception):
    """An entry is not as it was written."""


def _sealed(manifest: Manifest) -> Manifest:
    text = record_text(manifest.model_dump(mode="json", exclude={"sha256"}))
    return manifest.model_copy(update={"sha256": hashlib.sha256(text.encode()).hexdigest()})


def _plain(asked: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back out of JSON."""
    value = parsed(record_text(asked))
    assert isinstance(value, dict)
    return value


def _standing(file: Path) -> dict[str, int]:
    at = file.stat()
    return {
        "device": at.st_dev, "inode": at.st_ino, "size": at.st_size, "mtime_ns": at.st_mtime_ns,
        "ctime_ns": at.st_ctime_ns,
    }  # fmt: skip

"""What a run leaves behind: its folder, its log, and files that are never half written.

runs/NAME/{config.yaml, run.json, metrics.jsonl, samples.jsonl, stages/, student/, results.json, report.html,
tensorboard/}; with several test sets samples.jsonl, results.json and report.html of each in runs/NAME/SET/
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from minillm.config import RunConfig, dump_config
from minillm.disk import sync
from minillm.errors import ConfigError, DataError, DiskError, MinillmError, RunExists, as_disk_error
from minillm.inside import inside
from minillm.run_log import RunLog, note
from minillm.yaml_reader import read_yaml

Standing = Literal["new", "unfinished", "done"]
CHECKPOINTS = "checkpoints"
"""The folder of what an interrupted run goes on from."""
BAD_BATCHES = "bad-batches"
"""The folder of batches in which a number was not finite."""
PROFILE = "profile"
"""The folder of traces of the profiler."""
CHUNKS = "chunks.json"
"""Which chunks a run's pairs were cut into, from easy to hard."""
UNFINISHED = "samples.partial.jsonl"
"""What an evaluation has before it is done: of samples.jsonl, and of what exposure and calibration read."""
RESULTS = ("run.json", "metrics.jsonl", CHUNKS, "samples.jsonl", UNFINISHED, "results.json", "report.html")
"""Files that a run makes beside config.yaml and student/."""


class RunFolder:
    """One run's folder. Only rank 0 writes; the others hold the same object and their calls do nothing."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self._writes = writes
        self._listeners: list[Callable[[Mapping[str, Any]], None]] = []
        self._log = RunLog(path / "metrics.jsonl")
        self._untold: dict[str, Any] = {}
        """Fields of ``run.json`` that the disk did not take."""

    @property
    def student(self) -> Path:
        """Where the published student stands once there is one."""
        return self.path / "student"

    def student_of(self, stage: str) -> Path:
        """Where the student of a stage before the last stands: what the next one starts from."""
        return self.path / "stages" / stage / "student"

    def notes_of(self, stage: str) -> Path:
        """Where a stage keeps what it found out before it trained."""
        return self.path / "stages" / stage

    @property
    def chunks(self) -> Path:
        """Where the order of a run's chunks stands, if its pairs are cut into such."""
        return self.path / CHUNKS

    def standing(self, config_text: str) -> Standing:
        """What the folder holds for this configuration; nothing is changed.

        ``unfinished`` also where it has checkpoints of another configuration and is not done: how far those may differ,
        ``changed_run`` says. ``RunExists`` where it holds anything else.
        """
        stored = self.path / "config.yaml"
        before = stored.read_text(encoding="utf-8", errors="replace") if stored.is_file() else None
        done = self.status().get("state") == "done"
        if before is not None and says_the_same(before, config_text):
            return "done" if done else "unfinished"
        if before is not None and not done and (self.path / CHECKPOINTS).is_dir():
            return "unfinished"
        self.require_own(config_text)
        return "new"

    def require_own(self, config_text: str) -> None:
        """``RunExists`` where the folder holds work of another configuration."""
        stored = self.path / "config.yaml"
        before = stored.read_text(encoding="utf-8", errors="replace") if stored.is_file() else None
        if (before is None or not says_the_same(before, config_text)) and self._holds_something():
            what = "a run with another configuration" if stored.is_file() else "work that is not this run's"
            raise RunExists(
                f"{self.path} holds {what}; nothing was touched.\n"
                "  give this run another name (name=NAME), or start over with --fresh"
            )

    def begin(self, config_text: str) -> None:
        """Makes the folder ready for a run from its beginning: all that an earlier one left is gone."""
        if self._writes:
            # What this class writes, and nothing else: the folder may hold other runs (runs/quickstart/sft) or a
            # user's notes.
            make_folder(self.path, setting="out or name")
            self._forget_sets()
            for name in ("config.yaml", *RESULTS):
                (self.path / name).unlink(missing_ok=True)
            for name in ("student", "stages", "tensorboard", CHECKPOINTS, BAD_BATCHES, PROFILE):
                _remove(self.path / name)
            write_text(self.path / "config.yaml", config_text)

    def go_on(self, config_text: str, *, log_bytes: int) -> None:
        """Makes the folder ready for a run that goes on from where the log was so long."""
        if self._writes:
            self.cut_log(log_bytes)
            write_text(self.path / "config.yaml", config_text)

    def _forget_sets(self) -> None:
        """Removes the results of the test sets that results.json lists; a folder that holds more stays."""
        try:
            sets = json.loads((self.path / "results.json").read_text(encoding="utf-8")).get("sets", {})
        except (OSError, ValueError, AttributeError, RecursionError):
            return  # none, or not this class's
        for name in sets:
            try:
                folder = inside(self.path, name, source=self.path / "results.json")
            except DataError:
                continue  # not a folder that this class made
            for made in RESULTS:
                (folder / made).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _holds_something(self) -> bool:
        """Whether a step was logged or anything made after it: a run that failed before has nothing to protect."""
        made = ("student", "stages", CHECKPOINTS, *(name for name in RESULTS if name != "run.json"))
        return any((self.path / name).exists() for name in made)

    def status(self) -> dict[str, Any]:
        """``run.json``: state (``running``, ``stopped``, ``failed`` or ``done``), seconds by stage, versions; {} before
        the first."""
        file = self.path / "run.json"
        if not file.is_file():
            return {}
        try:
            status = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # records within records without end
            raise DataError(f"{file}: not JSON: {error}\n  move it away, or start over with --fresh") from error
        if not isinstance(status, dict) or not isinstance(status.get("seconds", {}), dict):
            raise DataError(f"{file}: not the status of a run\n  move it away, or start over with --fresh")
        return status

    def set_status(self, **fields: Any) -> None:
        """Merges fields into ``run.json``; ``DiskError``, with the file as it was, where it cannot be written."""
        if self._writes:
            with told_as_disk_error():
                merged = _strict({**self.status(), **self._untold, **fields})
                write_text(self.path / "run.json", json.dumps(merged, indent=2, allow_nan=False) + "\n")
            self._untold = {}

    def tell_status(self, **fields: Any) -> None:
        """The same of what a run says on its way: where it cannot be written that is told, and it comes with what is
        written next."""
        try:
            self.set_status(**fields)
        except DiskError as error:
            self._untold |= fields
            note(f"{str(error).splitlines()[0]}; the run goes on, and this is written later")

    def log(self, record: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``; where the disk refuses it, it is kept and written with a later one. Numbers
        that are not finite become null: JSON has no NaN."""
        if self._writes:
            self._log.add(json.dumps(_strict(record), allow_nan=False) + "\n")
            for hear in self._listeners:
                hear(record)

    def require_log(self) -> None:
        """``DiskError``, on the rank that writes, where lines of ``metrics.jsonl`` cannot be written."""
        if self._writes:
            self._log.flush()

    def log_length(self) -> int:
        """Bytes of ``metrics.jsonl``, all of them on the disk once this returns; 0 where there is none, and on ranks
        that do not write. ``DiskError`` where lines cannot be written."""
        return self._log.length() if self._writes else 0

    def cut_log(self, length: int) -> None:
        """Takes away what was logged after ``log_length`` gave this length.

        Raises ``CheckpointError``, on the rank that writes, where the file is not one that was so long at the end of a
        line.
        """
        if self._writes:
            self._log.cut(length)

    def listen(self, hear: Callable[[Mapping[str, Any]], None]) -> None:
        """Calls ``hear`` with each record that is logged from now on, once its line is written or kept."""
        self._listeners.append(hear)


def says_the_same(stored: str, wanted: str) -> bool:
    """Whether two texts are one configuration. A setting that did not exist when one was stored counts as its default
    of today, which is how new settings come: no finished run counts as another for them."""
    if stored == wanted:
        return True
    try:
        before, now = (read_yaml(text, source="config.yaml") for text in (stored, wanted))
        if not (isinstance(before, dict) and isinstance(now, dict)):
            return False
        return dump_config(RunConfig(**before)) == dump_config(RunConfig(**now))
    except ConfigError:
        return False  # settings that no longer exist


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A staging folder beside ``folder`` that takes its name, by renames, when the block ends well."""
    staging, old = folder.with_name(f".staging-{folder.name}"), folder.with_name(f".old-{folder.name}")
    if old.exists() and not folder.exists():
        old.rename(folder)  # a process died between the two renames below
    for left_over in (staging, old):
        _remove(left_over)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner can read
            sync(path)
        sync(staging)
        if folder.exists():
            folder.rename(old)
        staging.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The rights that this process takes from new files; the only way to read it is to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def make_folder(path: Path, *, setting: str) -> None:
    """Makes a folder, and those above it; ``ConfigError`` naming ``setting`` where it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    # ValueError: a null byte, which no path may hold.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{str(path)!r} cannot be used as a folder ({reason}); wanted one to write to.\n"
            f"  change {setting}, or make room there"
        ) from error


def require_writable(file: Path) -> None:
    """Raise ``DataError`` unless a file of this name can be written, or replaced, where it is to stand."""
    try:
        if file.is_dir():
            raise DataError(f"{file} is a folder, wanted a file\n  name a file in it")
        if not file.parent.is_dir():
            raise DataError(f"{file}: there is no folder {file.parent}\n  make it, or name another file")
        tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.").close()
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}\n  name another file") from error


def _remove(path: Path) -> None:
    """Removes a folder; of a link, the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """The same of what is no text."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed; or a link, which would lead elsewhere
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # on a full disk it would keep the room that others need
            temporary.unlink(missing_ok=True)
        if error.errno is not None:
            error.filename = str(path)  # the system names no file in which there was no room
        raise


@contextlib.contextmanager
def told_as_disk_error(what: str = "") -> Iterator[None]:
    """What the disk refuses in the block, as a ``DiskError`` that says what it was wanted for."""
    try:
        yield
    except MinillmError:
        raise
    except Exception as error:
        if refused := as_disk_error(error, what=what):
            raise refused from error
        raise


def record_text(record: Mapping[str, Any]) -> str:
    """JSON with one line a top-level entry: short, and a change shows in a line of its own. NaN is refused."""
    lines = (f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """One JSON object a line, the file whole or not at all."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


class Clock:
    """Seconds since it was made, and those of ``before``."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    def __call__(self) -> float:
        return time.monotonic() - self._start


def _strict(value: Any) -> Any:
    """The same value with null for numbers that are not finite: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {name: _strict(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

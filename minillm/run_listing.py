"""The runs below a folder: how each stands, what it found, which checkpoints are whole, its share of the disk."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.checkpoint_manifest import folder_name, in_a_line, verified
from minillm.checkpoints import Checkpoints, OneRank, steps_in
from minillm.errors import CheckpointError, ConfigError, DataError
from minillm.run_lock import owner, run_lock
from minillm.store import BAD_BATCHES, CHECKPOINTS, PROFILE, RunFolder
from minillm.yaml_reader import read_yaml_file

State = Literal["running", "stopped", "failed", "broken off", "done", "unreadable"]
_OF_A_RUN = {BAD_BATCHES, CHECKPOINTS, PROFILE, "student", "stages", "tensorboard", "evaluation"}
"""Folders that a run makes: none of them holds another run."""
_TAIL = 64 * 1024
"""Bytes at the end of a log that are looked through for where the run is."""
TOLD_BYTES = 1_000_000_000
"""Checkpoints that take a second to read, about: one core hashes 1.2 GB a second."""
_SHOWN = ("validity", "coverage", "rouge_l", "reverse_kl", "loss")
"""Of the figures of a validation, those that are listed, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One checkpoint of a run."""

    path: Path
    fault: str
    """Why it is not whole; "" where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """How one run stands."""

    path: Path
    name: str
    state: State
    owner: str
    """Who works in it now; "" for nobody."""
    at: str
    """The last step that was logged, of how many: ``minillm 35/60``."""
    best: Mapping[str, float]
    """Figures of the best validation, or of the evaluation once there is one."""
    checkpoints: tuple[Kept, ...]
    """Newest first."""
    bytes: int
    """Of its files, without those of runs inside it."""
    reason: str
    """Why it stopped or failed, in a line."""


def find_runs(root: Path) -> list[Path]:
    """Folders of runs below ``root``, or ``root`` itself, in the order of their names; ``DataError`` where there is no
    such folder."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder, wanted one that holds runs\n  name it: minillm runs DIR")
    found = []
    for at, folders, files in os.walk(root):
        is_run = _is_run(files)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not (is_run and name in _OF_A_RUN))
        if is_run:
            found.append(Path(at))
    return found


def describe(folder: Path, *, root: Path, reading: Callable[[Path, int], None] = lambda folder, count: None) -> RunInfo:
    """How a run stands; every byte of its checkpoints is read for it, which ``reading`` is told before where there are
    ``TOLD_BYTES`` of them. One that is gone once it was read was removed by the run that works there, and is not
    counted."""
    name = str(folder.relative_to(root)) if folder != root else folder.name
    works, status = owner(folder), dict[str, Any]()
    state: State
    try:
        status = RunFolder(folder, writes=False).status()
        state = _state(str(status.get("state", "")), works=bool(works))
    except DataError:
        state = "unreadable"
    last = _last_lines(folder / "metrics.jsonl")
    kept, paths = list[Kept](), list[Path]()
    try:
        paths = [folder / CHECKPOINTS / folder_name(step) for step in steps_in(folder / CHECKPOINTS)]
    except CheckpointError as error:
        kept = [Kept(path=folder / CHECKPOINTS, fault=in_a_line(error))]
    if (count := sum(size for path in paths for size in _sizes(path))) >= TOLD_BYTES:
        reading(folder, count)
    kept += [Kept(path=path, fault=fault_of(path)) for path in paths]
    return RunInfo(
        path=folder, name=name, state=state, owner=works, at=_at(folder, last.get("train", {})),
        best=_best(status, last.get("validation", {})),
        checkpoints=tuple(one for one in kept if not one.fault or os.path.lexists(one.path)),
        bytes=sum(_sizes(folder)), reason=str(status.get("reason") or ""),
    )  # fmt: skip


def fault_of(checkpoint: Path) -> str:
    """Why a checkpoint is not whole, in a line; "" where every byte is as it was written."""
    try:
        verified(checkpoint)
    except CheckpointError as error:
        return in_a_line(error)
    return ""


def clean(folder: Path, *, keep: int, say: Callable[[str], None]) -> int:
    """Removes what no run will read again: checkpoints but the ``keep`` newest that are whole (all of a run that is
    done), what broken-off saves left. The bytes that it freed; ``RunInUse`` where a process works there."""
    with run_lock(folder):
        before = sum(_sizes(folder))
        checkpoints = Checkpoints(folder / CHECKPOINTS, ranks=OneRank(), say=say)
        checkpoints.clean()
        done = RunFolder(folder, writes=False).status().get("state") == "done"
        if done:
            checkpoints.remove()
        else:
            checkpoints.remove_set_aside()
            checkpoints.remove_all_but(keep, whole=keep)
        return before - sum(_sizes(folder))


def _state(told: str, *, works: bool) -> State:
    if works:
        return "running"
    if told == "running":
        return "broken off"
    return told if told in {"stopped", "failed", "done"} else "unreadable"  # type: ignore[return-value]


def _at(folder: Path, line: Mapping[str, Any]) -> str:
    if not line:
        return "–"
    try:
        stages = {stage["name"]: stage.get("steps", 0) for stage in read_yaml_file(folder / "config.yaml")["stages"]}
    except (ConfigError, OSError, TypeError, KeyError):
        stages = {}
    return f"{line.get('stage')} {line.get('step')}/{stages.get(line.get('stage'), '?')}"


def _best(status: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, float]:
    """Of the last stage that ended its best validation, else the last one that was logged."""
    stages = status.get("stages")
    ended = list(stages.values()) if isinstance(stages, Mapping) else []
    best = ended[-1].get("best_figures") if ended and isinstance(ended[-1], Mapping) else None
    figures = best if isinstance(best, Mapping) and best else validation
    return {name: value for name in _SHOWN if isinstance(value := figures.get(name), int | float)}


def _last_lines(log: Path) -> dict[str, dict[str, Any]]:
    """The last line of each kind in a log; what is broken there is passed over."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found[str(record.get("kind"))] = record
    return found


def _sizes(folder: Path) -> Iterator[int]:
    """Of every file of a run, links not followed."""
    for at, folders, files in os.walk(folder):
        if Path(at) != folder and _is_run(files):
            folders.clear()
            continue
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # somebody works there
                yield (Path(at) / name).lstat().st_size


def _is_run(files: Collection[str]) -> bool:
    return "run.json" in files and "config.yaml" in files

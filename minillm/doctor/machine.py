"""Checks of the machine: packages, disk, shared memory, threads, open files, the folder of the run."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from transformers import PreTrainedConfig

from minillm.adaptation import adaptation_of
from minillm.config import dump_config
from minillm.doctor.findings import Finding, error, note, ok, warning
from minillm.doctor.patient import Patient
from minillm.errors import RunExists
from minillm.meta_models import count_parameters, meta_model
from minillm.run_lock import owner
from minillm.store import RunFolder

TRAINED_BYTES = 12
"""Of a checkpoint for each weight that learns: itself and two moments of Adam, in 32 bits each; frozen ones are not in
it, and the best student so far is beside it in whole."""
WEIGHT_BYTES = 4
"""Of a published student for each weight."""
SHARED_BYTES_A_RANK = 128 * 2**20
"""Of /dev/shm, for NCCL's buffers between GPUs of one node; Docker gives 64 MiB in all."""
LEAST_OPEN_FILES = 1024
GIB = 2**30
LOCKED = ("torch", "transformers", "deepspeed", "datasets", "accelerate")
"""Packages whose version in constraints.txt is compared, where that file is there."""


def packages(patient: Patient | None = None) -> Iterator[Finding]:
    """Versions against what the installed minillm asks for, and against those that the tests passed in."""
    wanted = [Requirement(line) for line in metadata.requires("minillm") or []]
    installed = {each.name: _version(each.name) for each in wanted if each.marker is None}
    for each in wanted:
        if each.marker is not None:
            continue
        have = installed[each.name]
        if have is None:
            yield error(
                "packages",
                f"{each.name} is not installed; wanted {each.name}{each.specifier}",
                why="minillm does not start without it",
                mend=f"pip install '{each.name}{each.specifier}'",
            )
        elif not each.specifier.contains(have, prereleases=True):
            yield warning(
                "packages",
                f"{each.name} {have}; wanted {each.name}{each.specifier}",
                why="this version was never tried: names may be missing and numbers differ",
                mend=f"pip install '{each.name}{each.specifier}'",
            )
    lock = _locked()
    if other := [f"{name} {installed[name]} ({lock[name]})" for name in LOCKED if _other(name, installed, lock)]:
        yield note(
            "packages",
            f"other versions than in constraints.txt: {', '.join(other)}",
            why="they are in the range that is supported; the tests passed with those in brackets",
            mend="pip install -c constraints.txt minillm, where something is strange",
        )
    else:
        shown = ", ".join(f"{name} {installed.get(name) or 'none'}" for name in LOCKED)
        yield ok("packages", f"{shown}; {len(installed)} packages looked at")


def _other(name: str, installed: Mapping[str, str | None], lock: Mapping[str, str]) -> bool:
    have = installed.get(name)
    return have is not None and name in lock and have.partition("+")[0] != lock[name]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _locked() -> dict[str, str]:
    """The versions in constraints.txt, which stands beside the package in a checkout and in no wheel."""
    file = Path(__file__).resolve().parents[2] / "constraints.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name: version for name, _, version in (line.partition("==") for line in lines) if version}


def open_files(patient: Patient | None = None) -> Iterator[Finding]:
    """How many files a process may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < LEAST_OPEN_FILES:
        yield warning(
            "open-files",
            f"a process may have {limit:,} files open; wanted {LEAST_OPEN_FILES:,}",
            why="connections between ranks and shards of data are files: a run ends with 'too many open files'",
            mend=f"ulimit -n {LEAST_OPEN_FILES} before the run",
        )
    else:
        yield ok("open-files", f"a process may have {'any number of' if limit < 0 else f'{limit:,}'} files open")


def threads(patient: Patient) -> Iterator[Finding]:
    """Threads of this node's ranks against the cores that they have."""
    cores, ranks = len(os.sched_getaffinity(0)), patient.ranks_here
    told = os.environ.get("OMP_NUM_THREADS", "")
    each = patient.config.threads or (int(told) if told.isdigit() else 1 if ranks > 1 else cores)
    words = f"{ranks} rank{'s' if ranks > 1 else ''} of {each} thread{'s' if each > 1 else ''} on {cores} cores"
    if each * ranks > cores and each > 1:
        yield warning(
            "threads",
            words,
            why="threads that wait for each other's cores are slower than fewer would be",
            mend=f"set threads: {max(1, cores // ranks)}",
        )
    elif not torch.cuda.is_available() and 4 * each * ranks <= cores:
        yield note(
            "threads",
            words,
            why="most cores would stand idle",
            mend=f"set threads: {cores // ranks}, or OMP_NUM_THREADS",
        )
    else:
        yield ok("threads", words)


def shared_memory(patient: Patient) -> Iterator[Finding]:
    """/dev/shm, through which GPUs of one node talk."""
    ranks = max(patient.ranks_here, torch.cuda.device_count())
    if ranks < 2 or not torch.cuda.is_available() or not Path("/dev/shm").is_dir():
        yield ok("shared-memory", "not used: one rank, or no GPU")
        return
    yield shared_memory_for(ranks, free=shutil.disk_usage("/dev/shm").free)


def shared_memory_for(ranks: int, *, free: int) -> Finding:
    """Whether so many bytes are enough for the GPUs of one node."""
    wanted = ranks * SHARED_BYTES_A_RANK
    if free < wanted:
        return warning(
            "shared-memory",
            f"{free / GIB:.2f} GiB free in /dev/shm for {ranks} ranks; wanted {wanted / GIB:.2f}",
            why="NCCL ends with 'no space left on device', or with a bus error, at the first collective",
            mend="start the container with --shm-size=8g or --ipc=host; on Kubernetes mount a memory volume there",
        )
    return ok("shared-memory", f"{free / GIB:.1f} GiB free in /dev/shm for {ranks} ranks")


def disk(patient: Patient) -> Iterator[Finding]:
    """Room for checkpoints and students against what is free where the run writes."""
    assert patient.student is not None
    config, settings = patient.student.facts.config, patient.config.adapter
    weights = parameters_of(config)
    adapter = 0 if settings is None else adaptation_of(settings).parameters(config)
    students, checkpoints = room(
        weights + adapter,
        trained=adapter or weights,
        stages=len(patient.config.stages),
        kept=0 if patient.config.checkpoints is None else patient.config.checkpoints.keep,
    )
    where = _standing_parent(Path(patient.config.out))
    free = shutil.disk_usage(where).free
    words = (
        f"{free / GIB:,.1f} GiB free in {where}; {weights:,} weights take about {students / GIB:,.1f} as students and "
        f"{checkpoints / GIB:,.1f} as checkpoints"
    )
    why = "a run whose disk is full keeps what it has saved, and ends with code 6"
    if free < students:
        yield error("disk", words, why=why, mend="make room, or set out to another disk")
    elif free < students + checkpoints:
        yield warning("disk", words, why=why, mend="make room, set out to another disk, or checkpoints: null")
    else:
        yield ok("disk", words)


def parameters_of(config: PreTrainedConfig) -> int:
    """Weights of the model that a configuration describes, without any memory for them."""
    return count_parameters(meta_model(config))


def room(published: int, *, trained: int, stages: int, kept: int) -> tuple[int, int]:
    """Bytes of the published students and of checkpoints, each with the one that is just being written; ``published``
    and ``trained`` are numbers of weights."""
    student = WEIGHT_BYTES * published
    return (stages + 1) * student, (kept + 1) * (student + TRAINED_BYTES * trained) if kept else 0


def out_folder(patient: Patient) -> Iterator[Finding]:
    """Whether the run may write where it wants to, and what stands there."""
    folder = Path(patient.config.out) / patient.config.name
    parent = _standing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        what = "may not be written in" if parent.is_dir() else "is no folder"
        yield error(
            "out-folder",
            f"{folder}: {parent} {what}",
            why="the run writes its log, checkpoints and student there",
            mend="set out to a folder of yours, or change the rights of that one",
        )
        return
    yield ok("out-folder", f"{folder} can be written")
    yield from _standing(patient, folder)


def _standing(patient: Patient, folder: Path) -> Iterator[Finding]:
    if worker := owner(folder):
        yield error(
            "existing-run",
            f"{folder}: {worker} works there now",
            why="one process at a time may",
            mend="wait for its end, or give this run another name (name=NAME)",
        )
        return
    try:
        standing = RunFolder(folder, writes=False).standing(dump_config(patient.config))
    except RunExists as raised:
        head, _, mend = str(raised).partition("\n")
        yield error("existing-run", head, why="nothing of another run is overwritten", mend=mend.strip())
        return
    if standing == "done":
        yield note(
            "existing-run",
            f"{folder} holds this run, done",
            why="the command would leave it as it is",
            mend="start over with --fresh, or give this run another name (name=NAME)",
        )
    elif standing == "unfinished":
        yield note(
            "existing-run",
            f"{folder} holds this run, or an earlier state of it, not finished",
            why="the command goes on from its newest checkpoint, if it has one",
            mend="--fresh starts over",
        )
    else:
        yield ok("existing-run", "none of this name")


def _standing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.expanduser().absolute()
    return next(each for each in (path, *path.parents) if each.exists())

"""A run's checkpoints: when one is made, what stands in it, and what a run that goes on takes from it.

Beside the engine's files (``engine_files``): run.json, what every rank knows alike; shared.safetensors, its tensors;
own-rank00000.json and .safetensors, what one rank has of a step that is under way; best-…, the student that is to be
handed on as things stand, file by file (what is neither weights nor JSON stands in run.json); bestadapter-…, its
adapter's, where it has one.
"""

from __future__ import annotations

import base64
import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm import phases
from minillm.adapter_files import FOLDER
from minillm.checkpoint_manifest import REMEDY, SUFFIXES, Manifest
from minillm.checkpoints import Checkpoint, Checkpoints, Write
from minillm.config import CheckpointsConfig
from minillm.disk import Sink
from minillm.errors import CheckpointError, DiskError, SaveFailed
from minillm.inside import inside
from minillm.moments import Boundary, Moment, Progressed, never
from minillm.publish import weights_sha256
from minillm.ranks import Ranks
from minillm.state import State, States, from_json, to_json
from minillm.stops import Stops
from minillm.store import Clock, RunFolder, replaced_folder
from minillm.student_engine import Student
from minillm.tensor_files import read_tensors, write_tensors

RUN, SHARED, BEST, BEST_ADAPTER = "run.json", "shared.safetensors", "best-", "bestadapter-"
_AT_ONCE = 1 << 22
"""Bytes of a file that are copied at once."""


@dataclass(slots=True, kw_only=True)
class Behind:
    """What the stages that are over have left."""

    updates: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    """Of each what its loop knew at the end, in order."""

    def add(self, stage: str, done: Progressed, *, updates: int) -> None:
        """One more is over."""
        self.updates += updates
        self.seconds[stage] = round(done.seconds, 2)
        self.stages[stage] = dataclasses.asdict(done)

    def require_student(self, stage: str, folder: Path) -> None:
        """``CheckpointError`` unless the student that a stage handed on stands there as it was."""
        if weights_sha256(folder) != self.stages[stage]["published"]:
            raise CheckpointError(
                f"{folder}: not the student that stage {stage} handed on, and the checkpoint is of a later one\n"
                "  put the folder back as the run left it, or start over with --fresh"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a run goes on, as a checkpoint says."""

    checkpoint: Checkpoint
    stage: str
    behind: Behind
    log_bytes: int
    """Length of metrics.jsonl then."""
    others: Mapping[str, bytes]
    """Files of the best student that are neither weights nor JSON."""
    states: States

    @property
    def progressed(self) -> Progressed:
        """What the stage's loop knew."""
        done = Progressed()
        done.restore(self.states.shared.part("progress"))
        return done

    @property
    def updates(self) -> int:
        """Those of its own stage."""
        return self.checkpoint.manifest.step - self.behind.updates

    @property
    def over(self) -> bool:
        """Whether its stage has nothing left to do."""
        return self.progressed.over

    @property
    def bytes(self) -> int:
        """What the checkpoint takes of the disk."""
        return sum(entry.bytes for entry in self.checkpoint.manifest.files.values())

    def restore_best(self, into: Path, *, ranks: Ranks, say: Callable[[str], None]) -> None:
        """Puts the student that was best then where it stood, unless it stands there still.

        A run that broke off may have published a better one after its last save, of which the run that goes on knows
        nothing.
        """
        best = self.progressed.published
        if best and ranks.of_first(lambda: weights_sha256(into)) != best:
            say(f"note: {into} is put back as it was at step {self.progressed.step:,}")
            ranks.of_first(lambda: self._write_best(into))

    def _write_best(self, into: Path) -> None:
        with replaced_folder(into) as folder:
            for name in self.checkpoint.manifest.files:
                for prefix, place in ((BEST, folder), (BEST_ADAPTER, folder / FOLDER)):
                    if name.startswith(prefix):
                        place.mkdir(exist_ok=True)
                        target = inside(place, name.removeprefix(prefix), source=self.checkpoint.path / RUN)
                        shutil.copyfile(self.checkpoint.file(name), target)
            for name, content in self.others.items():
                inside(folder, name, source=self.checkpoint.path / RUN).write_bytes(content)


def read(checkpoint: Checkpoint, *, rank: int) -> Resumed:
    """What a checkpoint that was verified says of its run; ``CheckpointError`` where it is not one of a run."""
    try:
        record = from_json(checkpoint.file(RUN).read_text(encoding="utf-8"))
        shared = State(record["shared"], _tensors(checkpoint, SHARED))
        own = State()
        if (name := f"own-rank{rank:05d}.json") in checkpoint.manifest.files:
            own = State(
                from_json(checkpoint.file(name).read_text(encoding="utf-8")),
                _tensors(checkpoint, name.replace(".json", ".safetensors")),
            )
        found = Resumed(
            checkpoint=checkpoint, stage=checkpoint.manifest.stage, behind=Behind(**record["behind"]),
            log_bytes=int(record["log_bytes"]), states=States(shared, own),
            others={name: base64.b64decode(content, validate=True) for name, content in record["others"].items()},
        )  # fmt: skip
        for name in found.others:
            inside(checkpoint.path, name, source=checkpoint.path / RUN)
        assert found.progressed.step >= 0 and found.updates >= 0
        return found
    except (AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path / RUN}: not the state of a run ({error!r})\n  {REMEDY}") from error


def needs_its_ranks(ranks: int) -> Callable[[Manifest], str]:
    """Why a checkpoint is of no use to so many ranks; "" for those that are."""

    def refuse(manifest: Manifest) -> str:
        if manifest.fingerprints.get("inside") and manifest.ranks != ranks:
            return (
                f"saved inside a step on {manifest.ranks} ranks, and of no use to {ranks}\n"
                f"  start {manifest.ranks} ranks, go back to an older one (--resume FOLDER), or start over (--fresh)"
            )
        return ""

    return refuse


class Saver:
    """Saves a run where its settings or a signal ask for it."""

    def __init__(
        self, checkpoints: Checkpoints, settings: CheckpointsConfig, *, stops: Stops, ranks: Ranks, folder: RunFolder,
        fingerprints: Mapping[str, Any], last_bytes: int = 0, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """``last_bytes`` is what a save took before, if there was one."""
        self._checkpoints, self._settings = checkpoints, settings
        self._stops, self._ranks, self._folder, self._say = stops, ranks, folder, say
        self._fingerprints = dict(fingerprints)
        self._bytes, self._failed, self._saved_at = last_bytes, 0, time.monotonic()
        self.updates = 0
        """Of the present stage."""
        self.stopped = ""
        """The signal that has ended the run."""
        self._saves, self._seconds, self._clock = 0, 0.0, Clock()

    def at(self, stage: str, student: Student, *, into: Path, behind: Behind) -> Boundary:
        """What a stage's loop is to call after every update; ``into`` is where its student is handed on."""

        def boundary(moment: Moment) -> bool:
            self.updates = moment.update
            self.stopped = self._stops.agreed(self._ranks)
            if self.stopped or moment.over or self._due(moment):
                phases.enter("save")
                self._save(moment, stage, student, into=into, behind=behind)
                phases.enter("learning")
            return bool(self.stopped)

        return boundary

    @property
    def cost(self) -> str:
        """How many checkpoints this process has saved, and how long its training waited for them."""
        share = self._seconds / max(self._clock(), 1e-9)
        return f"checkpoints: {self._saves} saved in {self._seconds:.2f} s, {share:.1%} of the training"

    def _due(self, moment: Moment) -> bool:
        """Whether it is time, at the end of a step: then no rank has anything of its own, and any ranks can go on."""
        if moment.inside:
            return False
        steps, minutes = self._settings.every_steps, self._settings.every_minutes
        if steps and moment.step % steps == 0:
            return True
        if not minutes:
            return False
        late = time.monotonic() - self._saved_at >= 60 * minutes
        return self._ranks.anyone(late and self._ranks.first) if self._ranks.size > 1 else late

    def _save(self, moment: Moment, stage: str, student: Student, *, into: Path, behind: Behind) -> None:
        clock = Clock()

        def files() -> dict[str, Write]:
            return {**student.state_files(), **self._files(moment.state(), into=into, behind=behind)}

        try:
            self._require_room()
            saved = self._checkpoints.save(
                step=behind.updates + moment.update,
                stage=stage,
                fingerprints={**self._fingerprints, "inside": moment.inside, "over": moment.over},
                files=files,
            )
        except DiskError as error:
            self._failed += 1
            if self.stopped or self._failed > self._settings.max_failed:
                raise
            words = f"save {self._failed} of {self._settings.max_failed} that may fail: {str(error).splitlines()[0]}"
            self._say(f"note: {words}; the run goes on")
        else:
            self._failed, self._bytes = 0, sum(entry.bytes for entry in saved.manifest.files.values())
            self._saves += 1
        self._seconds += clock()
        self._saved_at = time.monotonic()

    def _require_room(self) -> None:
        """``SaveFailed`` where the disk has less room than the last save took: nothing is begun that cannot end."""

        def look() -> None:
            free = shutil.disk_usage(self._folder.path).free
            if free < self._bytes:
                raise SaveFailed(
                    f"{self._checkpoints.root}: {free:,} bytes are free, wanted the {self._bytes:,} of the last save\n"
                    "  the checkpoints before are untouched; make room there"
                )

        self._ranks.of_first(look)

    def _files(self, states: States, *, into: Path, behind: Behind) -> dict[str, Write]:
        """This rank's, beside the engine's."""
        files: dict[str, Write] = {}
        if states.own.record:
            own = f"own-rank{self._ranks.rank:05d}"
            files[f"{own}.json"] = _text(to_json(states.own.record))
            files[f"{own}.safetensors"] = lambda sink: write_tensors(sink, states.own.tensors)
        if not self._ranks.first:
            return files
        others = {}
        if states.shared.part("progress").record["published"]:
            for file in sorted(path for path in into.iterdir() if path.is_file()):
                if file.name.endswith(SUFFIXES):
                    files[BEST + file.name] = _copy(file)
                else:
                    others[file.name] = base64.b64encode(file.read_bytes()).decode()
            for file in sorted((into / FOLDER).glob("*")):
                files[BEST_ADAPTER + file.name] = _copy(file)
        record = {
            "behind": dataclasses.asdict(behind), "log_bytes": self._folder.log_length(), "others": others,
            "shared": states.shared.record,
        }  # fmt: skip
        files[RUN] = _text(to_json(record))
        files[SHARED] = lambda sink: write_tensors(sink, states.shared.tensors)
        return files


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How a stage is saved, and where it goes on if it was begun before."""

    saver: Saver | None
    """None saves nothing."""
    behind: Behind
    resumed: Resumed | None
    """Of this stage."""
    ranks: Ranks
    say: Callable[[str], None]

    def restore(self, student: Student, *, into: Path) -> States | None:
        """Puts the student, and the one that was handed on, where they stood; what the loop is to begin with."""
        if self.saver is not None:
            student.state_files()  # an engine that cannot be saved is found before it has worked for hours
        if self.resumed is None:
            return None
        differs = student.restore(self.resumed.checkpoint)
        if differs:
            what = ", ".join(differs)
            self.say(f"note: {what}; text and order stay the same, sums may differ in their last bits")
        self.resumed.restore_best(into, ranks=self.ranks, say=self.say)
        return self.resumed.states

    def boundary(self, stage: str, student: Student, *, into: Path) -> Boundary:
        """What the stage's loop is to call after every update."""
        return never if self.saver is None else self.saver.at(stage, student, into=into, behind=self.behind)


def _text(content: str) -> Write:
    return lambda sink: sink.write(content.encode())


def _copy(file: Path) -> Write:
    def write(sink: Sink) -> None:
        with file.open("rb") as stream:
            while part := stream.read(_AT_ONCE):
                sink.write(part)

    return write


def _tensors(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    return read_tensors(checkpoint.file(name))

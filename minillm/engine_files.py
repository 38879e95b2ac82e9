"""An engine's state in the files of a checkpoint: every rank writes its pieces, and any ranks can read them.

engine-rank00000.safetensors has a flat tensor KIND/PARAMETER (weight/…, exp_avg/…) for each piece;
engine-rank00000.json says where in the parameter it begins, and what else the engine must have to go on. Whoever reads
takes what overlaps with its own pieces, so the number of ranks and the ZeRO stage may be others.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from minillm.checkpoint_manifest import REMEDY
from minillm.checkpoints import Checkpoint, Write
from minillm.disk import Sink
from minillm.engine_state import WEIGHT, Layout, Piece
from minillm.errors import CheckpointError, did_you_mean
from minillm.manifests import read_record
from minillm.ranks import Ranks
from minillm.settings import Count, NonNegative, Settings, Text, Whole
from minillm.store import record_text
from minillm.tensor_files import TensorFile, open_tensors, write_tensors

_OTHER = "resume with the student and the optimiser that it was saved with, or start over"
_NAME = re.compile(r"engine-rank[0-9]{5,}\.json")


class PieceRecord(Settings):
    """One piece of a parameter."""

    shape: tuple[Whole, ...]
    """The whole parameter's."""
    start: Whole
    """The piece's first entry in the flattened parameter."""
    length: Count
    """Its entries."""
    moments: tuple[Text, ...]
    """What the optimiser kept of each entry; nothing before its first step."""
    steps: NonNegative | None
    """Steps that the optimiser had counted, if it counts."""


class Progress(Settings):
    """What an engine has beside tensors, the same on all ranks."""

    stage: Whole
    """ZeRO stage."""
    precision: Text
    """What the model computes in."""
    updates_done: Whole
    """Optimiser steps."""


class EngineRecord(Settings):
    """What one rank's file of tensors holds."""

    format: Literal["minillm engine 1"] = "minillm engine 1"
    """Which form of record this is."""
    progress: Progress
    """Of the engine."""
    pieces: dict[str, PieceRecord]
    """By the parameter's name."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """A piece that a checkpoint has, and the file that has it."""

    record: PieceRecord
    file: str

    @property
    def stop(self) -> int:
        return self.record.start + self.record.length


Kept = Mapping[str, list[_Kept]]
"""By parameter, in the order of its entries."""
Plan = Sequence[tuple[Piece, list[_Kept]]]
"""What each of this rank's pieces is read from."""


def engine_writers(layout: Layout, progress: Progress, ranks: Ranks) -> dict[str, Write]:
    """This rank's files of a checkpoint, of the engine as it is now: to be written before the next update."""
    if progress.stage == 0 and not ranks.first:
        return {}  # every rank has the same
    tensors = {f"{kind}/{p.name}": tensor for p in layout.pieces for kind, tensor in p.tensors().items()}
    record = EngineRecord(progress=progress, pieces={p.name: _record(p, layout.shapes) for p in layout.pieces})
    stem = f"engine-rank{ranks.rank:05d}"

    def write_record(sink: Sink) -> None:
        sink.write(record_text(record.model_dump()).encode())

    return {f"{stem}.safetensors": lambda sink: write_tensors(sink, tensors), f"{stem}.json": write_record}


def _record(piece: Piece, shapes: Mapping[str, tuple[int, ...]]) -> PieceRecord:
    return PieceRecord(
        shape=shapes[piece.name],
        start=piece.start,
        length=piece.weight_N.numel(),
        moments=tuple(sorted(piece.tensors().keys() - {WEIGHT})),
        steps=piece.steps(),
    )


def restore_engine(checkpoint: Checkpoint, layout: Layout, ranks: Ranks) -> Progress:
    """Gives the engine the weights and the optimiser's state of a checkpoint; what else it said of its engine.

    ``CheckpointError`` on all ranks, with nothing changed on any, unless the checkpoint has every trained parameter in
    its present shape, wholly and once, and of each entry what the present optimiser keeps.
    """
    with contextlib.ExitStack() as stack:
        reason = ""
        try:
            progress, kept = _read_records(checkpoint)
            _require_whole(checkpoint, kept, layout.shapes)
            plan = [(piece, _overlapping(piece, kept[piece.name])) for piece in layout.pieces]
            _require_state(checkpoint, plan)
            names = sorted({part.file for _, parts in plan for part in parts})
            files = {name: stack.enter_context(open_tensors(checkpoint.file(name))) for name in names}
            _require_tensors(plan, files)
        except CheckpointError as error:
            reason = str(error)
        if reasons := [told for told in ranks.gather_objects([reason]) if told]:
            raise CheckpointError(reasons[0])
        for piece, record in {id(piece.stepped): (piece, parts[0].record) for piece, parts in plan}.values():
            piece.begin(record.steps) if record.moments else piece.forget()
        for piece, parts in plan:
            _copy(piece, parts, files)
    layout.refresh()
    return progress


def _read_records(checkpoint: Checkpoint) -> tuple[Progress, Kept]:
    """What the ranks that saved have said together."""
    kept: dict[str, list[_Kept]] = defaultdict(list)
    told: dict[str, Progress] = {}
    for name in sorted(filter(_NAME.fullmatch, checkpoint.manifest.files)):
        record = read_record(checkpoint.file(name), EngineRecord, fault=CheckpointError, again=REMEDY)
        if record is None:
            raise CheckpointError(f"{checkpoint.path / name}: not there\n  {REMEDY}")
        told[name] = record.progress
        for parameter, piece in record.pieces.items():
            kept[parameter].append(_Kept(piece, name.replace(".json", ".safetensors")))
    if not told:
        raise CheckpointError(f"{checkpoint.path}: has no file of an engine's state\n  {REMEDY}")
    first, progress = next(iter(told.items()))
    if others := [name for name, other in told.items() if other != progress]:
        raise CheckpointError(f"{checkpoint.path}: {first} and {others[0]} are of different engines\n  {REMEDY}")
    return progress, {name: sorted(pieces, key=lambda kept: kept.record.start) for name, pieces in kept.items()}


def _require_whole(checkpoint: Checkpoint, kept: Kept, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every parameter in its shape, its pieces end to end from its first entry to its last."""
    wanted = {name: shape for name, shape in shapes.items() if math.prod(shape)}
    for name in sorted(kept.keys() - wanted.keys()):
        raise _fault(checkpoint, name, "is in it, and not in this model" + did_you_mean(name, wanted), _OTHER)
    for name, shape in wanted.items():
        if name not in kept:
            raise _fault(checkpoint, name, "is not in it" + did_you_mean(name, kept), _OTHER)
        end = 0
        for part in kept[name]:
            if part.record.shape != shape:
                raise _fault(checkpoint, name, f"of shape {part.record.shape}, wanted {shape}", _OTHER)
            if part.record.start != end:
                what = "missing" if part.record.start > end else "there twice"
                raise _fault(checkpoint, name, f"entry {min(end, part.record.start):,} is {what}")
            end = part.stop
        if end != math.prod(shape):
            raise _fault(checkpoint, name, f"has {end:,} entries, wanted {math.prod(shape):,}")


def _overlapping(piece: Piece, kept: list[_Kept]) -> list[_Kept]:
    last = piece.start + piece.weight_N.numel()
    return [part for part in kept if part.record.start < last and part.stop > piece.start]


def _require_state(checkpoint: Checkpoint, plan: Plan) -> None:
    """Of each piece what its optimiser keeps; and one count of steps, or none, for what it steps as one tensor."""
    first: dict[int, tuple[str, PieceRecord]] = {}
    for piece, parts in plan:
        for record in (part.record for part in parts):
            if record.moments and record.moments != tuple(sorted(piece.moments)):
                found, wanted = ", ".join(record.moments), ", ".join(sorted(piece.moments))
                raise _fault(checkpoint, piece.name, f"the optimiser kept {found}, this one keeps {wanted}", _OTHER)
            if (record.steps is not None) != (bool(record.moments) and piece.counted):
                raise _fault(checkpoint, piece.name, "moments and a count of steps do not go together")
            name, other = first.setdefault(id(piece.stepped), (piece.name, record))
            if record.steps != other.steps or record.moments != other.moments:
                what = f"stepped {record.steps or 0:g} times and {name} {other.steps or 0:g} times"
                raise _fault(checkpoint, piece.name, what, "this ZeRO stage steps them together; resume at stage 0")


def _require_tensors(plan: Plan, files: Mapping[str, TensorFile]) -> None:
    """All tensors that will be read, each as long as its piece and of 32 bits."""
    for piece, parts in plan:
        for part in parts:
            for key in (WEIGHT, *part.record.moments):
                file, name = files[part.file], f"{key}/{piece.name}"
                found, wanted = (file.shape(name), file.dtype(name)), ((part.record.length,), "F32")
                if found != wanted:
                    raise CheckpointError(f"{file.path}: {name}: got {found}, wanted {wanted}\n  {REMEDY}")


def _copy(piece: Piece, parts: list[_Kept], files: Mapping[str, TensorFile]) -> None:
    """One piece's entries, slice by slice."""
    for key, tensor_N in piece.tensors().items():
        for part in parts:
            begin = max(part.record.start, piece.start)
            end = min(part.stop, piece.start + tensor_N.numel())
            rows_N = files[part.file].rows(f"{key}/{piece.name}", begin - part.record.start, end - part.record.start)
            tensor_N[begin - piece.start : end - piece.start].copy_(rows_N)


def _fault(checkpoint: Checkpoint, parameter: str, found: str, remedy: str = REMEDY) -> CheckpointError:
    return CheckpointError(f"{checkpoint.path}: {parameter}: {found}\n  {remedy}")

"""Model folders that were trained from one start, merged into one folder, layer group by layer group.

Two passes over the files: the first gathers dot products of the task vectors and compares, the second merges and
writes. Both read a piece of each model at a time, so that memory does not grow with the models, nor with their number
by more than a piece.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillm.disk import DISK, Sink
from minillm.errors import ConfigError, ModelError
from minillm.loading import quiet_transformers
from minillm.merge_figures import angles_png
from minillm.merge_places import (
    AGAIN,
    FRONT,
    MERGED,
    answered,
    files_in,
    files_of,
    require_free,
    require_no_front,
    require_place_of_front,
    stored_record,
)
from minillm.merge_report import Group, MergeReport, Source, angle_words, angles_of, eta_words
from minillm.merge_sources import INDEX, WEIGHTS, lead_of, opened, pieces
from minillm.model_card import MergeFacts, render_merge
from minillm.model_files import few
from minillm.publish import weights_sha256
from minillm.rows import counted
from minillm.store import make_folder, replaced_folder, told_as_disk_error, write_bytes, write_text
from minillm.tensor_files import Kind, write_pieces
from minillm.weight_merging import STILL, WIDE, Method, Mix, angles, combined, gram, mix, normalised, norms

RECORD, ANGLES, CARD = MERGED, "angles.png", "README.md"
SHARD_BYTES = 5_000_000_000
"""Longest file of weights; a longer model is written in several, with an index."""
LEAST_COSINE = 0.1
"""Between the matrices of the start and those of a model that was trained from it, unless the start is known. It does
not see that weight decay shrinks what is left of the start, only how much was learnt beside that. Of independent starts
it is 0, give or take one over the root of the number of weights."""
_BLOCK = re.compile(r"(?:^|.*?\.)\d+(?=\.)")


def merge_folders(
    start: Path, models: Sequence[Path], *, into: Path, method: Method, weights: Sequence[float] | None = None,
    eta: float = 1.0, known_start: bool = False, say: Callable[[str], None] = print, card_words: str = "",
    shard_bytes: int = SHARD_BYTES, fresh: bool = False,
) -> MergeReport:  # fmt: skip
    """Writes ``models``, all trained from ``start``, as one model folder: theta_0 + eta * what ``method`` makes of
    their task vectors, layer group by layer group.

    A group is a transformer block; embeddings, the final norm and the head are groups of their own. ``slerp`` of more
    than two goes from one to the next in the order given; ``nlerp`` knows no order. ``weights`` are equal where not
    given. Sums are in 64 bits, rounded once, to the type that the models are stored in; tied weights are merged once;
    what is no floating-point tensor must be equal in all and is kept. A folder with nothing but a LoRA adapter counts
    as the start with it (B A is what is merged, not B and A). ``card_words`` stand in the model card.

    ``into`` is left as it is where an earlier merge of the same weights made it; ``fresh`` replaces what any earlier
    merge made, where nothing was added since. The new one appears when it is whole.

    Raises ``ModelError`` for models that do not share architecture, tokenizer and start, or whose task vectors cancel;
    ``ConfigError`` for unfit weights or eta; ``DataError`` where ``into`` holds anything else, one
    of the models or the start above all. A shared start is shown
    by numbers, not by what files say of themselves: a model whose matrices are at right angles to the start's (a cosine
    below ``LEAST_COSINE``) is of another start. ``known_start`` leaves that out, for who trained the models and knows.
    Two models that were trained from one ancestor pass, since each is a way from there.
    """
    _require_eta(eta)
    merging = Merging(start, models, method=method, weights=weights, known_start=known_start)
    for line in merging.notes:
        say(f"note: {line}")
    require_no_front(into)
    if merging.stands(into, eta=eta, fresh=fresh):
        report = merging.report(into, eta=eta)
        say(f"{into}: {AGAIN}")
    else:
        report = merging.write(into, eta=eta, card_words=card_words, shard_bytes=shard_bytes)
        say(f"{into}: {counted(len(models), 'model')} merged ({method}, eta {eta_words(eta)})")
    say(merging.words)
    return report


def merge_at(
    start: Path, models: Sequence[Path], *, into: Path, method: Method, weights: Sequence[float] | None = None,
    etas: Sequence[float], say: Callable[[str], None] = print, fresh: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The same at several etas, each into ``into``/eta-ETA/student. All folders are looked at before one is written.
    The record of what was merged, whatever the eta."""
    require_etas(etas)
    merging = Merging(start, models, method=method, weights=weights)
    for line in merging.notes:
        say(f"note: {line}")
    students = {eta: into / f"eta-{eta_words(eta)}" / "student" for eta in etas}
    require_place_of_front(into)
    if not fresh:
        answered(into / FRONT, merging.record())
    standing = {eta for eta, student in students.items() if merging.stands(student, eta=eta, fresh=fresh)}
    if fresh and (into / FRONT).is_file():
        (into / FRONT).unlink()  # of what is replaced: an interrupted front would be taken for its own
    for eta, student in students.items():
        if eta in standing:
            say(f"{student}: {AGAIN}")
            continue
        make_folder(student.parent, setting="--out")
        merging.write(student, eta=eta)
        say(f"{student}: {counted(len(models), 'model')} merged ({method}, eta {eta_words(eta)})")
    say(merging.words)
    return merging.record()


class Merging:
    """Models and their start, compared and measured; nothing is written before ``write``."""

    def __init__(
        self, start: Path, models: Sequence[Path], *, method: Method, weights: Sequence[float] | None = None,
        known_start: bool = False,
    ) -> None:  # fmt: skip
        """Errors are those of ``merge_folders``."""
        if not models:
            raise ConfigError("no model to merge; wanted one or more that were trained from the start")
        self.method, self.weights = method, normalised(weights, len(models))
        self._start, self._models, self.notes = opened(Path(start), [Path(model) for model in models])
        self._lead = lead_of(self._start, self._models)
        self._kinds = self._lead.weights.kinds
        self._groups, self._mixes, self.cosines = self._measured()
        if not known_start:
            self._require_start()
        folders = [self._start.folder, *(model.folder for model in self._models)]
        self.sources = tuple(Source(folder=str(each), weights_sha256=weights_sha256(each)) for each in folders)
        """The start, then the models."""

    @property
    def words(self) -> str:
        """The angles in a line: their median and range, and how many stand in each part of the half circle."""
        return angle_words(angles_of(self._groups))

    def record(self) -> dict[str, Any]:
        """What is merged, whatever the eta: start, models, method and weights, as in ``merge.json``."""
        whole = self._report(eta=1.0, sha256="", files=()).record()
        return {name: whole[name] for name in ("start", "models", "method", "weights", "cosines_with_start", "angles")}

    def stands(self, into: Path, *, eta: float, fresh: bool = False) -> bool:
        """Whether a folder holds what ``write`` would put there. ``DataError`` where it holds another merge, unless
        ``fresh``, and where it holds what no merge made."""
        if not fresh and answered(into / RECORD, self.report(into, eta=eta).record()):
            return True
        require_free(into, [Path(source.folder) for source in self.sources])
        return False

    def report(self, into: Path, *, eta: float) -> MergeReport:
        """What was found, and of a merge that stands in a folder."""
        return self._report(eta=eta, sha256=weights_sha256(into), files=files_of(stored_record(into)))

    def write(
        self, into: Path, *, eta: float = 1.0, card_words: str = "", shard_bytes: int = SHARD_BYTES
    ) -> MergeReport:
        """Merges into a folder; see ``merge_folders``."""
        _require_eta(eta)
        require_free(into, [Path(source.folder) for source in self.sources])
        size = _bytes(self._kinds)
        with told_as_disk_error(f"{into}: a model of {size:,} bytes"), replaced_folder(into) as staging:
            self._write_weights(staging, eta=eta, shard_bytes=shard_bytes)
            facts = self._lead.facts
            with quiet_transformers():
                facts.config.save_pretrained(staging)
                facts.tokenizer.save_pretrained(staging)
                if facts.generation is not None:
                    facts.generation.save_pretrained(staging)
            added = {RECORD, CARD, *([ANGLES] if angles_of(self._groups) else [])}
            files = tuple(sorted({*files_in(staging), *added}))
            report = self._report(eta=eta, sha256=weights_sha256(staging), files=files)
            write_text(staging / RECORD, json.dumps(report.record(), indent=2, allow_nan=False) + "\n")
            if report.angles:
                write_bytes(
                    staging / ANGLES,
                    angles_png(report.angles, title=f"{into.name}: {counted(len(self._models), 'model')}"),
                )
            write_text(staging / CARD, _card(report, into, kinds=self._kinds, words=card_words))
        return report

    def _report(self, *, eta: float, sha256: str, files: tuple[str, ...]) -> MergeReport:
        return MergeReport(
            start=self.sources[0], models=self.sources[1:], method=self.method, weights=self.weights, eta=eta,
            cosines=self.cosines, groups=self._groups, weights_sha256=sha256, files=files,
        )  # fmt: skip

    def _measured(self) -> tuple[tuple[Group, ...], dict[str, Mix], tuple[float, ...]]:
        """The groups, the mix of each tensor by its name, and the cosine of each model's matrices with the start's."""
        matrices_SS = torch.zeros(len(self._models) + 1, len(self._models) + 1, dtype=WIDE)
        groups: list[Group] = []
        mixes: dict[str, Mix] = {}
        for name, tensors in groups_of(self._kinds).items():
            gram_SS = torch.zeros_like(matrices_SS)  # of the start, then the task vectors
            for tensor in tensors:
                found_SS = self._gram(tensor)
                gram_SS += found_SS
                if len(self._kinds[tensor][1]) > 1:
                    matrices_SS += found_SS
            if not bool(torch.isfinite(gram_SS).all()):
                raise self._not_finite(name, tensors)
            if any(self._kinds[tensor][0].is_floating_point for tensor in tensors):
                groups.append(self._group(name, tensors, gram_SS))
                found = Mix(shares=groups[-1].shares, edges=groups[-1].edges)
                mixes |= dict.fromkeys(tensors, found)
        return tuple(groups), mixes, _cosines(matrices_SS)

    def _not_finite(self, group: str, tensors: Sequence[str]) -> ModelError:
        """The error that names the folder and the tensor; only numbers so long that their squares are beyond 64 bits
        are of none."""
        folders = [self._start.folder, *(model.folder for model in self._models)]
        for tensor in tensors:
            for start, vectors in self._pieces(tensor):
                for folder, piece in zip(folders, [start, *vectors], strict=True):
                    if not bool(torch.isfinite(piece).all()):
                        return ModelError(
                            f"{folder}: {few([tensor])} is not finite (NaN or infinity in it)\n"
                            "  such a model is of no use; write or fetch it again, or merge without it"
                        )
        return ModelError(f"{group}: squares of its weights are beyond 64 bits\n  merge others")

    def _group(self, name: str, tensors: Sequence[str], gram_SS: Tensor) -> Group:
        start_norm, *lengths = norms(gram_SS)
        try:
            found = mix(gram_SS[1:, 1:], method=self.method, weights=self.weights, start_norm=start_norm)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
        radians = angles(gram_SS[1:, 1:], still=STILL * start_norm)
        return Group(
            name=name, parameters=sum(math.prod(self._kinds[tensor][1]) for tensor in tensors), start_norm=start_norm,
            norms=tuple(lengths), angles=tuple(None if each is None else math.degrees(each) for each in radians),
            shares=found.shares, edges=found.edges,
        )  # fmt: skip

    def _gram(self, tensor: str) -> Tensor:
        """Dot products of the start's tensor and the task vectors in it; of one that is no floating-point tensor, zeros
        once it is known to be the same in all models."""
        total_SS = torch.zeros(len(self._models) + 1, len(self._models) + 1, dtype=WIDE)
        exact = not self._kinds[tensor][0].is_floating_point
        for start, vectors in self._pieces(tensor):
            if exact and any(bool(vector.any()) for vector in vectors):
                raise ModelError(
                    f"{tensor}: whole numbers that are not the same in the start and all models, so there is nothing "
                    "between them\n  only models with the same ones can be merged"
                )
            if not exact:
                total_SS += gram([start, *vectors])
        return total_SS

    def _require_start(self) -> None:
        for model, cosine in zip(self._models, self.cosines, strict=True):
            if cosine < LEAST_COSINE:
                raise ModelError(
                    f"{model.folder}: the cosine of its matrices with those of {self._start.folder} is {cosine:.3f}, "
                    f"wanted {LEAST_COSINE} or more: it was trained from another start.\n"
                    "  name the start that all models have (the README of a student says what it started from); if it "
                    "is this one, and training left nothing of it, merge_folders(…, known_start=True) from Python"
                )

    def _pieces(self, tensor: str) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """A tensor piece by piece: of the start, and the models' task vectors."""
        with contextlib.ExitStack() as stack:
            start = stack.enter_context(self._start.weights.open(tensor))
            models = [stack.enter_context(model.open(tensor)) for model in self._models]
            for begin, end in pieces(self._kinds[tensor][1]):
                rows = start(begin, end)
                yield rows, [model(begin, end, rows) for model in models]

    def _merged(self, tensor: str, eta: float) -> Iterator[Tensor]:
        """A tensor piece by piece, as it is to be stored."""
        dtype = self._kinds[tensor][0]
        for start, vectors in self._pieces(tensor):
            if not dtype.is_floating_point:
                yield start
                continue
            piece = combined(start, vectors, self._mixes[tensor].shares, eta=eta).to(dtype)
            if not bool(torch.isfinite(piece).all()):
                raise ModelError(f"{tensor}: merged weights are beyond what {dtype} holds\n  store the models wider")
            yield piece

    def _write_weights(self, folder: Path, *, eta: float, shard_bytes: int) -> None:
        shards = shards_of(self._kinds, shard_bytes)
        names = [WEIGHTS] if len(shards) == 1 else [
            f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
        ]  # fmt: skip
        for name, shard in zip(names, shards, strict=True):
            file = DISK.create(folder / name)
            try:
                write_pieces(Sink(DISK, file), shard, lambda tensor: self._merged(tensor, eta))
                DISK.sync(file)
            finally:
                DISK.close(file)
        if len(shards) > 1:
            places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": _bytes(self._kinds)}, "weight_map": dict(sorted(places.items()))}
            write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def groups_of(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Tensors by their layer group: a block is what stands below the first number in a name, and outside the blocks
    each module is one (a norm's weight and bias)."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        block = _BLOCK.match(name)
        groups.setdefault(block[0] if block else name.rpartition(".")[0] or name, []).append(name)
    return groups


def shards_of(kinds: Mapping[str, Kind], most: int) -> list[dict[str, Kind]]:
    """Tensors in order of their names, in as few files as they fill; one that is longer than a file has its own."""
    shards: list[dict[str, Kind]] = [{}]
    for name in sorted(kinds):
        if shards[-1] and _bytes(shards[-1]) + _bytes({name: kinds[name]}) > most:
            shards.append({})
        shards[-1][name] = kinds[name]
    return shards


def _cosines(matrices_SS: Tensor) -> tuple[float, ...]:
    """Of each model with the start, from dot products of the start and the task vectors; 1 where one of the two is
    zero. Of matrices alone, since vectors begin alike (all ones, all zeros) in every start."""
    own, across_M, lengths_M = matrices_SS[0, 0], matrices_SS[0, 1:], matrices_SS.diagonal()[1:]
    product_M = (own * (own + 2 * across_M + lengths_M)).clamp(min=0.0).sqrt()
    return tuple(torch.where(product_M > 0, (own + across_M) / product_M, 1.0).tolist())


def _bytes(kinds: Mapping[str, Kind]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds.values())


def _require_eta(eta: float) -> None:
    if not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta: got {eta}, wanted 0 (the start) to 1 (what was merged)")


def require_etas(etas: Sequence[float]) -> None:
    """``ConfigError`` for one that is out of range, or there twice."""
    for eta in etas:
        _require_eta(eta)
    if twice := [eta for at, eta in enumerate(etas) if eta in etas[:at]]:
        raise ConfigError(f"eta: got {twice[0]:g} more than once, wanted each once; leave one out, or mend it")


def _card(report: MergeReport, into: Path, *, kinds: Mapping[str, Kind], words: str) -> str:
    facts = MergeFacts(
        name=into.resolve().name, parameters=sum(math.prod(shape) for _, shape in kinds.values()),
        start=(report.start.folder, report.start.weights_sha256),
        models=tuple((model.folder, model.weights_sha256) for model in report.models), method=report.method,
        weights=report.weights, eta=report.eta, angles=angle_words(report.angles),
        edges=sum(bool(group.edges) for group in report.groups),
        groups=len(report.groups), words=words,
    )  # fmt: skip
    return render_merge(facts)

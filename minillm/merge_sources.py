"""Model folders whose weights are to be merged: compared with their start, and read piece by piece.

Legend: R rank of an adapter, I inputs of a layer, O outputs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from minillm.adapter_files import require_base
from minillm.adapters import Adapter, read_adapter, require_fit
from minillm.cards import Card
from minillm.errors import CheckpointError, ModelError
from minillm.loading import ModelFacts, fingerprint, inspect
from minillm.manifests import parsed
from minillm.meta_models import meta_model
from minillm.model_files import BOTTLENECK_RECORD, LORA_RECORD, adapter_record, few
from minillm.rows import counted
from minillm.tensor_files import CODES, Kind, open_tensors
from minillm.vocabulary import identity, real_ids
from minillm.weight_merging import WIDE, task_vector

PIECE = 1 << 20
"""Elements of a tensor that are read, merged and written at a time."""
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_FREE = {"transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "bos_token_id", "eos_token_id",
         "pad_token_id", "vocab_size"}  # fmt: skip
"""Fields of a configuration that are compared elsewhere, or not part of what weights mean."""
Rows = Callable[[int, int], Tensor]
"""From a first row to one before a last: those of an open tensor, along its first dimension."""


def pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last row (not included) of a tensor's pieces, in order; a number alone is one row."""
    rows = shape[0] if shape else 1
    at_once = max(1, PIECE // max(1, math.prod(shape[1:])))
    for begin in range(0, rows, at_once):
        yield begin, min(begin + at_once, rows)


class Names:
    """What an architecture calls its weights: one name where several are tied, and the prefix that some files leave
    out."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.model = meta_model(config)
        self.model.tie_weights()
        first: dict[int, str] = {}
        self.known = {name: name for name in self.model.state_dict()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self.known[name] = first.setdefault(id(parameter), name)
        self._prefix = f"{self.model.base_model_prefix}."

    def of(self, stored: str) -> str:
        """The weight's name in the model; a name that it does not know, as it is."""
        return self.known.get(stored) or self.known.get(self._prefix + stored) or stored


class Weights:
    """The tensors in a model's folder, by their names in the model."""

    def __init__(self, folder: Path, names: Names) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, str]] = {}
        self.kinds: dict[str, Kind] = {}
        twice: list[tuple[str, tuple[Path, str], Kind]] = []
        for file in _files(folder):
            with _told(), open_tensors(file) as tensors:
                for stored in sorted(tensors.names):
                    name = names.of(stored)
                    code = tensors.dtype(stored)
                    if code not in _DTYPES:
                        raise ModelError(
                            f"{file}: {few([stored])} is stored as {few([code])}, which is not merged; wanted "
                            f"{', '.join(sorted(_DTYPES))}.\n  store the model in one of these (dtype=torch.bfloat16)"
                        )
                    place, kind = (file, stored), (_DTYPES[code], tensors.shape(stored))
                    if name in self._places:
                        twice.append((name, place, kind))
                    else:
                        self._places[name], self.kinds[name] = place, kind
        for name, place, kind in twice:
            self._require_one(name, place, kind)

    def _require_one(self, name: str, place: tuple[Path, str], kind: Kind) -> None:
        """Tied weights that stand in the files by two names are one, or nobody knows which of them is meant."""
        with self.open(name) as rows, self._at(place) as again:
            same = kind == self.kinds[name] and all(
                torch.equal(rows(begin, end), again(begin, end)) for begin, end in pieces(kind[1])
            )
        if not same:
            raise ModelError(
                f"{self.folder}: {few([place[1]])} and {few([self._places[name][1]])} are tied by config.json, and "
                "differ.\n  set tie_word_embeddings to false in config.json if the model has two of its own"
            )

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Rows]:
        """A tensor for the time of the block: what was read of its file leaves memory with it."""
        with self._at(self._places[name]) as rows:
            yield rows

    @staticmethod
    @contextlib.contextmanager
    def _at(place: tuple[Path, str]) -> Iterator[Rows]:
        file, stored = place
        with _told(), open_tensors(file) as tensors:
            yield lambda begin, end: tensors.rows(stored, begin, end)


class Trained(Protocol):
    """A model to be merged: what it adds to the start."""

    folder: Path

    def open(self, name: str) -> contextlib.AbstractContextManager[Callable[[int, int, Tensor], Tensor]]:
        """A tensor for the time of the block: from rows and what the start has there to their task vector, in ``WIDE``.
        """  # fmt: skip


class WholeModel:
    """A folder with all weights."""

    def __init__(self, folder: Path, facts: ModelFacts, names: Names) -> None:
        self.folder, self.facts = folder, facts
        self.weights = Weights(folder, names)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Callable[[int, int, Tensor], Tensor]]:
        """See ``Trained``."""
        with self.weights.open(name) as rows:
            yield lambda begin, end, start: task_vector(start, rows(begin, end))


class AdapterOnly:
    """A folder with a LoRA adapter that was trained on the start: scaling * B A, whatever its two factors are."""

    def __init__(self, folder: Path, start: Path, names: Names) -> None:
        self.folder = folder
        adapter = read_adapter(folder)
        require_base(adapter, str(start), weights=lambda: fingerprint(_card(start)))
        require_fit(adapter, names.model, name=str(start))
        self._adapter: Adapter = adapter
        self._layers = {names.of(f"{layer}.weight"): layer for layer in adapter.pairs}
        modules: Mapping[str, nn.Module] = dict(names.model.named_modules())
        self._turned = {layer for layer in adapter.pairs if isinstance(modules[layer], Conv1D)}

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Callable[[int, int, Tensor], Tensor]]:
        """See ``Trained``."""
        layer = self._layers.get(name)
        if layer is None:
            yield lambda begin, end, start: torch.zeros(start.shape, dtype=WIDE)
            return
        a_RI, b_OR = (half.to(WIDE) for half in self._adapter.pairs[layer])
        first, second = (a_RI.T, b_OR.T) if layer in self._turned else (b_OR, a_RI)
        yield lambda begin, end, start: (first[begin:end] @ second) * self._adapter.scaling


def opened(start: Path, models: list[Path]) -> tuple[WholeModel, list[Trained], list[str]]:
    """The start and the models, and notes of what is left out of them.

    ``ModelError`` where a folder cannot be read safely, or where the models are not of the start's architecture,
    tokenizer, and names, shapes and types of weights. The start's matrices may have rows beyond the tokenizer's ids,
    which published students have not: those are left out of it. And its floating-point type may be another.
    """
    for folder in (start, *models):
        _require_folder(folder, adapters=folder is not start)
    facts = inspect(_card(start))
    names = Names(facts.config)
    whole = WholeModel(start, facts, names)
    trained: list[Trained] = []
    for folder in models:
        if (record := adapter_record(folder)) and not (folder / "config.json").is_file():
            if record == BOTTLENECK_RECORD:
                raise ModelError(
                    f"{folder}: holds a bottleneck adapter ({record}), which makes a model wider than {start}.\n"
                    "  widths that were trained apart do not add up; merge students that learnt in all weights, or LoRA"
                )
            trained.append(AdapterOnly(folder, start, names))
            continue
        own = inspect(_card(folder))
        _require_architecture(whole, own, folder)
        if identity(own.tokenizer) != identity(facts.tokenizer):
            raise ModelError(
                f"{folder}: its tokenizer is not that of {start}: other tokens, ends, or other ways to split text.\n"
                "  only models that share a tokenizer can be merged; name the model that this one was trained from"
            )
        trained.append(WholeModel(folder, own, names))
    lead = next((model for model in trained if isinstance(model, WholeModel)), whole)
    notes = _left_out([whole, *(model for model in trained if isinstance(model, WholeModel))], names)
    for model in trained:
        if isinstance(model, WholeModel):
            _require_same_kinds(lead, model)
    _require_start(lead, whole)
    return whole, trained, notes


def lead_of(start: WholeModel, trained: list[Trained]) -> WholeModel:
    """Whose shapes, types and files beside the weights the merged model has: the first whole one's."""
    return next((model for model in trained if isinstance(model, WholeModel)), start)


def _require_folder(folder: Path, *, adapters: bool) -> None:
    """``ModelError`` unless a model lies here, or where ``adapters`` may lie there, one: nothing else is read."""
    wanted = f"config.json{f' or {LORA_RECORD}' if adapters else ''}"
    if (folder / "config.json").is_file() or (adapters and adapter_record(folder)):
        return
    student = folder / "student"
    hint = f"; did you mean {student}?" if (student / "config.json").is_file() else ""
    raise ModelError(
        f"{folder}: {f'no {wanted} in it' if folder.is_dir() else 'there is no such folder'}; looked for "
        f"{folder.absolute()} with {wanted}{hint}\n"
        "  merging takes folders alone: a student that a run wrote (runs/NAME/student), or any that transformers' "
        "save_pretrained wrote; of a card or a name on the hub write one first"
    )


def _card(folder: Path) -> Card:
    return Card(name=folder.resolve().name, model=str(folder))


def _files(folder: Path) -> list[Path]:
    """Those that transformers reads a model from; ``inspect`` has looked at them."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} in it.\n  write it again with transformers' save_pretrained"
        )
    parts = parsed((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / part for part in dict.fromkeys(map(str, parts))]


def _require_architecture(start: WholeModel, own: ModelFacts, folder: Path) -> None:
    one, other = start.facts.config.to_dict(), own.config.to_dict()
    fields = sorted(name for name in {*one, *other} - _FREE if not name.startswith("_") and "drop" not in name)
    fields.insert(0, "model_type")  # which says more than any size
    differing = [name for name in fields if one.get(name) != other.get(name)]
    rows, wanted = int(other["vocab_size"]), int(one["vocab_size"])
    if rows != wanted and not (rows < wanted and rows == real_ids(own.tokenizer)):
        differing.append("vocab_size")
    if differing:
        name, others = differing[0], counted(len(differing) - 1, "other difference")
        more = f" (and {others})" if len(differing) > 1 else ""
        raise ModelError(
            f"{folder}: {name} is {other.get(name)!r:.60}, and that of {start.folder} is {one.get(name)!r:.60}"
            f"{more}.\n"
            "  only models of one architecture can be merged; name the model that this one was trained from"
        )


def _left_out(whole: list[WholeModel], names: Names) -> list[str]:
    """Takes out what the architecture has no use for, unless all models have it: loading would leave it out, too."""
    notes = []
    for model in whole:
        kinds = model.weights.kinds
        spare = [
            name for name in kinds
            if name not in names.known and not all(name in other.weights.kinds for other in whole)
        ]  # fmt: skip
        if spare:
            notes.append(
                f"{model.folder}: left out {counted(len(spare), 'tensor')} that the model does not use: {few(spare)}"
            )
        model.weights.kinds = {name: kind for name, kind in kinds.items() if name not in spare}
    return notes


def _require_same_kinds(lead: WholeModel, model: WholeModel) -> None:
    here, there = lead.weights.kinds, model.weights.kinds
    if differing := [name for name in {*here, *there} if here.get(name) != there.get(name)]:
        raise _other_kind(lead, model, min(differing))


def _require_start(lead: WholeModel, start: WholeModel) -> None:
    """The start may be longer where rows are tokens, and of another floating-point type."""
    here, there = lead.weights.kinds, start.weights.kinds
    rows, start_rows = (int(model.facts.config.vocab_size) for model in (lead, start))

    def fits(name: str) -> bool:
        if name not in here or name not in there:
            return False
        (dtype, shape), (start_dtype, start_shape) = here[name], there[name]
        if rows < start_rows and start_shape[:1] == (start_rows,):
            start_shape = (rows, *start_shape[1:])
        numbers = dtype.is_floating_point and start_dtype.is_floating_point
        return shape == start_shape and (numbers or dtype == start_dtype)

    if misfits := [name for name in {*here, *there} if not fits(name)]:
        raise _other_kind(start, lead, min(misfits))


def _other_kind(one: WholeModel, other: WholeModel, name: str) -> ModelError:
    kinds = [model.weights.kinds.get(name) for model in (other, one)]
    said = ["missing" if kind is None else f"{kind[0]} {list(kind[1])}".removeprefix("torch.") for kind in kinds]
    return ModelError(
        f"{other.folder}: {few([name])} is {said[0]}, and that of {one.folder} is {said[1]}.\n"
        "  only models with the same weights in the same types can be merged; give them one dtype, or name the model "
        "that this one was trained from"
    )


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A file that cannot be read is a model's here, and no checkpoint's."""
    try:
        yield
    except CheckpointError as error:
        raise ModelError(f"{error}\n  fetch or write it again") from error

"""What the folders of all kinds of adapters have in common, and the model that one was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.cards import name_only
from minillm.errors import ModelError
from minillm.manifests import parsed
from minillm.model_files import few, in_short

BASE = "base.json"
"""Names the weights that an adapter of ours was trained on; of a further name in its own record peft would warn."""
FOLDER = "adapter"
"""Where a student's folder has its adapter."""


class KeptAdapter(Protocol):
    """An adapter by itself, as a folder holds it."""

    @property
    def base(self) -> str:
        """The model that it was trained on, as its record calls it; "" where it does not say."""

    @property
    def base_weights(self) -> str:
        """Fingerprint (``loading.fingerprint``) of that model; "" where nobody wrote it down."""

    @property
    def changes(self) -> int:
        """How many layers of a model it changes."""

    @property
    def source(self) -> Path:
        """Folder that it was read from."""

    @property
    def record_file(self) -> str:
        """The file of its folder that names the base."""

    def write(self, folder: Path) -> None:
        """Makes its folder."""

    def merged_config(self, config: PreTrainedConfig, *, name: str) -> PreTrainedConfig:
        """The configuration of the model ``name`` with the adapter merged into it; ``ModelError`` where it is of
        another model."""

    def merge_into(self, model: PreTrainedModel, *, name: str) -> None:
        """Merges it into the weights of the model ``name``, which is then of ``merged_config``; ``ModelError`` where
        it is of another model."""


def require_base(adapter: KeptAdapter, name: str, *, weights: Callable[[], str]) -> None:
    """``ModelError`` unless an adapter was trained on the model of this name, as far as its folder says.

    ``weights`` is the model's fingerprint, looked up where the folder has one of its own to compare: two of folders, or
    the commits of two hub models. Otherwise two folders that are there must be one; of anything else the last part of
    the name must be the same, since folders are moved and hubs have owners.
    """
    same = _same_weights(adapter.base_weights, weights()) if adapter.base_weights else None
    if same is False:
        raise ModelError(
            f"{adapter.source}: was trained on other weights ({adapter.base!r}) than those of {name!r}: {BASE} says so."
            f"\n  name the model that it was trained on; if only texts beside the weights were changed, remove {BASE}"
        )
    if same is None and adapter.base and not _same_name(adapter.base, name):
        raise ModelError(
            f"{adapter.source}: was trained on {adapter.base!r}, and is to be put on {name!r}.\n"
            f"  name that model; if the two are the same, say so in {adapter.record_file} (base_model_name_or_path)"
        )


def _same_weights(one: str, other: str) -> bool | None:
    """Whether two fingerprints are of the same weights; None where one is of a folder and the other of a hub model, or
    says no commit."""
    kinds = ["@" in each for each in (one, other)]
    if kinds[0] != kinds[1] or name_only(one) or name_only(other):
        return None
    return one.rpartition("@")[2] == other.rpartition("@")[2]


def _same_name(one: str, other: str) -> bool:
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).samefile(other)
    return Path(one).name.lower() == Path(other).name.lower()


def base_weights(folder: Path) -> str:
    """Fingerprint of the weights that an adapter was trained on; "" where nobody wrote it down."""
    if not (folder / BASE).exists():
        return ""
    found = json_object(folder / BASE)
    if found.keys() != {"weights"} or not isinstance(found["weights"], str):
        raise ModelError(
            f"{folder / BASE}: wanted one entry, the text 'weights'\n  copy the adapter again, or remove this file"
        )
    return found["weights"]


def write_base(folder: Path, weights: str) -> None:
    """Says beside an adapter which weights it was trained on, where that is known."""
    if weights:
        (folder / BASE).write_text(json.dumps({"weights": weights}) + "\n", encoding="utf-8")


def json_object(file: Path) -> dict[str, Any]:
    """A JSON object in an adapter's folder; ``ModelError`` for anything else."""
    try:
        found = parsed(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file}: cannot be read as JSON: {in_short(error)}\n  wanted the whole folder of an adapter"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: holds a {type(found).__name__}, wanted a JSON object")
    return found


def tensors_of(folder: Path, name: str, *, convert: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file of weights. ``ModelError`` where it is not there, and says how to ``convert``
    what is, or not whole."""
    file = folder / name
    if not file.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only pickled weights ({few(pickles)})" if pickles else "no weights"
        raise ModelError(f"{folder}: {found}; wanted {name}, because a pickle runs code when it is read.\n  {convert}")
    try:
        with safe_open(file, framework="pt") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a whole safetensors file: {in_short(error)}\n  fetch or write it again"
        ) from error

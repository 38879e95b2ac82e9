"""Cards: seven lines of YAML that say which model a teacher or student is, and how it is built or loaded.

A new pair of models is two cards and no code. Names are looked up in the working folder, then in the installed package,
then in the source tree beside it.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import re
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, field_validator, model_validator

from minillm.errors import ConfigError, UnsupportedCombination, did_you_mean
from minillm.figures import Figures, Training
from minillm.model_files import adapter_record
from minillm.settings import Count, Settings, Text, Whole, headed
from minillm.stage_base import LONGEST_NAME
from minillm.yaml_reader import MAX_BYTES, read_yaml

Kind = Literal["teachers", "students"]
Folder = Literal["teachers", "students", "ds_configs", "recipes"]
FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
SHARDED = ("zero3", "offload")
"""Placements that cut a teacher's weights over the ranks and gather them while a forward needs them."""
_CARD_FOLDERS: tuple[Kind, ...] = ("teachers", "students")
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
UNKNOWN_REVISION = "unknown revision"
"""Stands in a fingerprint (``loading.fingerprint``) for the commit of a hub model that cannot be known."""
_HUB_NAME = re.compile(rf"{_PART}/{_PART}")


def _scalar(value: object) -> object:
    if not isinstance(value, int | float | bool | str):
        raise ConfigError(f"got {type(value).__name__}, wanted a number, true, false or text")
    return value


class BuildSpec(Settings):
    """A model made from nothing: random weights in a published architecture."""

    architecture: Literal["llama", "gpt2", "opt", "qwen2"]
    """Which transformers configuration class is filled."""
    tokenizer: Text
    """'world' for the embedded world's, or a folder or hub name to load one from."""
    vocabulary: Count | None = None
    """Rows of the embedding; those beyond the tokenizer's ids are padding. As many as there are ids where not given."""
    config: dict[str, Annotated[int | float | bool | str, PlainValidator(_scalar)]] = Field(default_factory=dict)
    """Fields of that class. Vocabulary size and special ids come from the tokenizer and may not stand here."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        doubled = [key for key in FROM_TOKENIZER if key in self.config]
        if doubled:
            raise ConfigError(f"config.{doubled[0]}: comes from the tokenizer; leave it out")
        return self


class Card(Settings):
    """One model: loaded (``model``) or built (``build``), never both."""

    name: Text
    """How reports call it; the card's file name without ending."""
    model: Text | None = None
    """Model folder or hub name to load."""
    build: BuildSpec | None = None
    """How to build it instead."""
    revision: Text | None = None
    """Commit or tag of a hub model; without it the hub's present one, which may change."""
    adapter: Text | None = None
    """Folder of an adapter that was trained on ``model``: LoRA in peft's format, or a bottleneck of our own; merged
    into its weights as they are loaded."""
    layers: tuple[Whole, ...] | None = None
    """Keep only these layers of ``model``, by their numbers from 0, in this order; all where not given."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """What weights are loaded in; a teacher also computes in it."""
    template: Literal["plain", "alpaca", "chat"] | None = None
    """Prompt template that suits the model, where one is known."""
    placement: Literal["replicated", "zero3", "offload", "tp"] = "replicated"
    """Where a teacher's weights live: whole on every rank, cut over the ranks, or cut and in host memory (``tp`` is
    refused, with what to use instead). Teachers only."""
    quantise: Literal["int8"] | None = None
    """Keeps the matrices of a teacher's layers in 8 bits (bitsandbytes, the extra ``quantised``); ``replicated`` only.
    It is another teacher than the same weights without it. Teachers only."""
    figures: Figures = Figures()
    """Sizes for planning memory before anything is downloaded; the model itself decides once it is loaded."""
    eos: Text | None = None
    """The tokenizer's end-of-sequence token; one that has another is refused."""
    pad: Text | None = None
    """Its padding token, likewise; where not given it may have one or none."""
    training: Training | None = None
    """What was published on training the model as a student; ``minillm cards NAME`` makes stages of it."""
    notes: str = ""
    """What a reader should know before choosing it."""
    licence: str = ""
    """Terms of the weights."""

    @field_validator("placement", mode="before")
    @classmethod
    def _known_placement(cls, value: object) -> object:
        """``tp`` passes, to be refused with what to use instead; nobody is told to want it."""
        wanted = ("replicated", *SHARDED)
        if value != "tp" and value not in wanted:
            near = did_you_mean(value, wanted) if isinstance(value, str) else ""
            raise ConfigError(f"got {value!r:.80}, wanted 'replicated', 'zero3' or 'offload'{near}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.model is None) == (self.build is None):
            got = "neither" if self.model is None else "both"
            raise UnsupportedCombination(f"'model' and 'build': got {got}, wanted exactly one")
        if self.build is not None and self.revision is not None:
            raise UnsupportedCombination("'revision' names a version of a hub model; a card with 'build' has none")
        for name, value in (("adapter", self.adapter), ("layers", self.layers)):
            if value is not None and self.model is None:
                raise UnsupportedCombination(f"'{name}' is of a model that is loaded; a card with 'build' has none")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ConfigError(f"layers: got {list(self.layers)}, wanted one layer or more, each once")
        if self.quantise is not None and self.placement != "replicated":
            raise UnsupportedCombination(
                f"'quantise: {self.quantise}' with placement {self.placement}: DeepSpeed cannot cut such weights; "
                "set placement: replicated, or leave quantise out"
            )
        if self.quantise is not None and not self.as_in_files:
            raise UnsupportedCombination(
                f"'quantise: {self.quantise}' with 'build', 'adapter' or 'layers': the weights shrink while they are "
                "read from their files; write the changed model into a folder, and name that"
            )
        if self.quantise is not None and self.dtype == "float64":
            raise UnsupportedCombination(
                f"'quantise: {self.quantise}' with dtype float64: its products are made in 16 bits; set dtype: bfloat16"
            )
        return self

    @property
    def as_in_files(self) -> bool:
        """Whether the weights are those that stand in files, so that they can be read straight into shards."""
        return self.build is None and self.adapter is None and self.layers is None

    def of_folder(self, folder: Path) -> Card:
        """The same card of a model that stands whole in a folder."""
        return self.model_copy(
            update={"model": str(folder), "build": None, "revision": None, "adapter": None, "layers": None}
        )

    @property
    def sharded(self) -> bool:
        """Whether a teacher with this card is cut over the ranks."""
        return self.placement in SHARDED


def load_card(name: str, *, kind: Kind) -> Card:
    """The card that a name means.

    In this order: a model folder (it has config.json); a .yaml file; a card in ``kind`` (``gpt2``, ``gpt2.yaml`` or
    ``students/gpt2``; an explicit folder wins over ``kind``); a hub name (``owner/model``). Anything else is a
    ``ConfigError`` that names the nearest card.
    """
    folder = Path(name)
    try:
        here = bool(name) and (folder / "config.json").is_file()
    except OSError as error:  # longer than any path may be, or behind a folder that may not be looked into
        raise ConfigError(f"{name[:LONGEST_NAME]!r}: cannot be looked up: {error.strerror}") from error
    if here:
        return Card(name=folder.resolve().name, model=name)
    if name.endswith((".yaml", ".yml")) and folder.is_file():
        return _read_card(folder, source=name, stem=folder.stem)
    prefix, slash, rest = name.partition("/")
    where = next((each for each in _CARD_FOLDERS if slash and prefix == each), None)
    stem = (rest if where else name).removesuffix(".yaml").removesuffix(".yml")
    found = find_file(stem, folder=where or kind, suffix=".yaml")
    if found is not None:
        return _read_card(found, source=f"{where or kind}/{stem}.yaml", stem=stem.rpartition("/")[2])
    is_file = name.endswith((".yaml", ".yml"))
    if _HUB_NAME.fullmatch(name) and where is None and not is_file and not Path(prefix).is_dir():
        return Card(name=rest, model=name)
    raise ConfigError(_unknown_card(name, stem=stem, folder=where or kind))


def may_differ(one: object, other: object) -> bool:
    """Whether two fingerprints may be of different weights: a name without a revision is no proof of the same."""
    return one != other or name_only(one)


def name_only(weights: object) -> bool:
    """Whether a fingerprint says no revision, as those of hub and built models did before they were looked up."""
    return isinstance(weights, str) and weights.endswith((f"@{UNKNOWN_REVISION}", "@None"))


def find_engine_settings(name: str) -> Traversable:
    """The DeepSpeed JSON file that a name in ds_configs/ (``zero2``, ``ds_configs/zero2.json``) or a path means."""
    if name.endswith(".json") and Path(name).is_file():
        return Path(name)
    stem = name.removeprefix("ds_configs/").removesuffix(".json")
    found = find_file(stem, folder="ds_configs", suffix=".json")
    if found is None:
        names = known_names("ds_configs", suffix=".json")
        near = did_you_mean(stem, names)
        raise ConfigError(
            f"engine settings {name!r}: no such .json file and no such name in ds_configs/{near}\n"
            f"  known: {', '.join(names)}"
        )
    return found


def find_file(name: str, *, folder: Folder, suffix: str) -> Traversable | None:
    """The file ``folder/name + suffix``: the working folder's, else the package's or source tree's, else ``None``."""
    if _NAME.fullmatch(name) is None:
        return None
    places = (root.joinpath(*f"{name}{suffix}".split("/")) for root in _roots(folder))
    return next((place for place in places if place.is_file()), None)


def known_names(folder: Folder, *, suffix: str) -> list[str]:
    """Names that ``find_file`` finds directly in a folder, sorted, each once."""
    names = {
        item.name.removesuffix(suffix)
        for root in _roots(folder)
        if root.is_dir()
        for item in root.iterdir()
        if item.name.endswith(suffix)
    }
    return sorted(names)


def _roots(folder: Folder) -> Iterator[Traversable]:
    yield Path(folder)
    # An editable install does not map the data folders; the source tree below has them.
    with contextlib.suppress(ModuleNotFoundError):
        yield importlib.resources.files(f"minillm.{folder}")
    yield Path(__file__).resolve().parent.parent / folder


def _read_card(file: Traversable, *, source: str, stem: str) -> Card:
    with file.open("rb") as stream:
        values: Any = read_yaml(stream.read(MAX_BYTES + 1), source=source)
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source}: holds {'nothing' if values is None else 'no mapping'}; wanted 'name: value' lines"
        )
    if values.setdefault("name", stem) != stem:
        raise ConfigError(
            f"{source}: name: got {values['name']!r}, wanted {stem!r} as the file is called; leave it out"
        )
    try:
        return Card(**values)
    except ConfigError as error:
        raise type(error)(headed(str(error).split("\n"), source=source)) from None


def _unknown_card(name: str, *, stem: str, folder: Kind) -> str:
    if name and (record := adapter_record(Path(name))):
        return (
            f"{name!r}: holds an adapter ({record}), and no model that it is put on\n"
            f"  name both in a card (model: BASE, adapter: {name}), or merge it: minillm merge-adapter BASE {name} "
            "--out NEW"
        )
    names = known_names(folder, suffix=".yaml")
    near = did_you_mean(stem, names) or f"; known cards: {', '.join(names) or 'none'}"
    no_card = f"no card of that name in {folder}/{near}"
    if name and Path(name).is_dir():
        return f"{name!r}: a folder without config.json, so no model, and {no_card}"
    message = f"{name!r}: no model folder, and {no_card}"
    owner, _, rest = name.partition("/")
    if "/" in rest:
        message += "\n  if an earlier run makes this folder, finish that run first"
    elif _HUB_NAME.fullmatch(name) and owner not in _CARD_FOLDERS:
        message += f"\n  if the hub is meant: the folder {owner!r} here hides it; write a card with 'model: {name}'"
    return message

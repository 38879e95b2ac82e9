"""What a file of generated text says of itself: which model wrote it, to which prompts, and that it is whole.

``FILE.jsonl.manifest.json`` stands beside ``FILE.jsonl`` and holds the SHA-256 of every byte of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from minillm.config import DecodingConfig
from minillm.errors import DataError, ManifestError
from minillm.manifests import read_record
from minillm.settings import Count, Flag, NonNegative, Seed, Settings, Text, Whole

SUFFIX = ".jsonl"
_AGAIN = "generate it again (minillm generate … --fresh)"


class Question(Settings):
    """What was asked: two files with equal questions hold the same answers, up to rounding."""

    weights: Text
    """Fingerprint of the model's weights (``loading.fingerprint``)."""
    tokenizer: Text
    """Of what its tokenizer reads (``vocabulary.identity``); tokenizers that agree have the same."""
    dtype: Text
    """What the model computed in."""
    source: Text
    """Where the prompts come from."""
    data: Text
    """SHA-256 over the prompts in use, as in a run's record (``prompts.data_hash``)."""
    template: Literal["plain", "alpaca", "chat"]
    """How a row became a prompt."""
    decoding: DecodingConfig
    """How text was drawn."""
    samples: Count
    """Responses to each prompt."""
    seed: Seed
    """Key of all random numbers."""


class Counts(Settings):
    """What became of the responses."""

    asked: Count
    """Responses that were drawn."""
    written: Whole
    """Rows in the file."""
    cut: Whole
    """Responses that reached the longest length and were stopped there."""
    empty: Whole
    """Responses that ended by themselves without a word."""
    respelt: Whole
    """Rows whose text the tokenizer reads as other ids than were drawn."""


class Manifest(Settings):
    """The record beside a file of generated text."""

    format: Literal["minillm generated text 1"] = "minillm generated text 1"
    """Which form of record this is."""
    model: Text
    """How the model was called."""
    asked: Question
    """What was asked."""
    keep_cut: Flag
    """Whether cut and empty responses are in the file."""
    counts: Counts
    """What became of the responses."""
    mean_length: NonNegative
    """Tokens of a written response, end token left out."""
    sha256: Text
    """Of the file."""
    versions: dict[str, str]
    """Packages that it was made with."""
    date: Text
    """Day on which it was made."""

    @property
    def weights(self) -> str:
        """Fingerprint of the weights that wrote the text."""
        return self.asked.weights

    @property
    def tokenizer(self) -> str:
        """Of what their tokenizer reads."""
        return self.asked.tokenizer

    @property
    def template(self) -> str:
        """How a row became a prompt."""
        return self.asked.template


def manifest_of(path: Path) -> Path:
    """Where the manifest of a file stands."""
    return path.with_name(f"{path.name}.manifest.json")


def read_generated(path: str | Path) -> Manifest:
    """The manifest of a file of generated text, which is as it was written.

    Raises ``DataError`` where there is no such file; ``ManifestError`` where it has no manifest, one that cannot be
    read, or one of other text: the file was edited, cut or mixed up.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; wanted text that 'minillm generate' wrote")
    found = read_manifest(path)
    if found is None:
        raise ManifestError(
            f"{path} has no manifest beside it ({manifest_of(path).name}), so nothing says which model wrote it.\n"
            "  keep the two together; a file from elsewhere is an ordinary prompt file, not generated text"
        )
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != found.sha256:
        raise ManifestError(
            f"{path} is not the file that its manifest was written with: SHA-256 {sha256[:12]}…, wanted "
            f"{found.sha256[:12]}….\n  it was edited, cut or mixed up; {_AGAIN}"
        )
    return found


def read_manifest(path: Path) -> Manifest | None:
    """What stands beside a file, be the file there or not; ``ManifestError`` where it cannot be read."""
    return read_record(manifest_of(path), Manifest, fault=ManifestError, again=_AGAIN)


def differences(one: Question, other: Question) -> list[str]:
    """Names of what two questions differ in."""
    return [name for name in Question.model_fields if getattr(one, name) != getattr(other, name)]


def may_stand(out: Path, *, what: str, fresh: bool, differs: Callable[[], list[str]]) -> bool:
    """Whether ``what`` stands at ``out`` and answers what is asked now, as far as its manifest says.

    ``DataError`` where something else stands there that may not be replaced: anything without a manifest, and without
    ``fresh`` what ``differs`` in anything.
    """
    if not out.exists():
        return False  # the manifest is written first: alone it means nothing
    if not (out.is_file() and manifest_of(out).is_file()):
        told = f"is there and has no manifest, so it is not {what}; nothing was touched."
        raise DataError(f"{out} {told}\n  give another --out")
    if fresh:
        return False  # whatever the manifest says: it may be broken
    if found := differs():
        remedy = "nothing was touched.\n  give another --out, or --fresh to replace it"
        raise DataError(f"{out} holds other {what} (it differs in: {', '.join(found)}); {remedy}")
    return True

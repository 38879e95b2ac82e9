"""What a teacher said about the tokens of reference responses, on disk: its likeliest ids, and one bucket for the rest.

A folder of two arrays (numpy, never pickled), a line for each row, and a manifest that says who was asked what:
``ids.npy`` [tokens, K], ``logp.npy`` [tokens, K + 1] with the log of the remaining mass last, ``rows.jsonl``,
``manifest.json``. Arrays are mapped into memory, so training keeps of them what a micro-batch needs.

Legend: N tokens of some rows, K kept ids, J = K + 1 with the bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from minillm.errors import CacheError, DataError
from minillm.kept import Kept
from minillm.manifests import parsed, read_record, sha256_of
from minillm.prompts import data_hash
from minillm.settings import Count, NonNegative, Settings, Text
from minillm.types import Example

IDS, LOGP, ROWS, MANIFEST = "ids.npy", "logp.npy", "rows.jsonl", "manifest.json"
FILES = (IDS, LOGP, ROWS, MANIFEST)
AGAIN = "make it again (minillm cache … --fresh)"
_SHOWN = 3
"""How many rows a message names."""

Precision = Literal["float16", "float32"]


class Asked(Settings):
    """What a teacher was asked: two caches with equal questions hold the same numbers, up to rounding."""

    weights: Text
    """Fingerprint of the teacher's weights (``loading.fingerprint``)."""
    tokenizer: Text
    """Of what its tokenizer reads (``vocabulary.identity``); tokenizers that agree have the same."""
    real_ids: Count
    """Ids that the distributions are over."""
    dtype: Text
    """What the teacher computed in."""
    source: Text
    """Where the rows come from."""
    data: Text
    """SHA-256 over the rows (``prompts.data_hash``)."""
    template: Literal["plain", "alpaca", "chat"]
    """How a row became a prompt."""
    temperature: Literal[1] = 1
    """Of the softmax."""
    top_k: Count
    """Ids that are kept of each token."""
    precision: Precision
    """What log-probabilities are stored in."""


class Manifest(Settings):
    """The record of a cache."""

    format: Literal["minillm teacher cache 1"] = "minillm teacher cache 1"
    """Which form of record this is."""
    teacher: Text
    """How the teacher was called."""
    asked: Asked
    """What it was asked."""
    rows: Count
    """Rows."""
    tokens: Count
    """Response tokens of all rows, closing end tokens included."""
    bytes_per_token: NonNegative
    """Of all files but this one."""
    sha256: dict[str, str]
    """Of each file but this one."""
    versions: dict[str, str]
    """Packages that it was made with."""
    date: Text
    """Day on which it was made."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands in the arrays."""

    start: int
    tokens: int
    digest: str
    """Of its prompt's and response's ids."""


@dataclass(frozen=True, slots=True)
class TeacherCache:
    """A cache that is as it was written."""

    path: Path
    manifest: Manifest
    sha256: str
    """Of the manifest, and so of all of it."""
    places: dict[str, Place]
    ids: np.ndarray[Any, Any]
    logp: np.ndarray[Any, Any]

    def __str__(self) -> str:
        asked = self.manifest.asked
        return (
            f"{self.path}: {asked.top_k:,} of {asked.real_ids:,} ids a token, as {self.manifest.teacher} gave them to "
            f"{asked.source}"
        )

    def of(self, rows: Sequence[Example], *, device: torch.device | str) -> Kept:
        """What the teacher said about the response tokens of these rows, row by row; all must be in the cache.

        Rounded log-probabilities are normalised again, so that what is learnt from is a distribution.
        """
        spans = [self.places[row.uid] for row in rows]
        k = self.manifest.asked.top_k
        ids_NK, logp_NJ = (
            np.concatenate([np.zeros((0, width), kind), *(array[at.start : at.start + at.tokens] for at in spans)])
            for array, width, kind in ((self.ids, k, np.int64), (self.logp, k + 1, np.float32))
        )
        logp = torch.from_numpy(logp_NJ.astype(np.float32)).to(device)
        return Kept(
            ids_NK=torch.from_numpy(ids_NK.astype(np.int64)).to(device), logp_NJ=logp - logp.logsumexp(1, keepdim=True)
        )

    def require(self, rows: Iterable[Example], *, source: str) -> None:
        """Raise ``CacheError`` unless each of these rows is here with the very same ids; others may be here too."""
        missing, other = [], []
        for row in rows:
            place = self.places.get(row.uid)
            if place is None:
                missing.append(row.uid)
            elif place.digest != digest(row):
                other.append(row.uid)
        for found, what in ((missing, "are not in it"), (other, "were other tokens when it was made")):
            if found:
                raise CacheError(
                    f"{self.path}: {len(found):,} rows of {source} {what} ({', '.join(map(repr, found[:_SHOWN]))}"
                    f"{', …' if len(found) > _SHOWN else ''})\n"
                    f"  it was made from {self.manifest.asked.source}; give the run the same rows, or {AGAIN}"
                )


def digest(row: Example) -> str:
    """Names a row's ids."""
    return data_hash([row])[:16]


def id_kind(real_ids: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(real_ids - 1)


def read_manifest(folder: Path) -> Manifest | None:
    """What stands in a folder; ``CacheError`` where it cannot be read, ``None`` where there is none."""
    return read_record(folder / MANIFEST, Manifest, fault=CacheError, again=AGAIN)


def read_cache(folder: str | Path) -> TeacherCache:
    """The cache in a folder, proved to be as it was written: every byte of it is read once.

    Raises ``DataError`` where there is no such folder; ``CacheError`` where a file of it is missing or another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; wanted one that 'minillm cache' wrote")
    manifest = read_manifest(folder)
    if manifest is None:
        raise CacheError(f"{folder} has no {MANIFEST}, so nothing says which teacher it is of\n  {AGAIN}")
    for name in (IDS, LOGP, ROWS):
        found = sha256_of(folder / name) if (folder / name).is_file() else "no file"
        if found != manifest.sha256.get(name):
            raise CacheError(
                f"{folder / name} is not the file that the manifest was written with: SHA-256 {found[:12]}, wanted "
                f"{manifest.sha256.get(name, 'none')[:12]}\n  it was edited, cut or mixed up; {AGAIN}"
            )
    # The hashes say that nothing was changed since, and not who wrote it.
    try:
        places = _places(folder / ROWS)
        ids, logp = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (IDS, LOGP))
        _require_fitting(manifest, places, ids, logp)
    except Exception as error:  # numpy's reader of headers alone has a dozen kinds
        raise CacheError(f"{folder}: not what 'minillm cache' writes ({error})\n  {AGAIN}") from error
    return TeacherCache(folder, manifest, sha256_of(folder / MANIFEST), places, ids, logp)


def _places(file: Path) -> dict[str, Place]:
    places = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = parsed(line)
        places[row["uid"]] = Place(row["start"], row["tokens"], row["ids"])
    return places


def _require_fitting(
    manifest: Manifest, places: dict[str, Place], ids: np.ndarray[Any, Any], logp: np.ndarray[Any, Any]
) -> None:
    """Raise ``ValueError`` unless rows and arrays are those of the manifest: a slice beyond an array would be short
    without a word, and an id beyond the vocabulary the end of a GPU's program."""
    tokens, k, real_ids = manifest.tokens, manifest.asked.top_k, manifest.asked.real_ids
    for array, kind, width in ((ids, "u", k), (logp, "f", k + 1)):
        if array.dtype.kind != kind or array.shape != (tokens, width):
            raise ValueError(f"an array of {array.dtype} {array.shape}, wanted {(tokens, width)}")
    if len(places) != manifest.rows:
        raise ValueError(f"{len(places):,} rows, wanted {manifest.rows:,}")
    for uid, at in places.items():
        if not (type(at.start) is type(at.tokens) is int and at.start >= 0 < at.tokens <= tokens - at.start):
            raise ValueError(f"row {uid!r} at {at.start!r} with {at.tokens!r} tokens, and there are {tokens:,}")
    if int(ids.max()) >= real_ids:
        raise ValueError(f"id {int(ids.max()):,} of {real_ids:,}")


def differences(one: Asked, other: Asked) -> list[str]:
    """Names of what two questions differ in."""
    return [name for name in Asked.model_fields if getattr(one, name) != getattr(other, name)]

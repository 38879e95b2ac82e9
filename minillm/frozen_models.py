"""Frozen models that a stage of pairs asks (its reference, the run's start, a teacher), and names of what they say."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.cards import Card
from minillm.config import RunConfig
from minillm.engine_settings import read_engine_settings, zero_stage
from minillm.errors import CacheError
from minillm.loading import ModelFacts, fingerprint, load
from minillm.pairs import Pair
from minillm.ranks import Ranks
from minillm.settings import Count, Settings, Text
from minillm.teacher_engine import Teacher
from minillm.types import PreferencePair
from minillm.vocabulary import identity

Say = Callable[[str], None]
AGAIN = "put back the file as the run left it, or start over with --fresh"
Logps = tuple[float, float]
"""Of a pair's chosen and rejected response, in nats, summed over their tokens, EOS included."""


class Version(Settings):
    """Whose numbers they are, and of what: log-probabilities with equal versions are equal."""

    weights: Text
    """Fingerprint of the model's weights (``loading.fingerprint``)."""
    tokenizer: Text
    """Of what its tokenizer reads (``vocabulary.identity``)."""
    real_ids: Count
    """Ids that the distributions are over."""
    dtype: Text
    """What the model computes in."""
    pairs: Text
    """SHA-256 over the ids of all prompts and responses, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A model that is asked about responses and never trained, and how it is opened."""

    what: str
    """"reference" or "teacher": names its file."""
    weights: str
    dtype: str
    open: Callable[[], contextlib.AbstractContextManager[Teacher]]


def reference_of(config: RunConfig, card: Card, facts: ModelFacts, *, pair: Pair, ranks: Ranks) -> Frozen:
    """The frozen model of a card as the student computes: sharded where the student is."""
    bf16 = config.engine.precision == "bf16"
    sharded = zero_stage(read_engine_settings(config.engine.student)) == 3 and card.as_in_files
    dtype = torch.bfloat16 if bf16 else torch.float32

    @contextlib.contextmanager
    def opened() -> Iterator[Teacher]:
        model = Teacher(
            lambda: load(card, facts, seed=config.seed, dtype=dtype),
            ranks=ranks,
            placement="zero3" if sharded else "replicated",
            precision=config.engine.precision,
            real_ids=pair.real_ids,
        )
        try:
            yield model
        finally:
            model.close()

    weights = ranks.of_first(lambda: fingerprint(card, seed=config.seed))
    return Frozen(what="reference", weights=weights, dtype=str(dtype).removeprefix("torch."), open=opened)


@contextlib.contextmanager
def as_it_is(model: Teacher) -> Iterator[Teacher]:
    """A model that somebody else opened, and closes."""
    yield model


def version_of(model: Frozen, pairs: Sequence[PreferencePair], *, pair: Pair) -> Version:
    """Names what a model says of these pairs."""
    return Version(
        weights=model.weights, tokenizer=identity(pair.tokenizer), real_ids=pair.real_ids, dtype=model.dtype,
        pairs=pairs_sha256(pairs),
    )  # fmt: skip


def require_version(found: Version, wanted: Version, *, file: Path, what: str, again: str) -> None:
    """Raise ``CacheError`` where what stands in a file is of another version; the message names all that differs."""
    before, now = found.model_dump(), wanted.model_dump()
    other = [f"{name} {before[name]}, wanted {now[name]}" for name in now if before[name] != now[name]]
    if other:
        if before["dtype"] != now["dtype"] and len(other) == 1:
            again = f"engine.precision was another when they were made; set it back, or {again}"
        raise CacheError(f"{file}: {what} of another model or of other pairs: {'; '.join(other)}\n  {again}")


def pairs_sha256(pairs: Sequence[PreferencePair]) -> str:
    """SHA-256 over the ids of all prompts and responses, in order."""
    digest = hashlib.sha256()
    for one in pairs:
        digest.update(repr((one.prompt.uid, one.prompt.ids, one.chosen_ids, one.rejected_ids)).encode())
    return digest.hexdigest()

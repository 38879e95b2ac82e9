"""The pairs of a run in chunks from easy to hard, for stages that learn from one after another (docs/methods/sdpo.md).

A chunk is the easier the more of its pairs the run's own student, before anything is learnt, has on the side of the
chosen response: its *reward accuracy*. With the student for the reference too, DPO's reward is 0 whatever the response,
so the reward here is the log-probability alone, of the whole response or of its mean token. It is measured once, before
the first stage that learns from a chunk, and kept: the order stays that of the run's beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from minillm.config import PreferenceStage, RunConfig
from minillm.errors import CacheError, DataError, did_you_mean
from minillm.frozen_models import (
    AGAIN,
    Frozen,
    Logps,
    Say,
    Version,
    reference_of,
    require_version,
    version_of,
)
from minillm.manifests import read_record
from minillm.micro_batches import Limits
from minillm.pairs import Pair
from minillm.ranks import Ranks
from minillm.rows import counted
from minillm.sequence_logps import ids_of, pair_logps
from minillm.settings import Count, Settings, Share, Text
from minillm.store import write_text
from minillm.types import PreferencePair

BY_SOURCE = "source"
CHANCE = 0.5
"""What a tie counts."""
_SHOWN = 3
"""How many pairs a message names."""

Chunks = Mapping[str, Sequence[PreferencePair]]
"""Pairs by the name of their chunk."""


class Measured(Settings):
    """One chunk."""

    name: str
    """Of the source or the field's value; "" for a single source."""
    pairs: Count
    """How many it has."""
    accuracy: Share
    """Share of pairs whose chosen response has the higher score, a tie counting half."""


class OrderVersion(Version):
    """What an order of chunks is of."""

    by: Text
    """As in ``data.chunks``."""
    score: Literal["sum", "mean"]
    """As in ``data.chunks``."""


class Order(Settings):
    """The chunks of a run, as they stand in its folder."""

    format: Literal["minillm chunks 1"] = "minillm chunks 1"
    """Which form of record this is."""
    version: OrderVersion
    """What they were measured with."""
    chunks: tuple[Measured, ...]
    """The easiest first: no accuracy is above the one before it, and equal ones stand by name."""


def chunks_of(pairs: Sequence[PreferencePair], by: str) -> dict[str, list[PreferencePair]]:
    """Pairs by source, or by a text field of their rows; chunks in the order of their names, pairs in their own.

    Raises ``DataError`` where a pair lacks the field.
    """
    if by != BY_SOURCE and (bare := [pair for pair in pairs if not pair.prompt.extra.get(by)]):
        fields = sorted({name for pair in pairs for name in pair.prompt.extra})
        shown = ", ".join(repr(pair.prompt.uid) for pair in bare[:_SHOWN])
        raise DataError(
            f"data.chunks.by {by!r}: {len(bare):,} of {counted(len(pairs), 'pair')} without a field of this name "
            f"({shown}{', …' if len(bare) > _SHOWN else ''}){did_you_mean(by, fields)}\n"
            f"  wanted '{BY_SOURCE}', or a text field that every row has; there are: {', '.join(fields) or 'none'}"
        )
    found: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        found.setdefault(pair.source if by == BY_SOURCE else pair.prompt.extra[by], []).append(pair)
    return dict(sorted(found.items()))


def in_order(chunks: Chunks, logps: Mapping[str, Sequence[Logps]], *, score: Literal["sum", "mean"]) -> list[Measured]:
    """The chunks by what a model makes of both responses of each of their pairs, the easiest first."""
    measured = []
    for name, pairs in chunks.items():
        points = 0.0
        for pair, (of_chosen, of_rejected) in zip(pairs, logps[name], strict=True):
            tokens = (len(pair.chosen_ids), len(pair.rejected_ids)) if score == "mean" else (1, 1)
            chosen, rejected = of_chosen / tokens[0], of_rejected / tokens[1]
            points += CHANCE if chosen == rejected else float(chosen > rejected)
        measured.append(Measured(name=name, pairs=len(pairs), accuracy=points / len(pairs)))
    return sorted(measured, key=lambda each: (-each.accuracy, each.name))


def ordered_chunks(
    config: RunConfig,
    pairs: Sequence[PreferencePair],
    *,
    pair: Pair,
    ranks: Ranks,
    file: Path,
    limits: Limits,
    say: Say,
) -> tuple[Order, Chunks]:
    """The run's chunks from easy to hard: as ``file`` says, or measured and written there. To be called on all ranks.

    ``CacheError`` where the file is one of another student, other pairs or another score, or cannot be read.
    """
    asked = config.data.chunks
    assert asked is not None, "the configuration refuses a stage with a chunk where nothing says what that is"
    chunks = chunks_of(pairs, asked.by)
    model = reference_of(config, pair.student_card, pair.student, pair=pair, ranks=ranks)
    own = version_of(model, pairs, pair=pair).model_dump()
    version = OrderVersion(**own, **asked.model_dump())
    order = ranks.of_first(lambda: _read(file, version))
    if order is None:
        logps = _logps(model, chunks, pair=pair, ranks=ranks, limits=limits)
        order = Order(version=version, chunks=tuple(in_order(chunks, logps, score=asked.score)))
        written = order.model_dump_json(indent=1) + "\n"
        ranks.of_first(lambda: write_text(file, written))
    else:
        say(f"chunks of data.preferences: in the order of {file}")
    for line in _table(order, config):
        say(line)
    return order, {each.name: chunks[each.name] for each in order.chunks}


def chunk_words(config: RunConfig, pairs: Sequence[PreferencePair]) -> list[str]:
    """What to say before a run where its stages do not learn from each chunk just once."""
    asked, stages = config.data.chunks, [each for each in config.trained if isinstance(each, PreferenceStage)]
    if asked is None:
        return []
    if all(stage.chunk is None for stage in stages):
        return ["data.chunks is not read; no stage has a chunk"]
    whole = [stage.name for stage in stages if stage.chunk is None]
    words = []
    count = len(chunks_of(pairs, asked.by))
    for number in range(1, count + 1):
        names = [stage.name for stage in stages if stage.chunk == number]
        if not names and not whole:
            words.append(f"note: pairs of chunk {number} of {count} are learnt from by no stage")
        if len(names) > 1:
            words.append(f"note: pairs of chunk {number} of {count} are learnt from by stages {', '.join(names)}")
    return words


def _read(file: Path, version: OrderVersion) -> Order | None:
    order = read_record(file, Order, fault=CacheError, again=AGAIN)
    if order is not None:
        require_version(order.version, version, file=file, what="chunks", again=AGAIN)
    return order


def _logps(model: Frozen, chunks: Chunks, *, pair: Pair, ranks: Ranks, limits: Limits) -> dict[str, Sequence[Logps]]:
    """What a model makes of both responses of each pair, by chunk."""
    pairs = [one for own in chunks.values() for one in own]
    with model.open() as opened:
        both = iter(pair_logps(map(ids_of, pairs), model=opened, ids=pair.ids, ranks=ranks, limits=limits))
    return {name: [next(both) for _ in own] for name, own in chunks.items()}


def _table(order: Order, config: RunConfig) -> list[str]:
    """The chunks as lines, with the stages that learn from each."""
    of = {"sum": "log-probability", "mean": "mean log-probability of a token"}[order.version.score]
    names = [each.name or "the one source" for each in order.chunks]
    wide = max(map(len, names))
    lines = [
        f"chunks by {order.version.by}, the easiest first (share of pairs whose chosen response has the higher {of} "
        "under the run's own student)"
    ]
    for number, (name, each) in enumerate(zip(names, order.chunks, strict=True), start=1):
        stages = [s.name for s in config.trained if isinstance(s, PreferenceStage) and s.chunk == number]
        taken = f"stage {', '.join(stages)}" if stages else "no stage"
        lines.append(f"  {number}  {name:<{wide}}  {each.accuracy:6.1%} of {counted(each.pairs, 'pair')}: {taken}")
    return lines

"""Rejected responses drawn anew: a stage's start answers each prompt, and its answer takes the rejected one's place.

An answer that was cut, is empty or is the chosen one leaves its pair as it was. What was drawn is kept in the stage's
folder, under the name of the weights, pairs, decoding and random numbers that it follows from, so that a stage that
goes on learns from the same pairs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from minillm.config import DecodingConfig, RunConfig
from minillm.drawing import Drawing, Drawn
from minillm.errors import CacheError
from minillm.frozen_models import AGAIN, Frozen, Say, Version, require_version, version_of
from minillm.manifests import read_record
from minillm.micro_batches import Limits
from minillm.pairs import Pair
from minillm.preflight import decoding_record
from minillm.progress import Progress
from minillm.ranks import Ranks
from minillm.rows import counted
from minillm.settings import Seed, Settings, Text, Whole
from minillm.store import make_folder, write_text
from minillm.types import PreferencePair, Stop

Fate = Literal["fresh", "cut", "empty", "equal"]
FILE = "refreshed.json"
_KEPT: dict[Fate, str] = {
    "cut": "cut at decoding.max_new_tokens",
    "empty": "empty",
    "equal": "the same as the chosen one",
}
"""Fates that leave a pair as it was, in words."""


class Answer(Settings):
    """What the stage's start answered to the prompt of one pair."""

    uid: Text
    """The pair's."""
    fate: Fate
    """'fresh': it is the rejected response now; otherwise why it is not."""
    text: str = ""
    """Of a fresh one: decoded, without special tokens."""
    ids: tuple[Whole, ...] = ()
    """Of a fresh one: as drawn, with the closing end token."""


class DrawnVersion(Version):
    """What answers follow from."""

    decoding: DecodingConfig
    """How they were drawn."""
    seed: Seed
    """Key of all random numbers."""
    stage: Text
    """Name of the stage, which is part of them."""


class Refreshed(Settings):
    """The answers to a stage's prompts, as they stand in its folder."""

    format: Literal["minillm refreshed pairs 1"] = "minillm refreshed pairs 1"
    """Which form of record this is."""
    version: DrawnVersion
    """What they were drawn with."""
    answers: tuple[Answer, ...]
    """In the pairs' order."""


def refreshed(
    config: RunConfig, stage: str, pairs: Sequence[PreferencePair], *, model: Frozen, pair: Pair, ranks: Ranks,
    folder: Path, goes_on: bool, limits: Limits, say: Say,
) -> list[PreferencePair]:  # fmt: skip
    """The stage's pairs, each with an answer of ``model`` for its rejected response, or as it was.

    None of them brings its teacher's log-probabilities any more: those of some are of another response, and all are to
    be one model's. Answers that stand in ``folder`` are taken where they follow from the same; where a stage that goes
    on finds others, or none that can be read, ``CacheError`` is raised. To be called on all ranks.
    """
    file = folder / FILE
    version = DrawnVersion(
        **version_of(model, pairs, pair=pair).model_dump(), decoding=config.decoding, seed=config.seed, stage=stage
    )
    kept = ranks.of_first(lambda: _read(file, version, goes_on=goes_on))
    if kept is None:
        if goes_on:
            say(f"stage {stage}: {file} is gone; the rejected responses are drawn again")
        answers = _answers(config, stage, pairs, model=model, pair=pair, ranks=ranks, limits=limits)
        kept = Refreshed(version=version, answers=answers)

        def write(made: Refreshed = kept) -> None:
            make_folder(folder, setting="out or name")
            write_text(file, made.model_dump_json() + "\n")

        ranks.of_first(write)
    else:
        say(f"stage {stage}: rejected responses from {file}")
    counts = Counter(answer.fate for answer in kept.answers)
    left = ", ".join(f"{counts[fate]:,} {words}" for fate, words in _KEPT.items() if counts[fate])
    say(
        f"stage {stage}: {counts['fresh']:,} of {counted(len(pairs), 'rejected response')} drawn anew from the stage's "
        f"start{f'; the others stay, since its answer is: {left}' if left else ''}"
    )
    return [_with(one, answer) for one, answer in zip(pairs, kept.answers, strict=True)]


def _with(one: PreferencePair, answer: Answer) -> PreferencePair:
    if answer.fate != "fresh":
        return dataclasses.replace(one, teacher_logps=None)
    return dataclasses.replace(one, rejected=answer.text, rejected_ids=answer.ids, teacher_logps=None)


def _answers(
    config: RunConfig, stage: str, pairs: Sequence[PreferencePair], *, model: Frozen, pair: Pair, ranks: Ranks,
    limits: Limits,
) -> tuple[Answer, ...]:  # fmt: skip
    """An answer to each pair's prompt, all of them on every rank."""
    drawing = Drawing(
        pair=pair, decoding=decoding_record(config.decoding), limits=limits, ranks=ranks, seed=config.seed, stage=stage
    )
    prompts = [one.prompt for one in pairs]
    batches = drawing.batches([(place, 0) for place in range(len(prompts))], prompts)
    bar = Progress(f"{stage}: rejected responses", total=len(batches), unit="batches", shown=ranks.first)
    mine: list[Drawn] = []
    try:
        with model.open() as opened:
            for number, batch in enumerate(batches, start=1):
                mine += drawing.draw(batch, prompts, reader=opened.reader)
                bar.advance(number, {})
    finally:
        bar.close()
    found: list[Drawn] = sorted(ranks.gather_objects(mine), key=lambda drawn: drawn.cell)
    return tuple(_answer(one, drawn, end=pair.ids.eos[0]) for one, drawn in zip(pairs, found, strict=True))


def _answer(one: PreferencePair, drawn: Drawn, *, end: int) -> Answer:
    """What becomes of it. Whichever end it drew, it is closed with the one that training closes responses with."""
    ids = (*drawn.ids, end)
    fate: Fate = "fresh"
    if drawn.stop == Stop.LENGTH:
        fate = "cut"
    elif not drawn.text.strip():
        fate = "empty"
    elif drawn.text == one.chosen or ids == one.chosen_ids:
        fate = "equal"
    if fate != "fresh":
        return Answer(uid=one.prompt.uid, fate=fate)
    return Answer(uid=one.prompt.uid, fate=fate, text=drawn.text, ids=ids)


def _read(file: Path, version: DrawnVersion, *, goes_on: bool) -> Refreshed | None:
    """What stands in ``file``; None where there is none, or where a stage that begins may write over it."""
    try:
        kept = read_record(file, Refreshed, fault=CacheError, again=AGAIN)
        if kept is not None:
            require_version(kept.version, version, file=file, what="rejected responses", again=AGAIN)
    except CacheError:
        if goes_on:
            raise
        return None
    return kept

"""What is known of a stage's pairs before it trains: how likely the reference holds each response, and the teacher.

The reference is frozen: the weights that the stage starts from. Where only its sequence log-probabilities are wanted,
they are asked for once, kept in the run's folder under the name of exactly these weights and responses, and the model
is closed. A run that goes on takes them from there; those of another reference are refused, and so is a stage that was
saved beside another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from minillm.cards import Card
from minillm.config import RunConfig
from minillm.errors import CacheError, DataError, ManifestError, UnsupportedCombination, did_you_mean
from minillm.frozen_models import (
    AGAIN,
    Frozen,
    Logps,
    Say,
    Version,
    as_it_is,
    reference_of,
    require_version,
    version_of,
)
from minillm.loading import ModelFacts, fingerprint
from minillm.manifests import read_record
from minillm.micro_batches import Limits
from minillm.pairs import Pair
from minillm.pairwise_loss import soft_target
from minillm.preference_reading import PairSplit
from minillm.preference_refresh import refreshed
from minillm.preference_stage import PreferenceStage
from minillm.ranks import Ranks
from minillm.sequence_logps import ids_of, pair_logps
from minillm.settings import Settings
from minillm.store import make_folder, write_text
from minillm.teacher_engine import Teacher
from minillm.types import Ids, PreferencePair


class Kept(Settings):
    """Log-probabilities of the responses of pairs, as they stand in the run's folder."""

    format: Literal["minillm pair log-probs 1"] = "minillm pair log-probs 1"
    """Which form of record this is."""
    version: Version
    """What they were made with."""
    chosen: tuple[float, ...]
    """In the pairs' order."""
    rejected: tuple[float, ...]
    """In the pairs' order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Pairs with what frozen models say of them."""

    pairs: Sequence[PreferencePair]
    reference: Sequence[Logps] | None
    """None where the reference is asked in every step instead."""
    soft_targets: Sequence[float] | None
    """The chance of preferring the chosen response that the teacher has; None where labels are taken as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that a stage has of its pairs when it begins."""

    target: Literal["hard", "smoothed", "soft"]
    """What the stage's ``target`` came to."""
    learnt: Known
    validation: Known | None
    live: Teacher | None
    """The reference, where it is asked in every step."""
    version: str
    """Names the reference's weights, and what they compute in; a stage that goes on must find the same."""


def pairs_of(
    stage: PreferenceStage, pairs: Sequence[PreferencePair], *, chunks: Mapping[str, Sequence[PreferencePair]]
) -> Sequence[PreferencePair]:
    """The pairs that a stage learns from, in their order: all, those of its sources, or those of its chunk; ``chunks``
    are by name, the easiest first, and not looked at where the stage has none. ``DataError`` where there is no such
    source or chunk."""
    if stage.chunk is not None:
        if stage.chunk > len(chunks):
            raise DataError(
                f"stage {stage.name}: chunk {stage.chunk}, and there are {len(chunks):,} of them: "
                f"{', '.join(map(repr, chunks))}\n  name another chunk, or set data.chunks.by"
            )
        return list(chunks.values())[stage.chunk - 1]
    if stage.sources is None:
        return pairs
    require_sources(stage, dict.fromkeys(pair.source for pair in pairs))
    return [pair for pair in pairs if pair.source in stage.sources]


def require_sources(stage: PreferenceStage, there: Collection[str]) -> None:
    """Raise ``DataError`` where the stage names a source of pairs that is not among those that are there."""
    for name in stage.sources or ():
        if name not in there:
            named = ", ".join(filter(None, there)) or "there are none"
            raise DataError(
                f"stage {stage.name}: no pair is of source {name!r}{did_you_mean(name, there)}\n"
                f"  wanted names of data.preferences: {named}"
            )


def require_same_teacher(
    stage: PreferenceStage, learnt: Sequence[PreferencePair], split: PairSplit, held_out: PairSplit | None, *,
    pair: Pair,
) -> None:  # fmt: skip
    """Raise ``ManifestError`` where the stage's soft targets would be another teacher's than the run names: its pairs,
    of ``split``, bring log-probabilities, and a manifest says whose. The same of those ``held_out``."""
    if pair.teacher_card is None or target_of(stage, learnt, None, asks=True) != "soft":
        return
    own = fingerprint(pair.teacher_card)
    # Of pairs that are drawn anew the run's teacher is asked in every case.
    asked = [] if stage.refresh_rejected else [(split, learnt)]
    for read, pairs in [*asked, *([] if held_out is None else [(held_out, held_out.pairs)])]:
        if any(one.teacher_logps is None for one in pairs):
            continue  # the run's teacher is asked about all of them
        named = {weights: name for one in pairs for weights, name in read.teachers.get(one.source, {}).items()}
        for weights, name in named.items():
            if weights != own:
                raise ManifestError(
                    f"stage {stage.name}: target 'soft' of the log-probabilities in {read.source}, which are of "
                    f"{name} with weights {weights}, and the run's teacher {pair.teacher_card.name} has {own}\n"
                    "  name that teacher, make the pairs again with this one (minillm pairs), or set target: hard"
                )


def require_targets(
    stage: PreferenceStage, learnt: Sequence[PreferencePair], held_out: Sequence[PreferencePair] | None, *, asks: bool
) -> None:
    """Raise ``UnsupportedCombination`` where pairs that are learnt or ``held_out`` want a soft target and nothing says
    what it is: they come without their teacher's log-probabilities, and the run ``asks`` no teacher."""
    if asks or target_of(stage, learnt, held_out, asks=False) != "soft":
        return
    for name, pairs in {"preferences": learnt, "preferences_validation": held_out or ()}.items():
        if bare := sum(one.teacher_logps is None for one in pairs):
            raise UnsupportedCombination(
                f"stage {stage.name}: target 'soft', but {bare:,} of {len(pairs):,} pairs of data.{name} come without "
                "their teacher's log-probabilities, and the run names no teacher; make pairs with 'minillm pairs', "
                "add 'teacher: NAME', or set target: hard"
            )


@contextlib.contextmanager
def prepared(
    config: RunConfig,
    stage: PreferenceStage,
    *,
    card: Card,
    facts: ModelFacts,
    pair: Pair,
    learnt: Sequence[PreferencePair],
    validation: Sequence[PreferencePair] | None,
    teacher: Frozen | None,
    ranks: Ranks,
    folder: Path,
    goes_on: bool,
    limits: Limits,
    say: Say,
) -> Iterator[Prepared]:
    """What a stage that starts from the weights of ``card`` knows of its pairs; its reference lives for the block.

    ``goes_on`` says that the stage was begun before: what it kept in ``folder`` then is taken, and must be of the same
    weights and responses, or ``CacheError`` is raised. A stage that begins makes it anew where it is not.
    ``teacher`` gives soft targets to pairs that do not bring them; that there is one where it is needed is to be found
    out before (``require_targets``). To be called on all ranks.
    """
    reference = reference_of(config, card, facts, pair=pair, ranks=ranks)
    # Of the pairs as the data has them: after a refresh the teacher is asked about all.
    target = target_of(stage, learnt, validation, asks=teacher is not None)
    once = stage.value == "dpo" and not stage.keeps_reference
    with contextlib.ExitStack() as stack:
        live = stack.enter_context(reference.open()) if stage.keeps_reference else None
        asked = reference if live is None else dataclasses.replace(reference, open=partial(as_it_is, live))
        if stage.refresh_rejected:
            learnt = refreshed(
                config, stage.name, learnt, model=asked, pair=pair, ranks=ranks, folder=folder, goes_on=goes_on,
                limits=limits, say=say,
            )  # fmt: skip
        ask = _Asking(
            stage=stage, pair=pair, ranks=ranks, folder=folder, goes_on=goes_on, limits=limits, say=say,
            reference=asked, teacher=teacher, soft=target == "soft", keeps=once,
        )  # fmt: skip
        found = {"": learnt, "-validation": validation or ()}
        known = {name: ask.known(pairs, name) for name, pairs in found.items() if pairs}
        words = f"{stage.value}, link {stage.link}, target {target}" + ("" if stage.target else " (by default)")
        say(f"stage {stage.name}: {len(learnt):,} pairs; {words}")
        yield Prepared(
            target=target, learnt=known[""], validation=known.get("-validation"), live=live,
            version=f"{reference.weights}/{reference.dtype}",
        )  # fmt: skip


def target_of(
    stage: PreferenceStage, learnt: Sequence[PreferencePair], held_out: Sequence[PreferencePair] | None, *, asks: bool
) -> Literal["hard", "smoothed", "soft"]:
    """What the stage's ``target`` comes to. Not set, it is ``soft`` where every pair that is learnt brings what its
    teacher says, the link can be compared with it, and those ``held_out`` can have such targets too: they bring them,
    or the run ``asks`` a teacher; else ``hard``."""
    if stage.target is not None:
        return stage.target
    taught = all(one.teacher_logps is not None for one in (*learnt, *(() if asks else held_out or ())))
    return "soft" if taught and stage.link == "sigmoid" else "hard"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asking:
    """How frozen models are asked about pairs, and where their answers are kept."""

    stage: PreferenceStage
    pair: Pair
    ranks: Ranks
    folder: Path
    goes_on: bool
    limits: Limits
    say: Say
    reference: Frozen
    teacher: Frozen | None
    soft: bool
    keeps: bool
    """Whether the reference's answers are wanted in training, and not only for soft targets."""

    def known(self, pairs: Sequence[PreferencePair], name: str) -> Known:
        """What is known of some pairs; ``name`` ends the names of their files."""
        logps = self._logps(self.reference, pairs, name) if self.keeps or self.soft else None
        soft_targets = None
        if self.soft:
            assert logps is not None
            teacher_B2, ref_B2 = (torch.tensor(of, dtype=torch.float64) for of in (self._taught(pairs, name), logps))
            soft_targets = soft_target(
                teacher_w_B=teacher_B2[:, 0], teacher_l_B=teacher_B2[:, 1], ref_w_B=ref_B2[:, 0], ref_l_B=ref_B2[:, 1],
                beta=self.stage.beta,
            ).tolist()  # fmt: skip
        return Known(pairs=pairs, reference=logps if self.keeps else None, soft_targets=soft_targets)

    def _taught(self, pairs: Sequence[PreferencePair], name: str) -> Sequence[Logps]:
        brought = [one.teacher_logps for one in pairs]
        there = [logps for logps in brought if logps is not None]
        if len(there) == len(brought):
            return there
        assert self.teacher is not None, "nobody looked whether soft targets can be had"
        return self._logps(self.teacher, pairs, name)

    def _logps(self, model: Frozen, pairs: Sequence[PreferencePair], name: str) -> Sequence[Logps]:
        """From the file, or from the model."""
        file = self.folder / f"{model.what}{name}.json"
        version = version_of(model, pairs, pair=self.pair)
        kept = self.ranks.of_first(lambda: read_logps(file, version, goes_on=self.goes_on))
        if kept is None:
            kept = self._asked(model, pairs, version)
            self.ranks.of_first(lambda: write_logps(file, kept))
        else:
            self.say(f"stage {self.stage.name}: log-probs of the {model.what} from {file}")
        return list(zip(kept.chosen, kept.rejected, strict=True))

    def _asked(self, model: Frozen, pairs: Sequence[PreferencePair], version: Version) -> Kept:
        ids: Ids = self.pair.ids
        with model.open() as opened:
            logps = pair_logps(map(ids_of, pairs), model=opened, ids=ids, ranks=self.ranks, limits=self.limits)
        again = " again: the file is gone" if self.goes_on else ""
        self.say(
            f"stage {self.stage.name}: asked the {model.what} about {2 * len(pairs):,} responses, once each{again}"
        )
        return Kept(version=version, chosen=tuple(both[0] for both in logps), rejected=tuple(both[1] for both in logps))


def read_logps(file: Path, version: Version, *, goes_on: bool) -> Kept | None:
    """What stands in ``file``; None where there is none, or one that a stage which begins may write over.

    ``CacheError`` where a stage that goes on finds numbers of other weights or responses, or none that can be read.
    """
    try:
        kept = read_record(file, Kept, fault=CacheError, again=AGAIN)
        if kept is not None:
            _require(kept, version, file=file, again=AGAIN)
    except CacheError:
        if goes_on:
            raise
        return None
    return kept


def _require(kept: Kept, version: Version, *, file: Path, again: str) -> None:
    require_version(kept.version, version, file=file, what="log-probabilities", again=again)
    if not len(kept.chosen) == len(kept.rejected):
        raise CacheError(f"{file}: {len(kept.chosen)} chosen and {len(kept.rejected)} rejected responses\n  {again}")


def write_logps(file: Path, kept: Kept) -> None:
    """Writes them whole or not at all."""
    make_folder(file.parent, setting="out or name")
    write_text(file, kept.model_dump_json() + "\n")

"""One stage of a run: a student engine, an objective, the loop, and the student that it hands on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from minillm.adaptation import Adaptation, adaptation_of
from minillm.alarms import Alarms
from minillm.cards import Card
from minillm.config import MinillmStage, PreferenceStage, RunConfig, Stage
from minillm.distillation import Distil
from minillm.frozen_models import Frozen, as_it_is
from minillm.loading import ModelFacts, fingerprint, inspect, load
from minillm.loop import Keep, Validate, run_steps
from minillm.moments import Boundary, Progressed, never
from minillm.objectives import Minillm
from minillm.pairs import Pair
from minillm.preference_chunks import Chunks, chunks_of, ordered_chunks
from minillm.preference_reading import PairSplit, pairs_in
from minillm.preference_reference import Prepared, pairs_of, prepared, require_same_teacher, require_targets
from minillm.preferences import Preferences
from minillm.preflight import AnySplit, decoding_record, limits_record, require_rows
from minillm.prompt_table import answered
from minillm.publish import publish_student
from minillm.ranks import Ranks
from minillm.references import References
from minillm.saving import Keeping
from minillm.state import States
from minillm.store import RunFolder
from minillm.student_engine import Student
from minillm.teacher_cache import TeacherCache
from minillm.teacher_engine import Teacher
from minillm.text_stages import DistilStage, ReferenceStage
from minillm.types import Examples, Prompt
from minillm.updates import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The weights that a stage starts from."""

    card: Card
    facts: ModelFacts
    adapter: Path | None = None
    """Folder of an adapter on them, which goes on training; without it one begins where the run has settings for it."""
    weights: str = ""
    """Fingerprint of the card's weights as the run found them; "" where nobody looked."""


def run_stage(
    config: RunConfig,
    stage: Stage,
    *,
    start: Start,
    pair: Pair,
    prompts: Sequence[Prompt],
    teacher: Teacher | None,
    validate: Validate | None,
    ranks: Ranks,
    folder: RunFolder,
    into: Path,
    model_card: Callable[[Student, Mapping[str, float]], str],
    corpus: Examples | None = None,
    cache: TeacherCache | None = None,
    known: Prepared | None = None,
    keeping: Keeping | None = None,
) -> Progressed:
    """Trains one stage and publishes its student at ``into``; ``model_card`` writes that folder's README. ``corpus`` is
    what a language-model loss learns from, if not from the prompts' responses; ``cache`` what a kd stage has in
    place of the teacher; ``known`` what a preference stage has besides; ``keeping`` how it is saved, and
    where it goes on."""
    check_rows(stage, prompts, ranks=ranks)
    student = _student(config, stage, start=start, pair=pair, ranks=ranks)
    if ranks.first:
        for line in _trained_words(config, stage, start, student):
            print(line, flush=True)
    try:
        begin: States | None = None
        boundary: Boundary = never
        if keeping is not None:
            begin = keeping.restore(student, into=into)
            boundary = keeping.boundary(stage.name, student, into=into)
        objective = _objective(
            config, stage, pair=pair, prompts=prompts, teacher=teacher, ranks=ranks, corpus=corpus, cache=cache,
            known=known,
        )  # fmt: skip
        done = run_steps(
            objective,
            student,
            stage=stage.name,
            steps=stage.steps,
            ranks=ranks,
            folder=folder,
            headline=stage.headline,
            validate=validate,
            validate_every=stage.validate_every,
            keep=Keep(metric=stage.keep.metric, highest=stage.keep.mode == "max"),
            patience=stage.patience,
            publish=lambda scores: _publish(
                student,
                into=into,
                config=config,
                pair=pair,
                ranks=ranks,
                card=lambda: model_card(student, scores),
            ),
            alarms=Alarms(stage.alarms) if isinstance(stage, MinillmStage | PreferenceStage) else None,
            begin=begin,
            boundary=boundary,
            traffic=dict if teacher is None else teacher.traffic,
        )
        if isinstance(objective, Distil) and ranks.first and not done.interrupted:
            for line in objective.parting_words():
                print(line, flush=True)
        return done
    finally:
        student.close()


def _trained_words(config: RunConfig, stage: Stage, start: Start, student: Student) -> list[str]:
    """What learns, and what is frozen; and where a student that is sharded was whole while it was read."""
    what, frozen = "all", ""
    if config.adapter is not None:
        kind = config.adapter.SECTION
        what, frozen = f"an adapter ({kind}) of {student.trained:,} weights beside", ", which are frozen"
    words = [f"stage {stage.name}: trains {what} {student.parameters:,} weights{frozen}"]
    if student.stage == 3 and start.card.build is None and not start.card.as_in_files:
        words.append(
            f"note: {start.card.name} is whole on every rank until it is sharded: its card changes its weights"
        )
    return words


def load_teacher(pair: Pair, *, ranks: Ranks, say: Callable[[str], None]) -> Teacher:
    """The pair's teacher where its card puts it; ``say`` hears what each rank keeps of it."""
    card, facts = pair.teacher_card, pair.teacher
    assert card is not None and facts is not None
    teacher = Teacher(
        lambda: load(card, facts, seed=0),
        ranks=ranks,
        placement=card.placement,
        precision="bf16" if card.dtype == "bfloat16" else "fp32",
        real_ids=pair.real_ids,
    )
    if card.sharded:
        say(f"note: {card.name} is read in shards, so its logits were not compared with its own forward pass")
    for rank, kept in enumerate(teacher.check_share()):
        share = f"{kept.bytes / teacher.whole_bytes:.1%}{', in host memory' if kept.host else ''}"
        say(
            f"rank {rank}: frozen {card.name} ({card.placement}) keeps {kept.bytes:,} of {teacher.whole_bytes:,} "
            f"bytes between forwards ({share})"
        )
    return teacher


def known_of(
    config: RunConfig, stage: PreferenceStage, *, start: Start, pair: Pair, splits: Mapping[str, AnySplit],
    teacher: Teacher | None, ranks: Ranks, folder: RunFolder, goes_on: bool, say: Callable[[str], None],
) -> contextlib.AbstractContextManager[Prepared]:  # fmt: skip
    """What a preference stage knows of its pairs when it begins; its reference, which is the weights of ``start``,
    lives for the block."""
    card, facts = start.card, start.facts
    if start.adapter is not None:  # those are of its base
        card = card.of_folder(start.adapter.parent)
        facts = inspect(card)
    chunks = _chunks(config, stage, pair=pair, splits=splits, ranks=ranks, folder=folder, goes_on=goes_on, say=say)
    held_out = splits.get("preferences_validation") if stage.validate_every else None
    return prepared(
        config, stage, card=card, facts=facts, pair=pair,
        learnt=pairs_of(stage, pairs_in(splits["preferences"]), chunks=chunks),
        validation=None if held_out is None else pairs_in(held_out),
        teacher=_frozen_teacher(pair, teacher, ranks=ranks, say=say), ranks=ranks,
        folder=folder.notes_of(stage.name), goes_on=goes_on, limits=limits_record(config.evaluation), say=say,
    )  # fmt: skip


def _chunks(
    config: RunConfig, stage: PreferenceStage, *, pair: Pair, splits: Mapping[str, AnySplit], ranks: Ranks,
    folder: RunFolder, goes_on: bool, say: Callable[[str], None],
) -> Chunks:  # fmt: skip
    """The run's chunks from easy to hard, where the stage learns from one; logged where it is the first that does."""
    if stage.chunk is None:
        return {}
    order, chunks = ordered_chunks(
        config, pairs_in(splits["preferences"]), pair=pair, ranks=ranks, file=folder.chunks,
        limits=limits_record(config.evaluation), say=say,
    )  # fmt: skip
    first = next(each for each in config.trained if isinstance(each, PreferenceStage) and each.chunk is not None)
    if stage is first and not goes_on:  # a stage that goes on has the line: it was logged before its first step
        asked, measured = order.version, [each.model_dump(mode="json") for each in order.chunks]
        folder.log(
            {
                "kind": "chunks", "stage": stage.name, "step": 0, "update": 0, "by": asked.by, "score": asked.score,
                "weights": asked.weights, "chunks": measured,
            }
        )  # fmt: skip
    return chunks


def check_pairs(config: RunConfig, stage: PreferenceStage, splits: Mapping[str, AnySplit], *, pair: Pair) -> None:
    """Raise ``DataError`` where the pairs that were read are none for this stage, or of another teacher than the
    run's, and ``UnsupportedCombination`` where they want soft targets that nothing can give."""
    split, held_out = splits["preferences"], splits.get("preferences_validation") if stage.validate_every else None
    assert isinstance(split, PairSplit) and (held_out is None or isinstance(held_out, PairSplit))
    chunks = chunks_of(split.pairs, config.data.chunks.by) if config.data.chunks is not None else {}
    own = pairs_of(stage, split.pairs, chunks=chunks)
    measured = None if held_out is None else held_out.pairs
    # Which chunk is the stage's is known once they are measured: it may be any of them.
    for learnt in [own] if stage.chunk is None else chunks.values():
        require_same_teacher(stage, learnt, split, held_out, pair=pair)
        require_targets(stage, learnt, measured, asks=pair.teacher_card is not None)


def _frozen_teacher(pair: Pair, loaded: Teacher | None, *, ranks: Ranks, say: Callable[[str], None]) -> Frozen | None:
    """The pair's teacher as one that pairs are asked about, loaded for that where it is not already; None where there
    is none."""
    card = pair.teacher_card
    if card is None:
        return None

    @contextlib.contextmanager
    def opened() -> Iterator[Teacher]:
        teacher = load_teacher(pair, ranks=ranks, say=say)
        try:
            yield teacher
        finally:
            teacher.close()

    how = opened if loaded is None else partial(as_it_is, loaded)
    return Frozen(what="teacher", weights=ranks.of_first(lambda: fingerprint(card)), dtype=card.dtype, open=how)


def usable(stage: Stage, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts that a stage's steps draw from: where it needs responses, those that have one."""
    return answered(prompts) if stage.responses_needed == "all" else prompts


def check_rows(stage: Stage, prompts: Sequence[Prompt], *, ranks: Ranks) -> None:
    """Raise ``DataError`` where a stage has no row to draw from, or a step would leave a rank without one."""
    require_rows(usable(stage, prompts), ranks=ranks.size, per_step=stage.rows_per_step, what=f"stage {stage.name}")


def unbiased_words(config: RunConfig, stage: Stage) -> str:
    """The sentence of design D1: ``yes``, or ``no`` with every reason; "" for a stage that estimates no such
    gradient."""
    reasons = stage.bias_reasons(truncated=config.decoding.truncated, tempered=config.decoding.tempered)
    if reasons is None:
        return ""
    return f"no ({', '.join(reasons)})" if reasons else "yes"


def idle_words(config: RunConfig, stage: Stage) -> list[str]:
    """A line for each reason why settings of the stage change nothing."""
    idle = stage.idle_settings(tempered=config.decoding.tempered)
    return [f"no effect here: {', '.join(names)} ({reason})" for reason, names in idle.items()]


def _student(config: RunConfig, stage: Stage, *, start: Start, pair: Pair, ranks: Ranks) -> Student:
    """The stage's engine, with the weights that the stage starts from."""
    return Student(
        # In 32 bits whatever the card says: that is what the optimiser keeps, and the engine makes its own bf16 copy.
        lambda: load(start.card, start.facts, seed=config.seed, dtype=torch.float32),
        ranks=ranks,
        settings=config.engine.student,
        precision=config.engine.precision,
        optimiser=stage.optimiser,
        updates=stage.steps * stage.updates_per_step,
        real_ids=pair.real_ids,
        from_files=start.card.as_in_files,
        dropout=stage.drops_out,
        seed=config.seed,
        name=stage.name,
        adaptation=_adaptation(config, start),
        recompute=config.engine.activation_checkpointing,
        gather=config.engine.gather,
    )


def _adaptation(config: RunConfig, start: Start) -> Adaptation | None:
    if config.adapter is None:
        return None
    base = {"base": str(start.card.model), "base_weights": start.weights}
    return adaptation_of(config.adapter, seed=config.seed, start=start.adapter, **base)


def _publish(
    student: Student, *, into: Path, config: RunConfig, pair: Pair, ranks: Ranks, card: Callable[[], str]
) -> str:
    """Writes the student as it stands; the SHA-256 of its weights on the disk. Called on every rank, since all of them
    hand over their shards."""
    state, adapter = student.state(), student.adapter()
    return ranks.of_first(
        lambda: publish_student(
            into,
            state=state,
            config=student.config,
            tokenizer=pair.tokenizer,
            real_ids=pair.real_ids,
            decoding=decoding_record(config.decoding),
            eos_ids=pair.ids.eos,
            pad_id=pair.ids.pad,
            card=card(),
            adapter=adapter,
        )
    )


def _objective(
    config: RunConfig,
    stage: Stage,
    *,
    pair: Pair,
    prompts: Sequence[Prompt],
    teacher: Teacher | None,
    ranks: Ranks,
    corpus: Examples | None,
    cache: TeacherCache | None,
    known: Prepared | None,
) -> Objective:
    """The one place that knows which objective a kind of stage has."""
    if isinstance(stage, PreferenceStage):
        assert known is not None, "nobody asked the reference about the stage's pairs"
        return Preferences(stage, known=known, ids=pair.ids, ranks=ranks, seed=config.seed)
    rows = usable(stage, prompts)
    if isinstance(stage, ReferenceStage):
        return References(
            stage, prompts=rows, ids=pair.ids, ranks=ranks, seed=config.seed, teacher=teacher, cache=cache
        )
    assert teacher is not None, "the configuration refuses a stage that wants a teacher where there is none"
    if isinstance(stage, DistilStage):
        return Distil(
            stage, prompts=rows, decoding=decoding_record(config.decoding), teacher=teacher, ids=pair.ids, ranks=ranks,
            seed=config.seed,
        )  # fmt: skip
    return Minillm(
        stage,
        prompts=rows,
        decoding=decoding_record(config.decoding),
        teacher=teacher,
        ids=pair.ids,
        ranks=ranks,
        seed=config.seed,
        corpus=corpus,
    )

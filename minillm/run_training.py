"""The stages of a run, one after another: what each starts from, how it is saved, what it hands on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from minillm.adapter_files import FOLDER
from minillm.checkpoints import Checkpoints
from minillm.config import AnyStage, MergeStage, PreferenceStage, RunConfig, Stage, dump_config
from minillm.errors import Stopped, visible
from minillm.evaluation import PairJudge, validator
from minillm.loading import inspect
from minillm.model_card import CardFacts, render
from minillm.moments import Progressed
from minillm.pairs import Pair
from minillm.preference_reading import PairSplit
from minillm.preference_reference import Prepared
from minillm.preflight import Anchor, AnySplit, limits_record
from minillm.profiling import profiled
from minillm.ranks import Ranks
from minillm.results import judge_of, used_by, versions
from minillm.saving import Behind, Keeping, Resumed, Saver
from minillm.stage_merging import run_merge
from minillm.stages import Start, known_of, run_stage, unbiased_words
from minillm.stops import Stops
from minillm.store import RunFolder
from minillm.student_engine import Student
from minillm.teacher_cache import TeacherCache
from minillm.teacher_engine import Teacher
from minillm.types import Purpose


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run has once everything is read."""

    config: RunConfig
    pair: Pair
    splits: Mapping[str, AnySplit]
    anchor: Anchor | None
    caches: Mapping[str, TeacherCache]
    teacher: Teacher | None
    ranks: Ranks
    folder: RunFolder
    profile: int
    """Steps of each stage that are recorded."""

    def into(self, stage: AnyStage) -> Path:
        """Where a stage's student is handed on."""
        return self.folder.student if stage is self.config.stages[-1] else self.folder.student_of(stage.name)


def train(run: Run, checkpoints: Checkpoints, resumed: Resumed | None, *, fingerprints: Mapping[str, Any]) -> Behind:
    """Runs the stages that are not over, each from the student that it starts from; raises ``Stopped`` where a signal
    ended one of them."""
    config, ranks, folder = run.config, run.ranks, run.folder
    behind = Behind() if resumed is None else resumed.behind
    weights = str(fingerprints["made_from"]["student"])
    over = resumed.stage if resumed is not None and resumed.over else None
    with contextlib.ExitStack() as stack:
        saver = None
        if config.checkpoints is not None:
            stops = stack.enter_context(Stops())  # where nothing is saved, a signal does what it always does
            saver = Saver(
                checkpoints, config.checkpoints, stops=stops, ranks=ranks, folder=folder, fingerprints=fingerprints,
                last_bytes=0 if resumed is None else resumed.bytes, say=partial(_say, ranks),
            )  # fmt: skip
        for stage in config.stages:
            into = run.into(stage)
            if resumed is not None and resumed.stage == stage.name and resumed.over:
                resumed.restore_best(into, ranks=ranks, say=partial(_say, ranks))
                behind.add(stage.name, resumed.progressed, updates=resumed.updates)
            elif stage.name not in behind.stages:
                own = resumed if resumed is not None and resumed.stage == stage.name else None
                done = _run_stage(run, stage, base_weights=weights, saver=saver, behind=behind, resumed=own)
                if done.interrupted:
                    assert saver is not None
                    raise Stopped(
                        f"{saver.stopped}: saved at step {done.step:,} of stage {stage.name}\n"
                        "  the same command goes on from there"
                    )
                trained = stage in config.trained
                behind.add(stage.name, done, updates=saver.updates if saver is not None and trained else 0)
            ranks.of_first(lambda: folder.tell_status(seconds=behind.seconds, stages=behind.stages))
            left = [each for each in config.stages if each.name not in {*behind.stages, over}]
            if stage is config.stages[-1] or any(stage in config.reads_students_of(each) for each in left):
                # Before anything else is trained: it may be a stage much later that reads it.
                ranks.of_first(lambda stage=stage, into=into: behind.require_student(stage.name, into))  # type: ignore[misc]
        if saver is not None:
            _say(ranks, saver.cost)
    return behind


def start_of(run: Run, stage: Stage, *, base_weights: str) -> Start:
    """What a stage starts from: the run's own student, one that an earlier stage handed on, or the run's own with the
    adapter that was."""
    before = run.config.source(stage)
    if before is None:
        return Start(card=run.pair.student_card, facts=run.pair.student, weights=base_weights)
    into = run.into(before)
    if run.config.adapter is not None:
        return Start(card=run.pair.student_card, facts=run.pair.student, adapter=into / FOLDER, weights=base_weights)
    card = run.pair.student_card.of_folder(into)
    return Start(card=card, facts=inspect(card))


def _run_stage(
    run: Run, stage: AnyStage, *, base_weights: str, saver: Saver | None, behind: Behind, resumed: Resumed | None
) -> Progressed:
    config, pair, ranks, teacher = run.config, run.pair, run.ranks, run.teacher
    if isinstance(stage, MergeStage):
        say = partial(_say, ranks)
        return run_merge(config, stage, pair=pair, place=run.into, folder=run.folder, ranks=ranks, say=say)
    start = start_of(run, stage, base_weights=base_weights)
    split, keeping, known = run.splits[stage.reads], None, None
    if saver is not None or resumed is not None:
        keeping = Keeping(saver=saver, behind=behind, resumed=resumed, ranks=ranks, say=partial(_say, ranks))
    validation = run.splits.get("validation")
    told = split
    with contextlib.ExitStack() as stack:
        if isinstance(stage, PreferenceStage):
            known = stack.enter_context(
                known_of(
                    config, stage, start=start, pair=pair, splits=run.splits, teacher=teacher, ranks=ranks,
                    folder=run.folder, goes_on=resumed is not None, say=partial(_say, ranks),
                )
            )  # fmt: skip
            assert isinstance(split, PairSplit)
            told = split.part(known.learnt.pairs, what=stage.part)
        stack.enter_context(profiled(run.folder.path, stage.name, run.profile, ranks=ranks, say=partial(_say, ranks)))
        return run_stage(
            config,
            stage,
            start=start,
            pair=pair,
            prompts=split.prompts,
            teacher=teacher,
            validate=_validator(config, stage, pair=pair, split=validation, teacher=teacher, ranks=ranks, known=known),
            ranks=ranks,
            folder=run.folder,
            into=run.into(stage),
            model_card=lambda student, scores: render(
                _card_facts(
                    config, stage, pair, told, run.anchor, start=start.card.name, student=student, teacher=teacher
                ),
                scores,
                step=student.updates_done,
            ),
            corpus=None if run.anchor is None else run.anchor.rows,
            cache=run.caches.get(stage.name),
            known=known,
            keeping=keeping,
        )


def _validator(
    config: RunConfig,
    stage: Stage,
    *,
    pair: Pair,
    split: AnySplit | None,
    teacher: Teacher | None,
    ranks: Ranks,
    known: Prepared | None,
) -> Any:
    if not stage.validate_every:
        return None
    pairs = judge = None
    if isinstance(stage, PreferenceStage) and known is not None and known.validation is not None:
        pairs = PairJudge(stage=stage, known=known, ids=pair.ids, limits=limits_record(config.evaluation))
    if split is not None:
        # Where nothing is kept by the teacher's word, validation does not ask it, though it may be there for the test
        # set.
        own = teacher if stage.on_policy else None
        judge = judge_of(config, pair, split, teacher=own, purpose=Purpose.VALIDATION)
    has_references = split is not None and any(prompt.response_ids for prompt in split.prompts)
    return validator(judge, ranks=ranks, generate=stage.samples_to_validate, loss=has_references, pairs=pairs)


def _card_facts(
    config: RunConfig,
    stage: Stage,
    pair: Pair,
    split: AnySplit,
    anchor: Anchor | None,
    *,
    start: str,
    student: Student,
    teacher: Teacher | None,
) -> CardFacts:
    cards = [pair.student_card] + ([pair.teacher_card] if pair.teacher_card is not None else [])
    learnt = anchor if stage in config.anchored else None
    return CardFacts(
        name=config.name,
        stage=stage.name,
        start=start,
        teacher=config.teacher,
        teacher_parameters=None if teacher is None else teacher.parameters,
        parameters=student.handed_on,
        adapter=student.adapter_words,
        data_source=split.source,
        data_rows=len(split.prompts),
        data_sha256=split.sha256,
        unbiased=unbiased_words(config, stage),
        config_text=dump_config(config),
        versions=versions(*used_by(config, pair)),
        licence_notes="; ".join(f"{card.name}: {card.licence}" for card in cards if card.licence),
        corpus="" if learnt is None else f"`{learnt.source}`, {learnt.size}, sha256 `{learnt.sha256}`",
    )


def _say(ranks: Ranks, line: str) -> None:
    if ranks.first:
        print(visible(line), flush=True)

"""The public Python API: the same runs as the command line, in a notebook (one process) or under a launcher."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minillm import phases
from minillm.adapter_files import FOLDER
from minillm.cards import may_differ
from minillm.checkpoints import Checkpoints, Resume
from minillm.config import AnyStage, MergeStage, PreferenceStage, RunConfig, Stage, dump_config
from minillm.doctor.at_start import words_at_start
from minillm.errors import DataError, RunExists, Stopped, visible
from minillm.evaluation import PairJudge, Record, validator
from minillm.evaluation_sets import evaluate_sets, forget_unfinished, read_sets, shared_words, stored_index, unanswered
from minillm.generation import generate
from minillm.introduction import introduction
from minillm.loading import fingerprint, inspect
from minillm.lora import peft_library
from minillm.model_card import CardFacts, render
from minillm.moments import Progressed
from minillm.pair_making import make_pairs
from minillm.pairs import Pair, check_pair
from minillm.preference_reading import pairs_in
from minillm.preference_reference import Prepared, pairs_of
from minillm.preflight import Anchor, AnySplit, limits_record, read_anchor, read_teacher_caches
from minillm.profiling import profiled
from minillm.ranks import Ranks
from minillm.report import build_report, combine, write_reports
from minillm.report_files import sets_in
from minillm.report_sets import by_set
from minillm.results import judge_of, stored_results, used_by, versions
from minillm.resuming import (
    checkpoints_of,
    fingerprints,
    require_resume,
    sources_of,
    steps_behind,
    take_up,
    taken,
    told,
    told_as_ended,
)
from minillm.run_splits import evaluated_sets, read_splits
from minillm.saving import Behind, Keeping, Resumed, Saver
from minillm.stage_merging import run_merge
from minillm.stages import Start, check_rows, known_of, load_teacher, run_stage, unbiased_words
from minillm.stops import Stops
from minillm.store import Clock, RunFolder, make_folder
from minillm.student_engine import Student
from minillm.teacher_cache import TeacherCache
from minillm.teacher_caching import cache_teacher
from minillm.teacher_engine import Teacher
from minillm.text_stages import asks_teacher
from minillm.trackers import require_packages, tracked
from minillm.types import Purpose


def distill(
    config: RunConfig, *, fresh: bool = False, resume: Resume = "auto", accept_changes: Sequence[str] = (),
    profile: int = 0,
) -> Path:  # fmt: skip
    """Runs all stages of a configuration and its final evaluation; the run's folder.

    Works for a single process and for every rank of a launcher alike. A run that is done already is left as it is; one
    that was interrupted goes on from its newest checkpoint that is whole, bit for bit as if nothing had happened on the
    same number of ranks (``resume``: ``"auto"`` begins where there is none, True does not, a path names one). Settings
    that change training are refused then, unless their paths are in ``accept_changes``. ``fresh`` starts over. SIGTERM
    and SIGINT save after the present update and raise ``Stopped``. ``profile`` records so many steps as a trace
    (``profiling``), and changes nothing else.

    Errors are those of ``minillm.errors``, and anything wrong with files or settings is found before any model is
    loaded.
    """
    require_resume(resume)
    require_packages(config.trackers)
    if config.lora is not None:
        peft_library()
    pair = check_pair(config)
    splits = read_splits(config, pair)
    anchor = read_anchor(config, pair=pair)
    caches = read_teacher_caches(config, pair=pair, splits=splits)
    ranks = Ranks(threads=config.threads)
    for stage in config.trained:
        check_rows(stage, splits[stage.reads].prompts, ranks=ranks)
        if isinstance(stage, PreferenceStage):
            pairs_of(stage, pairs_in(splits["preferences"]))
    folder = RunFolder(Path(config.out) / config.name, writes=ranks.first)
    made_from = _made_from(config, pair, splits, anchor, caches)
    sources = sources_of(
        config, pair, made_from, data_of=lambda other: _data(read_splits(other, pair), read_anchor(other, pair=pair))
    )
    say = partial(_say, ranks)
    with taken(folder, config, ranks=ranks, fresh=fresh) as standing:
        checkpoints = checkpoints_of(folder, config, ranks=ranks, say=say)
        if standing == "done":
            _require_made_from(folder, made_from)
            checkpoints.remove()  # of a run that was killed between its last two acts
            say(f"{folder.path}: done already; --fresh starts over")
            return folder.path
        resumed = take_up(
            folder, config, checkpoints, standing=standing, resume=None if fresh else resume,
            accepted=accept_changes, sources=sources, ranks=ranks, say=say,
        )  # fmt: skip
        status = {"state": "running", "reason": None, "made_from": made_from, "ranks": ranks.size}
        ranks.of_first(lambda: folder.set_status(**status, versions=versions(*used_by(config, pair)), **told(resumed)))
        for line in introduction(config, pair, splits, anchor, caches=caches, ranks=ranks):
            say(line)
        for line in words_at_start(config, pair, splits, ranks=ranks.size) if ranks.first else ():
            say(line)
        phases.enter("loading")
        with told_as_ended(folder), contextlib.ExitStack() as stack:
            settings = config.model_dump(mode="json")
            before = steps_behind(resumed)
            stack.enter_context(
                tracked(folder, config.trackers, run=config.name, settings=settings, ranks=ranks, before=before)
            )
            teacher = load_teacher(pair, ranks=ranks, say=say) if _needs_teacher(config, splits) else None
            if teacher is not None:
                stack.callback(teacher.close)
                kept = teacher.kept_record()
                ranks.of_first(lambda: folder.tell_status(teacher_bytes=kept))
            run = _Run(
                config=config, pair=pair, splits=splits, anchor=anchor, caches=caches, teacher=teacher, ranks=ranks,
                folder=folder, profile=profile,
            )  # fmt: skip
            behind = _train(run, checkpoints, resumed, fingerprints=fingerprints(config, sources, ranks=ranks))
            ranks.of_first(folder.require_log)  # its lines are made now or never
            seconds = _evaluate(run, behind, anew=resumed is None or not resumed.over)
            phases.enter("report")
            ranks.of_first(lambda: _write_run_report(config, folder, seconds))
            ranks.of_first(lambda: folder.set_status(state="done", seconds=seconds))
        checkpoints.remove()
        ranks.barrier()
    say(f"student: {folder.student}   report: {folder.path / 'report.html'}")
    return folder.path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
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


def _made_from(
    config: RunConfig,
    pair: Pair,
    splits: Mapping[str, AnySplit],
    anchor: Anchor | None,
    caches: Mapping[str, TeacherCache],
) -> dict[str, str]:
    """Names what a run is made from beside its configuration: weights, prompts, corpus and teacher caches."""
    cards = {"student": pair.student_card, "teacher": pair.teacher_card}
    # A teacher that is built has a seed of its own: the same in every run.
    seeds = {"student": config.seed, "teacher": 0}
    weights = {name: fingerprint(card, seed=seeds[name]) for name, card in cards.items() if card is not None}
    cached = {f"teacher cache of {name}": cache.sha256 for name, cache in caches.items()}
    return {**weights, **_data(splits, anchor), **cached}


def _data(splits: Mapping[str, AnySplit], anchor: Anchor | None) -> dict[str, str]:
    corpus = {} if anchor is None else {"corpus": anchor.sha256}
    return {**{f"{name} prompts": split.sha256 for name, split in splits.items()}, **corpus}


def _require_made_from(folder: RunFolder, made_from: Mapping[str, str]) -> None:
    """Raise ``RunExists`` where a run that is done was made from other weights or data than it would be now."""
    before = folder.status().get("made_from", {})
    differs = [name for name in made_from if may_differ(before.get(name), made_from[name])]
    if differs or not folder.student.is_dir():
        what = f"was made from another {', '.join(differs)}" if differs else "has lost its student folder"
        raise RunExists(
            f"{folder.path} holds this run, done, but it {what}; nothing was touched.\n"
            "  start over with --fresh, or give this run another name (name=NAME)"
        )


def _train(run: _Run, checkpoints: Checkpoints, resumed: Resumed | None, *, fingerprints: Mapping[str, Any]) -> Behind:
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


def _start_of(run: _Run, stage: Stage, *, base_weights: str) -> Start:
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
    run: _Run, stage: AnyStage, *, base_weights: str, saver: Saver | None, behind: Behind, resumed: Resumed | None
) -> Progressed:
    config, pair, ranks, teacher = run.config, run.pair, run.ranks, run.teacher
    if isinstance(stage, MergeStage):
        say = partial(_say, ranks)
        return run_merge(config, stage, pair=pair, place=run.into, folder=run.folder, ranks=ranks, say=say)
    start = _start_of(run, stage, base_weights=base_weights)
    split, keeping, known = run.splits[stage.reads], None, None
    if saver is not None or resumed is not None:
        keeping = Keeping(saver=saver, behind=behind, resumed=resumed, ranks=ranks, say=partial(_say, ranks))
    validation = run.splits.get("validation")
    with contextlib.ExitStack() as stack:
        if isinstance(stage, PreferenceStage):
            known = stack.enter_context(
                known_of(
                    config, stage, start=start, pair=pair, splits=run.splits, teacher=teacher, ranks=ranks,
                    folder=run.folder, goes_on=resumed is not None, say=partial(_say, ranks),
                )
            )  # fmt: skip
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
                    config, stage, pair, split, run.anchor, start=start.card.name, student=student, teacher=teacher
                ),
                scores,
                step=student.updates_done,
            ),
            corpus=None if run.anchor is None else run.anchor.rows,
            cache=run.caches.get(stage.name),
            known=known,
            keeping=keeping,
        )


def _evaluate(run: _Run, behind: Behind, *, anew: bool) -> dict[str, float]:
    """The final evaluation, where there is something to evaluate on; seconds of all that the run did. One that was
    begun goes on unless it is made ``anew``."""
    config, pair, ranks, out = run.config, run.pair, run.ranks, run.folder.path
    seconds = dict(behind.seconds)
    if sets := evaluated_sets(run.splits):
        clock = Clock()
        card = pair.student_card.of_folder(run.folder.student)
        start = Start(card=card, facts=inspect(card))
        missing = list(sets)
        if anew:
            ranks.of_first(lambda: forget_unfinished(out, sets))
        else:
            missing = ranks.of_first(lambda: unanswered(config, pair, sets, start=start, out=out))
        if missing:
            phases.enter("evaluation")
            evaluate_sets(
                config, pair, sets, start=start, teacher=run.teacher, ranks=ranks, out=out, shown=config.name,
                only=missing,
            )  # fmt: skip
        seconds["evaluation"] = round(clock(), 2)
    return seconds


def evaluate(model: str | Path, config: RunConfig, *, out: str | Path, fresh: bool = False) -> dict[str, Any]:
    """Measures a model on the test prompts of a configuration and writes ``results.json`` and ``samples.jsonl`` into
    ``out``; where ``data.test`` names several sets, into a folder for each, listed in ``out``/results.json.

    ``config.teacher`` gives the reverse KL, ``config.decoding`` and ``config.evaluation`` everything else. Results of
    the same model and settings that are already there are returned as they are; sets without them are evaluated, and an
    interrupted evaluation goes on. Raises ``DataError`` if ``out`` holds one, done or not, of another model, other
    settings or other sets, unless ``fresh``.
    """
    if config.data.test is None:
        raise DataError("data.test is missing; wanted the held-out prompts to evaluate on")
    pair = check_pair(config, student=str(model))
    sets = read_sets(config, pair)
    ranks = Ranks(threads=config.threads)
    out = Path(out)
    start = Start(card=pair.student_card, facts=pair.student)
    # Only the first rank need see the disk of the results.
    missing = list(sets)
    if not fresh:
        missing = ranks.of_first(lambda: unanswered(config, pair, sets, start=start, out=out))
    if not missing:
        stored = ranks.of_first(lambda: stored_results(out) if "" in sets else stored_index(out))
        if stored is not None and len(sets_in(stored)) in {0, len(sets)}:
            _say(ranks, f"{out}: evaluated already; --fresh starts over")
            return stored
    ranks.of_first(lambda: make_folder(out, setting="--out"))
    if fresh:
        ranks.of_first(lambda: forget_unfinished(out, sets))
    for line in [line for split in sets.values() for line in split.words] + shared_words(sets):
        _say(ranks, line)
    for name in sets:
        if name not in missing:
            _say(ranks, f"{out / name}: evaluated already; --fresh starts over")
    teacher = None
    if pair.teacher is not None:
        teacher = load_teacher(pair, ranks=ranks, say=lambda line: _say(ranks, line))
    ranks.barrier()
    try:
        return evaluate_sets(
            config, pair, sets, start=start, teacher=teacher, ranks=ranks, out=out, shown=str(model), only=missing
        )
    finally:
        if teacher is not None:
            teacher.close()


def _needs_teacher(config: RunConfig, splits: Mapping[str, AnySplit]) -> bool:
    distils = any(asks_teacher(stage) for stage in config.trained)
    return config.teacher is not None and (distils or bool(evaluated_sets(splits)))


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


def _write_run_report(config: RunConfig, folder: RunFolder, seconds: Mapping[str, float]) -> None:
    there = (folder.path / "results.json").is_file()
    sets = by_set({config.name: folder.path} if there else {})
    combined = {
        name: combine(
            models,
            differences=[],
            resamples=config.evaluation.bootstrap,
            seed=config.seed,
            seconds={} if name else seconds,
        )
        for name, models in sets.items()
    }
    write_reports(
        combined,
        sets=sets,
        training={config.name: folder.path},
        out=folder.path,
        title=config.name,
        settings=config.model_dump(mode="json"),
        seconds=seconds,
    )


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


__all__ = ["Record", "build_report", "cache_teacher", "distill", "evaluate", "generate", "make_pairs"]

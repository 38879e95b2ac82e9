"""The public Python API: the same runs as the command line, in a notebook (one process) or under a launcher."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minillm import phases
from minillm.cards import may_differ
from minillm.checkpoints import Resume
from minillm.config import PreferenceStage, RunConfig
from minillm.doctor.at_start import words_at_start
from minillm.errors import DataError, RunExists, visible
from minillm.evaluation import Record
from minillm.evaluation_sets import evaluate_sets, forget_unfinished, read_sets, shared_words, stored_index, unanswered
from minillm.generation import generate
from minillm.introduction import introduction
from minillm.loading import fingerprint, inspect
from minillm.lora import peft_library
from minillm.pair_making import make_pairs
from minillm.pairs import Pair, check_pair
from minillm.preflight import Anchor, AnySplit, read_anchor, read_teacher_caches
from minillm.ranks import Ranks
from minillm.report import build_report, combine, write_reports
from minillm.report_files import sets_in
from minillm.report_sets import by_set
from minillm.results import stored_results, used_by, versions
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
from minillm.run_training import Run, train
from minillm.saving import Behind
from minillm.stages import Start, check_pairs, check_rows, load_teacher
from minillm.store import Clock, RunFolder, make_folder
from minillm.teacher_cache import TeacherCache
from minillm.teacher_caching import cache_teacher
from minillm.text_stages import asks_teacher
from minillm.trackers import require_packages, tracked


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
            check_pairs(config, stage, splits, pair=pair)
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
            run = Run(
                config=config, pair=pair, splits=splits, anchor=anchor, caches=caches, teacher=teacher, ranks=ranks,
                folder=folder, profile=profile,
            )  # fmt: skip
            behind = train(run, checkpoints, resumed, fingerprints=fingerprints(config, sources, ranks=ranks))
            ranks.of_first(folder.require_log)  # its lines are made now or never
            seconds = _evaluate(run, behind, anew=resumed is None or not resumed.over)
            phases.enter("report")
            ranks.of_first(lambda: _write_run_report(config, folder, seconds))
            ranks.of_first(lambda: folder.set_status(state="done", seconds=seconds))
        checkpoints.remove()
        ranks.barrier()
    say(f"student: {folder.student}   report: {folder.path / 'report.html'}")
    return folder.path


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


def _evaluate(run: Run, behind: Behind, *, anew: bool) -> dict[str, float]:
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


def _say(ranks: Ranks, line: str) -> None:
    if ranks.first:
        print(visible(line), flush=True)


__all__ = ["Record", "build_report", "cache_teacher", "distill", "evaluate", "generate", "make_pairs"]

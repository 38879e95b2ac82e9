"""Checks of the rows: whether they can be read, fit, have what stages need, and are held out where they should be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from minillm.config import PreferenceStage, RunConfig
from minillm.doctor.findings import Finding, error, note, of_error, ok, warning
from minillm.doctor.patient import UNREADABLE, Patient, student_alone
from minillm.errors import MinillmError
from minillm.pairs import Pair
from minillm.preference_reading import read_preferences
from minillm.preflight import AnySplit, read_split
from minillm.rows import counted, read_rows
from minillm.run_splits import pair_sources
from minillm.stages import check_pairs
from minillm.templates import raw_text
from minillm.types import Prompt

SAMPLE = 2_000
"""Rows of each source that are tokenised."""
COMPARED = 200_000
"""Training rows whose text is compared with held-out rows."""
NO_LIMIT = 1 << 30
"""Tokens that no row has: read with it, rows keep their true lengths."""
MUCH = 0.05
"""Share of rows that fall out or are cut from which on that is no detail."""


def sources(config: RunConfig) -> dict[str, str]:
    """Every source of prompts that the run reads, by the name of its split; those of pairs are
    ``run_splits.pair_sources``."""
    data = config.data
    named = {"train": data.train, "teacher text": data.teacher_text, "validation": data.validation}
    found = {name: source for name, source in named.items() if source is not None}
    return found | {f"test {name}".strip(): source for name, source in data.test_sets.items()}


def read_samples(config: RunConfig, pair: Pair) -> tuple[dict[str, AnySplit], list[Finding]]:
    """The first rows of each source under the run's template, whole however long they are; what cannot be read."""
    data = config.data.model_copy(update={"max_prompt_tokens": NO_LIMIT, "over_long": "keep_right"})
    decoding = config.decoding.model_copy(update={"max_new_tokens": NO_LIMIT})
    lenient = config.model_copy(update={"data": data, "decoding": decoding})
    splits: dict[str, AnySplit] = {}
    found: list[Finding] = []
    for name, source in sources(config).items():
        limit = getattr(data, f"{name.split()[0]}_limit", None) or SAMPLE
        try:
            splits[name] = read_split(
                lenient, source, pair=pair, name=name, need_response=False, limit=min(limit, SAMPLE)
            )
        except (MinillmError, OSError) as raised:
            found.append(of_error("data", raised, why=UNREADABLE))
    for name, named in pair_sources(config).items():
        limit = min(getattr(data, f"{name}_limit", None) or SAMPLE, SAMPLE)
        try:
            # With the run's own limits: what was measured of distilled pairs is of just these ids.
            splits[name] = read_preferences(config, named, pair=pair, name=name, limit=limit)
        except (MinillmError, OSError) as raised:
            found.append(of_error("data", raised, why=UNREADABLE))
    return splits, found


def lengths(patient: Patient) -> Iterator[Finding]:
    """Prompts longer than the run allows, and what becomes of them; responses too."""
    data, most = patient.config.data, patient.config.data.max_prompt_tokens
    for name, split in patient.splits.items():
        sizes = [len(prompt.ids) for prompt in split.prompts]
        long, share = _share(sum(size > most for size in sizes), len(sizes))
        words = f"{name}: {long} of {counted(len(sizes), 'prompt')} ({share:.1%}) over {most:,} tokens"
        mend = f"raise data.max_prompt_tokens (the longest here has {max(sizes):,})"
        if long and data.over_long == "error":
            yield error(
                "lengths",
                words,
                why="data.over_long is 'error': the run does not start",
                mend=f"{mend}, or choose data.over_long: drop or keep_right",
            )
        elif share > MUCH:
            fate = "left out" if data.over_long == "drop" else "cut at their beginning"
            yield warning("lengths", words, why=f"they are {fate} (data.over_long: {data.over_long})", mend=mend)
        else:
            yield ok("lengths", f"{words}; the longest has {max(sizes):,}")


def responses(patient: Patient) -> Iterator[Finding]:
    """Responses that are missing, too long, or hold the end-of-text token, where a stage learns from them."""
    split = patient.splits.get("train")
    needed = {
        stage.name: patient.config.responses_needed(stage) for stage in patient.config.trained if stage.reads == "train"
    }
    learners = [name for name, which in needed.items() if which != "none"]
    if split is None or not learners:
        return
    rows, most = split.prompts, patient.config.decoding.max_new_tokens
    who = f"stage {', '.join(learners)} learns from responses"
    absent = sum(not prompt.responses for prompt in rows)
    inside = sum(bool(prompt.responses) and not prompt.response_ids for prompt in rows)
    long, share = _share(sum(len(prompt.response_ids) > most for prompt in rows), len(rows))
    if absent == len(rows):
        yield error(
            "responses",
            f"train: none of {counted(len(rows), 'row')} has a response",
            why=who,
            mend="give the rows a 'response' field, or take that stage out",
        )
        return
    if absent:
        yield note(
            "responses",
            f"train: {absent:,} of {counted(len(rows), 'row')} have no response",
            why=f"{who}, and passes over those",
        )
    if inside:
        yield warning(
            "responses",
            f"train: {inside:,} of {counted(len(rows), 'response')} hold the end-of-text token",
            why="decoding ends at the first such token, so what stands behind it is never written: they are not learnt",
            mend="take the token out of the responses; it is added by itself",
        )
    strict = patient.config.data.over_long == "error" and all(which == "all" for which in needed.values())
    if long and strict:
        yield error(
            "responses",
            f"train: {long:,} responses ({share:.1%}) over {most:,} tokens",
            why="data.over_long is 'error': the run does not start",
            mend="raise decoding.max_new_tokens, or set data.over_long: drop",
        )
    elif share > MUCH:
        yield warning(
            "responses",
            f"train: {long:,} responses ({share:.1%}) over {most:,} tokens",
            why=f"{who}; longer ones are left out",
            mend="raise decoding.max_new_tokens",
        )
    elif not inside:
        yield ok(
            "responses", f"train: {len(rows) - absent:,} of {counted(len(rows), 'row')} have one; {share:.1%} too long"
        )


def preferences(patient: Patient) -> Iterator[Finding]:
    """Stages that name pairs which are not there, or want soft targets that nothing gives or another teacher gave."""
    teacher = None if patient.teacher is None else patient.teacher.card
    pair = dataclasses.replace(student_alone(patient), teacher_card=teacher)
    for stage in patient.config.trained:
        if not isinstance(stage, PreferenceStage) or not patient.splits.keys() >= pair_sources(patient.config).keys():
            continue  # what could not be read is told already
        if stage.chunk is not None and len(patient.splits["preferences"].prompts) >= SAMPLE:
            continue  # chunks are of all rows
        check_pairs(patient.config, stage, patient.splits, pair=pair)
        yield ok("preferences", f"stage {stage.name}: its pairs are there, and what its target needs")


def rows_per_step(patient: Patient) -> Iterator[Finding]:
    """Whether each rank has a row in each step."""
    for stage in patient.config.trained:
        rows, ranks = stage.rows_per_step, patient.ranks
        if rows < ranks:
            yield error(
                "rows-per-step",
                f"stage {stage.name}: {rows:,} rows a step for {ranks} ranks",
                why="every rank needs a row",
                mend=f"raise its batch or prompts to {ranks} at least, or start fewer ranks",
            )
        elif rows % ranks:
            yield note(
                "rows-per-step",
                f"stage {stage.name}: {rows:,} rows a step for {ranks} ranks, not the same number each",
                why="some ranks wait for the others",
                mend=f"take a multiple of {ranks}",
            )
        else:
            yield ok("rows-per-step", f"stage {stage.name}: {rows // ranks:,} rows a step on each rank")


def held_out(patient: Patient) -> Iterator[Finding]:
    """Held-out prompts that stand among the training rows, word for word, as their files have them."""
    config = patient.config
    train = config.data.train
    others = {
        name: source for name, source in sources(config).items() if name.partition(" ")[0] in {"validation", "test"}
    }
    if train is None or not others:
        return

    def texts(source: str) -> Iterator[str]:
        rows, _ = read_rows(source, broken=config.data.broken, max_broken=config.data.max_broken)
        limit = config.data.train_limit if source == train else None
        yield from (raw_text(row) for row in islice(rows, limit or COMPARED))

    yield from shared(texts, train=train, others=others)


def held_out_of(splits: Mapping[str, AnySplit], *, most: int) -> Iterator[Finding]:
    """The same of prompts that are read already, as models see them, in the first ``most`` rows of each."""
    held_out = {"validation", "test", "preferences_validation"}
    others = {name: name for name in splits if name.partition(" ")[0] in held_out}

    def texts(name: str) -> Iterator[str]:
        prompts: Iterator[Prompt] = islice(splits[name].prompts, most)
        yield from (prompt.text for prompt in prompts)

    for learnt in ("train", "preferences") if others else ():
        if learnt in splits:
            yield from shared(texts, train=learnt, others=others, called=learnt)


def shared(
    texts: Callable[[str], Iterator[str]], *, train: str, others: Mapping[str, str], called: str = "train"
) -> Iterator[Finding]:
    """How many texts of each of the others stand in ``train`` too."""
    wanted = {name: list(texts(source)) for name, source in others.items()}
    every = {text for own in wanted.values() for text in own}
    seen = {text for text in texts(train) if text in every}
    for name, own in wanted.items():
        again, share = _share(sum(text in seen for text in own), len(own))
        words = f"{name}: {again:,} of {counted(len(own), 'prompt')} ({share:.1%}) stand in {called} too, word for word"
        if again:
            yield warning(
                "held-out",
                words,
                why="what a model has trained on says nothing of what it can do",
                mend="take these rows out of one of the two files",
            )
        else:
            yield ok("held-out", f"{name}: none of {counted(len(own), 'prompt')} stands in {called}")


def _share(some: int, of_all: int) -> tuple[int, float]:
    return some, some / of_all if of_all else 0.0

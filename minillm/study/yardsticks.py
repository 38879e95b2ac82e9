"""What stands beside the arms to measure them by: the teacher, and the nearest training answer.

Each is one small JSON in RESULTS/yardsticks, kept as a cell is: made once, and made again where settings, models or
data that it depends on have changed. They are measured with the recipe's settings and those of the whole study, at its
first seed; what a single arm replaces has no part in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm import api
from minillm.cards import load_card
from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError
from minillm.evaluation import of_text
from minillm.evaluation_sets import read_sets
from minillm.pairs import check_pair
from minillm.prompts import encode
from minillm.ranks import Ranks
from minillm.report_files import read_samples
from minillm.results import judge_of, versions
from minillm.rows import read_rows
from minillm.study.cells import Asked, asked_of_run, code_digest, differs, forget_digests, read_cell, write_cell
from minillm.study.config import StudyConfig
from minillm.study.make import alone, figures, log_into, make_model
from minillm.study.nearest import nearest, words_of
from minillm.types import Purpose

TEACHER, NEAREST = "teacher", "nearest"
LABELS = {TEACHER: "teacher", NEAREST: "nearest answer"}
FOLDER = "yardsticks"
NO_PART = {
    "engine", "engine.student", "student", "corpus data", "validation data", "teacher_text data", "preferences data",
    "preferences_validation data",
}  # fmt: skip
NO_PART_BELOW = (
    "stages.", "data.corpus", "data.validation", "data.teacher_text", "data.preferences", "data.single_turn",
    "data.chunks",
)  # fmt: skip
"""Settings and sources that training reads, and no yardstick."""
OF_TRAINING_ROWS = ("data.train", "train data")
"""What the nearest answer alone depends on."""


def asked_yardsticks(study: StudyConfig) -> dict[str, Asked]:
    """What each yardstick has to be made from; empty where the study wants none, without one that there cannot be."""
    wanted: dict[str, Asked] = {}
    for name in LABELS if study.yardsticks else ():
        run = study.yardstick_config(name)
        if (run.teacher if name == TEACHER else run.data.train) is not None:
            file = Path(study.results) / FOLDER / f"{name}.json"
            wanted[name] = asked_of_run(study, run, name=name, file=file)
    return wanted


def read_yardsticks(study: StudyConfig) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The yardsticks that are what the study asks for now, and notes on the others."""
    found, notes = {}, []
    for name, wanted in asked_yardsticks(study).items():
        stored, changed = _stored(name, wanted)
        if stored is not None and not changed:
            found[name] = stored
            if stored["code"] != code_digest():
                notes.append(f"yardstick {name} was made by another version of the code")
        else:
            why = f"left out, since it differs in {', '.join(changed)}" if changed else "not there yet"
            notes.append(f"{wanted.file}: {why}")
    if study.yardsticks and study.yardstick_config(TEACHER).teacher is None:
        notes.append(f"no yardstick {TEACHER}: the recipe names none")
    return found, notes


def make_yardsticks(study: StudyConfig, *, again: bool, say: Callable[[str], None]) -> None:
    """Makes the yardsticks that are lacking, or all with ``again``. Every rank of a launcher must call it.

    Raises ``DataError`` where what one is made from changed while it was made, and what an evaluation raises.
    """
    for name, wanted in asked_yardsticks(study).items():
        ranks = Ranks(threads=wanted.run.threads)
        folder = Path(wanted.run.out) / wanted.run.name
        with alone(folder.with_name(f".{folder.name}.lock"), ranks=ranks):
            stored, changed = _stored(name, wanted)
            if stored is not None and not changed and not again:
                continue
            if changed and ranks.first:
                say(f"{wanted.file}: made again, since it differs in {', '.join(changed)}")
            with log_into(Path(wanted.run.out) / f"{wanted.run.name}.log", first=ranks.first):
                found = _make(name, wanted, ranks=ranks)
            forget_digests()
            now = asked_yardsticks(study)[name]
            if _part(name, differs({"config": wanted.config, "made_from": wanted.made_from}, now)):
                raise DataError(f"{wanted.file}: its recipe, models or data changed while it was made; it is not kept")
            ranks.of_first(lambda wanted=wanted, found=found: write_cell(wanted, found))  # type: ignore[misc]
            if ranks.first:
                say(f"yardstick {name}: made")


def at_temperature(yardstick: Mapping[str, Any], temperature: str) -> Mapping[str, Any]:
    """A yardstick's figures; those of one that has no temperature are the same at each."""
    own: Mapping[str, Any] = yardstick.get("measures") or yardstick["temperatures"].get(temperature, {})
    return own


def told(yardsticks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader has to know of them, a line each."""
    lines = []
    if TEACHER in yardsticks:
        lines.append(f"{LABELS[TEACHER]}: evaluated as the cells are, with the first of the study's seeds.")
    if NEAREST in yardsticks:
        of = yardsticks[NEAREST]["prompts"]
        lines.append(
            f"{LABELS[NEAREST]}: to each test prompt the answer to the training prompt that is nearest in words "
            f"(tf-idf, of {of['train']:,}); of {of['test']:,} test prompts {of['same']:,} have the very words of one, "
            f"{of['without']:,} share no word with any."
        )
    return lines


def _stored(name: str, wanted: Asked) -> tuple[dict[str, Any] | None, list[str]]:
    stored = read_cell(wanted.file)
    return stored, [] if stored is None else _part(name, differs(stored, wanted))


def _part(name: str, changed: Sequence[str]) -> list[str]:
    """Those of the changes that matter to a yardstick."""
    below = (*NO_PART_BELOW, *(OF_TRAINING_ROWS if name == TEACHER else ()))
    return [path for path in changed if path not in NO_PART and not path.startswith(below)]


def _make(name: str, wanted: Asked, *, ranks: Ranks) -> dict[str, Any]:
    for needed in (wanted.teacher, wanted.student):
        if needed is not None:
            make_model(needed, ranks=ranks)
    out = Path(wanted.run.out) / wanted.run.name
    if name == TEACHER:
        assert wanted.run.teacher is not None, "asked for only where there is one"
        api.evaluate(_as_model(wanted.run.teacher), wanted.run, out=out, fresh=True)
        told: dict[str, Any] = {"temperatures": figures(read_samples(out))}
    else:
        told = nearest_answers(wanted.run) if ranks.first else {}
    return {
        "state": "done", "reason": None, "date": time.strftime("%Y-%m-%d"), "training": {}, "versions": versions(),
        **told,
    }  # fmt: skip


def _as_model(teacher: str) -> str:
    """The name by which an evaluation finds a model that a run calls its teacher."""
    try:
        load_card(f"teachers/{teacher}", kind="teachers")
    except ConfigError:
        return teacher
    return f"teachers/{teacher}"


def nearest_answers(run: RunConfig) -> dict[str, Any]:
    """The figures of the nearest training answers to the test prompts: ``measures``, and what there is to be told.

    ``same`` test prompts have the words of a training prompt, in any order; ``without`` share no word with any.
    """
    data = run.data
    assert data.train is not None and isinstance(data.test, str), "load_study sees to that"
    pair = check_pair(run)
    split = read_sets(run, pair)[""]
    judge = judge_of(run, pair, split, teacher=None, purpose=Purpose.EVALUATION)
    train, _ = read_rows(data.train, broken=data.broken, max_broken=data.max_broken)
    test, _ = read_rows(data.test, broken=data.broken, max_broken=data.max_broken)
    known = [row for row in train[: data.train_limit][: data.train_responses] if row.responses]
    rows = {row.uid: row for row in test}
    asked = [words_of(rows[prompt.uid]) for prompt in split.prompts]
    memory = [words_of(row) for row in known]
    places = nearest(memory, asked)
    texts = ["" if place is None else known[place].responses[0].strip() for place in places]
    ids = encode(texts, pair.tokenizer, uids=[prompt.uid for prompt in split.prompts])
    samples = [
        {
            "uid": prompt.uid, "temperature": 0.0, "seed": 0, "response": text, "references": list(prompt.responses),
            "stop": "eos", "tokens": len(own), "measures": of_text(prompt, text, judge),
        }
        for prompt, text, own in zip(split.prompts, texts, ids, strict=True)
    ]  # fmt: skip
    pairs = zip(asked, places, strict=True)
    same = sum(place is not None and sorted(memory[place]) == sorted(words) for words, place in pairs)
    (measured,) = figures(samples).values()
    return {
        "measures": measured,
        "prompts": {"test": len(places), "train": len(known), "same": same, "without": places.count(None)},
    }

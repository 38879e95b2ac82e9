"""One finished cell of a study as a small file: what was run, from what, by which code, and what came out.

A cell counts as done where its configuration, its models and its data are those that the study asks for now. The code
is compared too, but told and not acted upon: most changes of code change no result, and which do, only a person knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from minillm.cards import load_card
from minillm.config import RunConfig
from minillm.engine_settings import read_engine_settings
from minillm.errors import ConfigError, DataError, ModelError
from minillm.loading import by_name, names_a_folder
from minillm.manifests import parsed, sha256_of
from minillm.row_sources import files_of
from minillm.store import make_folder, record_text, write_text
from minillm.study.config import StudyConfig
from minillm.study.texts import StudyText, texts_of
from minillm.world import rows

SCHEMA = 1
NO_PART = ("name", "out", "threads", "trackers", "checkpoints", "student", "teacher")
"""Settings of a run that change no result, and the names of models, which the digests of what they name stand for."""
NO_PART_OF = {
    "evaluation": ("batch_tokens",),
    "engine": ("activation_checkpointing", "gather"),
    "data": ("cache",),
}
"""Settings of a section that change no result. (``evaluation.batch`` is older: without it the models that studies made
would count as others.)"""
SINCE = {
    "lora": None, "bottleneck": None,
    "data.teacher_text": None, "data.train_limit": None, "data.train_responses": None,
    "data.preferences": None, "data.preferences_validation": None, "data.preferences_limit": None,
    "data.single_turn": False, "data.chunks": None, "data.checker": None,
    "evaluation.exposure": None, "evaluation.calibration": False,
    "stages.non_finite": "stop", "stages.max_dropped_rows": 8, "stages.start": None, "stages.anchor": None,
    "stages.chunk": None, "stages.refresh_rejected": False,
}  # fmt: skip
"""Settings that came after the first cells were committed, and the values at which they change nothing. At these they
have no part in the digest of a recipe, or every model that a study made before them would count as another."""
NO_RESULT = (
    *(
        "bench/",
        "diagnose/",
        "selftest/",
        "study/command.py",
        "study/config.py",
        "study/table.py",
        "study/curves.py",
        "study/jobs.py",
        "study/reproduce.py",
        "cli/",
        "study/diversity.py",
        "study/paired.py",
        "study/verdict.py",
        "study/html.py",
        "study/nearest.py",
        "study/yardsticks.py",
        "study/overrides.py",
    ),
    *("doctor/", "plan/", "hosts.py", "hostfile.py", "leash.py", "speed.py", "profiling.py", "introduction.py"),
    *("report.py", "report_html.py", "report_lengths.py", "report_parts.py", "report_style.py", "report_text.py"),
    *("report_extras.py", "report_samples.py", "report_sets.py", "report_words.py", "own_files.py", "plots.py"),
    *("compare/", "judge/", "pair_accuracy.py", "pair_accuracy_command.py", "merge_figures.py", "liti_front.py"),
    *("progress.py", "terminal.py", "model_card.py", "trackers.py"),
    *("generated.py", "generation.py", "generation_parts.py"),
)
"""Files and folders of the library that decide nothing about a cell."""
SOURCES = ("train", "teacher_text", "preferences", "preferences_validation", "validation", "test", "corpus")
"""Settings of ``data`` that name something to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A cell as the study wants it."""

    arm: str
    seed: int
    file: Path
    run: RunConfig
    teacher: RunConfig | None
    """The run that makes its teacher, where the study does."""
    student: RunConfig | None
    texts: tuple[StudyText, ...]
    """What has to be written for it."""
    made_from: dict[str, str]
    """Names models, data and engine settings: digests, known without making anything."""

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings, resolved, without those that change no result."""
        return _settings(self.run)


def asked(study: StudyConfig, arm: str, seed: int) -> Asked:
    """What a cell has to be made from; ``DataError`` or ``ModelError`` where something that it needs is not there."""
    run = study.cell_config(arm, seed)
    teacher = study.teacher_config() if study.makes(arm, "teacher") else None
    student = study.student_config(seed) if study.makes(arm, "student") else None
    return Asked(
        arm=arm, seed=seed, file=study.cell_file(arm, seed), run=run, teacher=teacher, student=student,
        texts=(texts := texts_of(study, arm, seed)),
        made_from=made_from(run, student=student, teacher=teacher, texts=text_digests(study, texts, student=student)),
    )  # fmt: skip


def asked_of_run(study: StudyConfig, run: RunConfig, *, name: str, file: Path) -> Asked:
    """The same of a run that belongs to no arm, called ``name``, at the study's first seed."""
    teacher = study.teacher_config() if study.makes(None, "teacher") else None
    student = study.student_config(study.seeds[0]) if study.makes(None, "student") else None
    return Asked(
        arm=name, seed=study.seeds[0], file=file, run=run, teacher=teacher, student=student, texts=(),
        made_from=made_from(run, student=student, teacher=teacher),
    )  # fmt: skip


def read_cell(file: Path) -> dict[str, Any] | None:
    """A stored cell; None where there is none. ``DataError`` where the file is something else."""
    if not file.is_file():
        return None
    try:
        stored = parsed(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; move it away") from error
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA or not stored.keys() >= NEEDED:
        raise DataError(f"{file}: not a cell of a study; move it away")
    return stored


def differs(stored: Mapping[str, Any], wanted: Asked) -> list[str]:
    """The settings, models and data in which a stored cell is not the one that is wanted; empty where it is.

    A setting that did not exist when the cell was made counts as its default of today, which is how new settings come.
    """
    try:
        before = _flat(_settings(RunConfig(**{**stored["config"], **_OF_THE_STUDY})))
    except ConfigError:
        return ["settings that no longer exist"]
    now, then = _flat(wanted.config), stored["made_from"]
    names = [path for path in {**before, **now} if before.get(path, _GONE) != now.get(path, _GONE)]
    return names + [name for name in {**then, **wanted.made_from} if then.get(name) != wanted.made_from.get(name)]


def sort_out(
    study: StudyConfig, *, arms: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[tuple[str, int], dict[str, Any]], list[tuple[Asked, list[str]]], int]:
    """Cells that are what the study asks for, by arm and seed; those that are not there, or differ in what; and how
    many of the first were made by other code. Seed by seed."""
    there, lacking, older = {}, [], 0
    for seed in seeds:
        for arm in arms:
            wanted = asked(study, arm, seed)
            stored = read_cell(wanted.file)
            changed = [] if stored is None else differs(stored, wanted)
            if stored is None or changed:
                lacking.append((wanted, changed))
            else:
                there[arm, seed] = stored
                older += stored["code"] != code_digest()
    return there, lacking, older


def write_cell(wanted: Asked, found: Mapping[str, Any]) -> None:
    """Keeps what a cell found, whole or not at all."""
    cell = {
        "schema": SCHEMA, "arm": wanted.arm, "seed": wanted.seed, **found,
        "made_from": wanted.made_from, "code": code_digest(), "config": wanted.config,
    }  # fmt: skip
    make_folder(wanted.file.parent, setting="results")
    write_text(wanted.file, record_text(cell))


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the library's files that decide what a cell finds, as they stood when it was first asked for."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(NO_RESULT):
            digest.update(name.encode() + b"\n" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


NEEDED = {"arm", "seed", "state", "training", "made_from", "code", "config"}
_GONE = object()
"""Stands for a setting that one of the two does not have."""
_OF_THE_STUDY = {"name": "cell", "student": "its-own", "teacher": "its-own"}
"""Stand for what a cell's settings leave out, so that they are a whole run's."""


def made_from(
    run: RunConfig, *, student: RunConfig | None, teacher: RunConfig | None, texts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Digests of all that a run reads beside its settings; a model that another run makes counts by that run's.
    ``texts`` are those of text that the study makes, by setting."""
    texts = {} if texts is None else texts
    sources = {split: getattr(run.data, split) for split in SOURCES if split not in texts}
    found = {f"{split} data": _sources_digest(source) for split, source in sources.items() if source is not None}
    found |= {f"{split} data": digest for split, digest in texts.items()}
    found["engine"] = _digest(read_engine_settings(run.engine.student))
    found["student"] = _model_digest(run.student, "students") if student is None else _recipe_digest(student)
    if teacher is not None:
        found["teacher"] = _recipe_digest(teacher)
    elif run.teacher is not None:
        found["teacher"] = _model_digest(run.teacher, "teachers")
    return found


def text_digests(
    study: StudyConfig, texts: Sequence[StudyText], *, student: RunConfig | None
) -> dict[str, str]:  # fmt: skip
    """Names each text by the setting that reads it, known before it is written; ``student`` makes the model that pairs
    are of, where the study does."""
    return {text.reads: _text_digest(study, text, student=student) for text in texts}


def _text_digest(study: StudyConfig, text: StudyText, *, student: RunConfig | None) -> str:
    run, teacher = text.run, study.teacher_config()
    assert run.data.train is not None and run.teacher is not None, "a recipe that distils has both"
    writer = _model_digest(run.teacher, "teachers") if teacher is None else _recipe_digest(teacher)
    wanted = {"rows": run.data.train_limit, "samples": text.samples}
    asked = [wanted, run.decoding.model_dump(), run.data.template, run.data.max_prompt_tokens]
    other = []
    if text.reads == "preferences":
        other.append(_model_digest(run.student, "students") if student is None else _recipe_digest(student))
    return _digest([writer, *other, _source_digest(run.data.train), run.seed, asked])


def _settings(config: RunConfig) -> dict[str, Any]:
    found = {name: value for name, value in config.model_dump(mode="json").items() if name not in NO_PART}
    for section, names in NO_PART_OF.items():
        found[section] = {name: value for name, value in found[section].items() if name not in names}
    return found


def _recipe_digest(config: RunConfig) -> str:
    """Names the student that a run will make."""
    settings = _settings(config)
    for path, nothing in SINCE.items():
        section, _, name = path.rpartition(".")
        inside: Any = settings[section] if section else settings
        for place in inside if section == "stages" else [inside]:
            if name in place and place[name] == nothing:
                del place[name]
    return _digest([settings, made_from(config, student=None, teacher=None)])


@lru_cache(maxsize=64)
def _model_digest(name: str, kind: Literal["students", "teachers"]) -> str:
    card = load_card(name, kind=kind)
    path = card.model or ""
    if names_a_folder(path) and not Path(path).is_dir():
        raise ModelError(f"{name}: there is no folder {path}\n  make that model first, or name another")
    told = {"notes", "licence", "figures", "eos", "pad", "training"}  # of the model, and no choice of it
    unsaid = {
        name for name in ("adapter", "layers", "quantise") if getattr(card, name) is None
    }  # younger than the first cells
    return _digest([card.model_dump(mode="json", exclude=told | unsaid), by_name(card)])


def _sources_digest(source: str | Mapping[str, str]) -> str:
    """The same of one source, or of several with their names, which are in the ids of their rows."""
    if isinstance(source, str):
        return _source_digest(source)
    return _digest({name: _source_digest(each) for name, each in source.items()})


@lru_cache(maxsize=64)
def _source_digest(source: str) -> str:
    """Names what a source holds; one of the hub by its name, since asking for more would want the network."""
    scheme, _, rest = source.partition(":")
    if scheme == "world":
        return _world_digest(rest)
    if scheme in {"hub", "set"}:
        return source
    try:
        files = files_of(source) or (Path(source).expanduser(),)
        found = [sha256_of(file) for file in files]
        # Of one file as it always was; of several the names are in the ids of their rows.
        return found[0] if len(found) == 1 else _digest([[file.name for file in files], found])
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error


@lru_cache(maxsize=4)
def _world_digest(split: str) -> str:
    return _digest(rows(split))


def forget_digests() -> None:
    """Looks at files anew: they may have changed since a study began."""
    for cached in (_model_digest, _source_digest):
        cached.cache_clear()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; a list index is a part like any other."""
    inner: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if inner is None or not value:
        return {path: value}
    parts = ((f"{path}.{name}" if path else str(name), each) for name, each in inner)
    return {key: leaf for at, each in parts for key, leaf in _flat(each, at).items()}

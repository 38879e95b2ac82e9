"""One finished cell of a study as a small file: what was run, from what, by which code, and what came out.

A cell counts as done where its configuration, its models and its data are those that the study asks for now. The code
is compared too, but told and not acted upon: most changes of code change no result, and which do, only a person knows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from minillm.cards import load_card
from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError
from minillm.models import fingerprint
from minillm.store import make_folder, write_text
from minillm.study.config import StudyConfig
from minillm.world import rows

SCHEMA = 1
NO_PART = ("name", "out", "threads", "student", "teacher")
"""Settings of a run that change no result, and the names of models, which the digests of what they name stand for."""
NO_RESULT = ("bench", "diagnose", "selftest", "study", "cli", "report", "plots", "progress", "terminal", "model_card")
"""Modules, by the beginning of their names, that decide nothing about a cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A cell as the study wants it."""

    arm: str
    seed: int
    file: Path
    config: dict[str, Any]
    """The run's settings, resolved, without those that change no result."""
    made_from: dict[str, str]
    """Names models and data: digests, known without making anything."""


def asked(study: StudyConfig, arm: str, seed: int) -> Asked:
    """What a cell has to be made from; ``DataError`` or ``ModelError`` where a file that it needs is not there."""
    config = study.cell_config(arm, seed)
    made_from = {
        f"{split} data": _source_digest(source)
        for split in ("train", "validation", "test", "corpus")
        if (source := getattr(config.data, split)) is not None
    }
    for role, made_by in (("student", study.student_config(seed)), ("teacher", study.teacher_config())):
        named = getattr(config, role)
        if made_by is not None:
            made_from[role] = _recipe_digest(made_by)
        elif named is not None:
            made_from[role] = _model_digest(named, f"{role}s")
    return Asked(
        arm=arm, seed=seed, file=study.cell_file(arm, seed), config=_settings(config), made_from=made_from
    )  # fmt: skip


def read_cell(file: Path) -> dict[str, Any] | None:
    """A stored cell; None where there is none. ``DataError`` where the file is something else."""
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; move it away") from error
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA or "made_from" not in stored:
        raise DataError(f"{file}: not a cell of a study; move it away")
    return stored


def differs(stored: Mapping[str, Any], wanted: Asked) -> list[str]:
    """The settings, models and data in which a stored cell is not the one that is wanted; empty where it is.

    A setting that did not exist when the cell was made counts as its default of today, which is how new settings come.
    """
    try:
        before = _flat(_settings(RunConfig(**{**_OF_THE_STUDY, **stored["config"]})))
    except ConfigError:
        return ["settings that no longer exist"]
    now = _flat({**_settings(RunConfig(**{**_OF_THE_STUDY, **wanted.config}))})
    names = [path for path in {**before, **now} if before.get(path, _GONE) != now.get(path, _GONE)]
    return names + [name for name, digest in wanted.made_from.items() if stored["made_from"].get(name) != digest]


def write_cell(wanted: Asked, found: Mapping[str, Any]) -> None:
    """Keeps what a cell found, whole or not at all."""
    cell = {
        "schema": SCHEMA, "arm": wanted.arm, "seed": wanted.seed, **found,
        "made_from": wanted.made_from, "hash": _digest([wanted.config, wanted.made_from]), "code": code_digest(),
        "config": wanted.config,
    }  # fmt: skip
    make_folder(wanted.file.parent, setting="results")
    write_text(wanted.file, _compact(cell))


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the library's files that decide what a cell finds."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        name = file.relative_to(package).as_posix()
        if not name.startswith(NO_RESULT):
            digest.update(name.encode() + b"\n" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


_GONE = object()
"""Stands for a setting that one of the two does not have."""
_OF_THE_STUDY = {"name": "cell", "student": "its-own", "teacher": "its-own"}
"""Stand for what a cell's settings leave out, so that they are a whole run's."""


def _settings(config: RunConfig) -> dict[str, Any]:
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in NO_PART}


def _recipe_digest(config: RunConfig) -> str:
    """Names the student that a run will make."""
    sources = [source for source in (config.data.train, config.data.validation) if source is not None]
    start = [_model_digest(config.student, "students")]
    if config.teacher is not None:
        start.append(_model_digest(config.teacher, "teachers"))
    return _digest([_settings(config), start, [_source_digest(source) for source in sources]])


def _model_digest(name: str, kind: str) -> str:
    card = load_card(name, kind="teachers" if kind == "teachers" else "students")
    return _digest([card.model_dump(mode="json", exclude={"notes", "licence", "figures"}), fingerprint(card)])


@lru_cache(maxsize=32)
def _source_digest(source: str) -> str:
    """Names what a source holds; a hub data set by its name, since asking for more would want the network."""
    scheme, _, rest = source.partition(":")
    if scheme == "world":
        return _digest(rows(rest))
    if scheme == "hub":
        return source
    try:
        return hashlib.sha256(Path(source).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves by dotted path; a list index is a part like any other."""
    inner: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if inner is None or not value:
        return {path: value}
    return {
        key: leaf for name, each in inner for key, leaf in _flat(each, f"{path}.{name}" if path else str(name)).items()
    }


def _compact(cell: Mapping[str, Any]) -> str:
    """JSON with one line a top-level entry: short, and a change shows in a line of its own."""
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in cell.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"

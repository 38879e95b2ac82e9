"""What is settled for an arm before its cells are made: as many steps as the budget has, and the best of a few values
of one setting. Kept beside the cells, and not made again while what it was made from stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError
from minillm.manifests import parsed
from minillm.measures import temperature_key
from minillm.ranks import Ranks
from minillm.stage_base import BETTER
from minillm.store import make_folder, record_text, write_text
from minillm.study.budget import cost_a_step, course_of, pilot, refined
from minillm.study.cells import SCHEMA, Asked, code_digest, differs, made_from, text_digests
from minillm.study.config import SearchConfig, StudyConfig
from minillm.study.make import log_into, make, make_needed
from minillm.study.texts import texts_of

NEEDED = {"settings", "config", "made_from", "asked"}


def at_the_edge(value: float, tried: Sequence[float]) -> bool:
    """Whether a value is the least or the largest of those that were tried, so that a better one may lie beyond."""
    return value in {min(tried), max(tried)}


def untuned(study: StudyConfig, arms: Sequence[str]) -> dict[str, list[str]]:
    """The arms that have to be tuned, each with what changed since it was (nothing where it never was)."""
    found: dict[str, list[str]] = {}
    for arm in arms if study.tunes else ():
        stored = stored_tuning(study.tuning_file(arm))
        if stored is None:
            found[arm] = []
            continue
        wanted = _asked(study, arm)
        changed = differs(stored, wanted) + ([] if stored["asked"] == _question(study) else ["budget or search"])
        if changed:
            found[arm] = changed
    return found


def tune(study: StudyConfig, arm: str, *, ranks: Ranks, say: Callable[[str], None], again: bool = False) -> None:
    """Makes the pilot and the tries of an arm and keeps what they found; what an earlier search with other values
    found of the same run is taken over, unless ``again``.

    Raises ``ConfigError`` where not one step fits the budget, or every try fails.
    """
    wanted = _asked(study, arm)
    settings: dict[str, Any] = {}
    found: dict[str, Any] = {}
    known = {} if again else _known(study, arm, wanted)
    with log_into(Path(wanted.run.out) / f"{wanted.run.name}.log", first=ranks.first):
        make_needed(wanted, ranks=ranks)
        if study.budget is not None:
            found["pilot"] = known.get("pilot") or pilot(study, arm, study.budget, ranks=ranks)
            settings |= found["pilot"]["settings"]
        if study.search is not None:
            found["tries"] = _tries(study, arm, study.search, settings, known=known.get("tries", []), ranks=ranks)
            settings[study.search.setting] = _best(found["tries"], study.search, arm=arm)
        if study.budget is not None and study.budget.refined:
            found["refined"] = refined(study, arm, study.budget, settings, found.get("tries", []), ranks=ranks)
            settings |= found["refined"]["settings"]
    edge = study.search is not None and at_the_edge(settings[study.search.setting], study.search.values)
    say(f"tuned {arm}: {_in_words(settings)}" + ", at the edge of what was tried" * edge)
    if ranks.first:
        file = study.tuning_file(arm)
        make_folder(file.parent, setting="results")
        record = {
            "schema": SCHEMA, "arm": arm, "settings": settings, **found, "asked": _question(study),
            "made_from": wanted.made_from, "code": code_digest(), "config": wanted.config,
        }  # fmt: skip
        write_text(file, record_text(record))
    ranks.barrier()


def _known(study: StudyConfig, arm: str, wanted: Asked) -> dict[str, Any]:
    """What is stored of the same run, where the question differed in nothing but the values that were tried."""
    stored = stored_tuning(study.tuning_file(arm))
    if stored is None or differs(stored, wanted):
        return {}
    before, now = stored["asked"], _question(study)
    if before.get("budget") != now.get("budget") or _but_values(before) != _but_values(now):
        return {}
    return stored


def _but_values(question: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in question.get("search", {}).items() if name != "values"}


def _question(study: StudyConfig) -> dict[str, Any]:
    """What tuning is asked, as JSON has it."""
    asked = study.model_dump(mode="json", include={"budget", "search"})
    if study.budget is not None and not study.budget.refined:  # as it was asked before there was this setting
        del asked["budget"]["refined"]
    return {name: value for name, value in asked.items() if value is not None}


def _asked(study: StudyConfig, arm: str) -> Asked:
    """The run of an arm before it is tuned, at the seed of the tries."""
    seed = study.tuning_seed
    run = study.arm_config(arm, seed, name=study.run_name("tuning", arm), changes={})
    teacher = study.teacher_config() if study.makes(arm, "teacher") else None
    student = study.student_config(seed) if study.makes(arm, "student") else None
    return Asked(
        arm=arm, seed=seed, file=study.tuning_file(arm), run=run, teacher=teacher, student=student,
        texts=(texts := texts_of(study, arm, seed)),
        made_from=made_from(run, student=student, teacher=teacher, texts=text_digests(study, texts, student=student)),
    )  # fmt: skip


def stored_tuning(file: Path) -> dict[str, Any] | None:
    """What tuning found for an arm; None where it was not tuned. ``DataError`` where the file is something else."""
    if not file.is_file():
        return None
    try:
        stored = parsed(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; move it away") from error
    if not isinstance(stored, dict) or not stored.keys() >= NEEDED:
        raise DataError(f"{file}: not what tuning of a study found; move it away")
    return stored


def _tries(
    study: StudyConfig, arm: str, search: SearchConfig, settings: Mapping[str, Any], *,
    known: Sequence[Mapping[str, Any]], ranks: Ranks,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every value, and what it came to on the validation prompts; None where its training failed."""
    found: list[dict[str, Any]] = []
    for number, value in enumerate(search.values):
        if before := [each for each in known if each["value"] == value]:
            found.append(dict(before[0]))
            continue
        run = study.arm_config(
            arm, search.seed, name=study.run_name("tuning", arm, f"try_{number}"),
            changes={**settings, search.setting: value},
        )  # fmt: skip
        made = make(_judged_by_validation(run), ranks=ranks)
        measured = None
        if made["state"] == "done":
            key = temperature_key(run.evaluation.temperatures[0])
            measured = made["temperatures"][key].get(search.metric)
            if measured is None:
                raise ConfigError(f"search.metric {search.metric!r}: arm {arm} has no such measure")
        tried = {"value": value, search.metric: measured, "reason": made["reason"]}
        if study.budget is not None and study.budget.refined and measured is not None:
            tried["cost"] = cost_a_step(course_of(run), run.trained[-1], study.budget)
        found.append(tried)
    return found


def _best(tries: Sequence[Mapping[str, Any]], search: SearchConfig, *, arm: str) -> float:
    lasting = {each["value"]: each[search.metric] for each in tries if each[search.metric] is not None}
    if not lasting:
        raise ConfigError(f"arm {arm}: every value of {search.setting} failed: {tries[0]['reason']}")
    pick = max if BETTER[search.metric] == "max" else min
    return float(pick(lasting, key=lambda value: lasting[value]))


def _judged_by_validation(run: RunConfig) -> RunConfig:
    """The run with its validation prompts in the place of the test's, at the first temperature."""
    data = run.data.model_copy(update={"test": run.data.validation, "test_limit": run.data.validation_limit})
    once = run.evaluation.model_copy(update={"temperatures": run.evaluation.temperatures[:1]})
    return run.model_copy(update={"data": data, "evaluation": once})


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} {value:g}" for path, value in settings.items())

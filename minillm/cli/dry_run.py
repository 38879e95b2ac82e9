"""What a dry run looks at: all that a run would be refused for before a row is read or a file fetched."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from minillm.errors import DataError

if TYPE_CHECKING:
    from minillm.config import RunConfig
    from minillm.study.config import StudyConfig

FAR = ("hub:", "set:")
"""What sources begin with that are fetched."""


def require_startable(
    config: RunConfig, *, evaluated: str | None = None, made: Collection[str] = (), unwritten: Collection[str] = ()
) -> set[str]:
    """Looks at settings, cards, models and whether the sources are there; the hub models that are not on this machine,
    which were not looked at.

    ``evaluated`` is a model to be measured, of which only test rows are read. A study will have ``made`` the student or
    the teacher, and written the files in ``unwritten``. Raises what the run would.
    """
    from minillm.doctor.data import sources
    from minillm.pairs import check_at_hand
    from minillm.row_sources import CORPUS, PROMPTS, locate
    from minillm.text_stages import KdStage

    away = check_at_hand(config, student=evaluated, made=made)
    for name, source in sources(config).items():
        if not source.startswith(FAR) and source not in unwritten and (evaluated is None or name.startswith("test")):
            locate(source, PROMPTS)
    if evaluated is not None:
        return away
    _require_pairs(config, unwritten=unwritten)
    corpus = config.data.corpus
    if corpus is not None and config.anchored and not corpus.startswith(FAR):
        locate(corpus, CORPUS)
    for stage in config.trained:
        cache = stage.teacher_cache if isinstance(stage, KdStage) else None
        if cache is not None and not Path(cache).is_dir():
            raise DataError(f"{cache}: no such folder; wanted one that 'minillm cache' wrote")
    return away


def _require_pairs(config: RunConfig, *, unwritten: Collection[str]) -> None:
    """Looks whether the sources of pairs are there, and whether stages name those of a mapping."""
    from minillm.config import PreferenceStage
    from minillm.preference_reference import require_sources
    from minillm.row_sources import PAIRS, locate
    from minillm.run_splits import pair_sources

    for named in pair_sources(config).values():
        for source in named.values():
            if not source.startswith(FAR) and source not in unwritten:
                locate(source, PAIRS)
    for stage in config.trained:
        if isinstance(stage, PreferenceStage) and isinstance(config.data.preferences, dict):
            require_sources(stage, config.data.preferences)


def require_study(study: StudyConfig) -> set[str]:
    """The same of every arm, and of the runs that make a study's models."""
    away = set[str]()
    unwritten = [study.taught_file] if study.taught is not None else []
    unwritten += [study.paired_file(study.seeds[0])] if study.paired is not None else []
    for run in (study.teacher_config(), study.student_config(study.seeds[0])):
        if run is not None:
            away |= require_startable(run)
    for arm in study.arms:
        config = study.arm_config(arm, study.seeds[0], name="checked", changes={})
        made = [role for role in ("student", "teacher") if study.makes(arm, role)]
        away |= require_startable(config, made=made, unwritten=unwritten)
    return away


def tell(away: Collection[str]) -> None:
    """Prints what was not looked at, on the first rank."""
    if away and os.environ.get("RANK", "0") == "0":
        print(f"# not looked at, since not on this machine: {', '.join(sorted(away))}", flush=True)

"""Text that a study's models write before its cells learn from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minillm.config import RunConfig
from minillm.study.config import StudyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyText:
    """A file that the study makes, once, for the arms that read it."""

    reads: Literal["teacher_text", "preferences"]
    """The setting of ``data`` that names it."""
    file: Path
    run: RunConfig
    """Whose models answer which of its training prompts."""
    samples: int = 1
    """Answers to each."""


def texts_of(study: StudyConfig, arm: str, seed: int) -> tuple[StudyText, ...]:
    """What has to be written before an arm's cell of this training seed can be made."""
    found = []
    if study.taught is not None and study.learns_from_taught(arm):
        run, file = study.taught_config(), Path(study.taught_file)
        found.append(StudyText(reads="teacher_text", file=file, run=run, samples=study.taught.samples))
    if study.learns_from_paired(arm):
        run, file = study.paired_config(seed), Path(study.paired_file(seed))
        found.append(StudyText(reads="preferences", file=file, run=run))
    return tuple(found)

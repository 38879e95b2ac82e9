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

    reads: Literal["teacher_text"]
    """The setting of ``data`` that names it."""
    file: Path
    run: RunConfig
    """Whose models answer which of its training prompts."""
    samples: int
    """Answers to each."""


def texts_of(study: StudyConfig, arm: str) -> tuple[StudyText, ...]:
    """What has to be written before an arm's cells can be made."""
    if study.taught is None or not study.learns_from_taught(arm):
        return ()
    run = study.taught_config()
    return (StudyText(reads="teacher_text", file=Path(study.taught_file), run=run, samples=study.taught.samples),)

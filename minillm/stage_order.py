"""Which stage starts from which: stages stand in a list, and each may start from any that stands before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from minillm.errors import ConfigError, did_you_mean
from minillm.stage_base import OWN_START, BaseStage

AnyOf = TypeVar("AnyOf", bound=BaseStage)


def source_of(stage: AnyOf, stages: Sequence[AnyOf]) -> AnyOf | None:
    """The stage whose student this one starts from; None where it starts from the run's own."""
    at = stages.index(stage)
    if stage.start is None:
        return stages[at - 1] if at else None
    return next((each for each in stages[:at] if each.name == stage.start), None)


def check_starts(stages: Sequence[BaseStage]) -> None:
    """Raise ``ConfigError`` where two stages have one name, or one starts from what no stage before it hands on."""
    for at, stage in enumerate(stages):
        before = [each.name for each in stages[:at]]
        where = f"stages.{at} ('{stage.name}')"
        if stage.name in before:
            raise ConfigError(f"{where} has the name of an earlier stage; give it another name")
        if stage.start is None:
            continue
        if stage.start == OWN_START and OWN_START in before:
            raise ConfigError(
                f"{where} starts from '{OWN_START}', which is the run's own student and a stage as well; "
                "give that stage another name"
            )
        known = [OWN_START, *before]
        if stage.start not in known:
            near = did_you_mean(stage.start, known) or f"; wanted one of {', '.join(known)}"
            raise ConfigError(f"{where} starts from {stage.start!r}, which is no stage before it{near}")


def start_words(stages: Sequence[BaseStage]) -> list[str]:
    """A line for each stage that does not start from the one before it."""
    named = {OWN_START: "the run's own student"}
    return [
        f"stage {stage.name}: starts from {named.get(stage.start, f'the student of stage {stage.start}')}"
        for stage in stages
        if stage.start is not None
    ]

"""Which stage starts from which: stages stand in a list, and each may start from any that stands before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from minillm.errors import ConfigError, UnsupportedCombination, did_you_mean
from minillm.merge_stage import MergeStage
from minillm.stage_base import OWN_START, NamedStage

AnyOf = TypeVar("AnyOf", bound=NamedStage)


def source_of(stage: AnyOf, stages: Sequence[AnyOf]) -> AnyOf | None:
    """The stage whose student this one starts from; None where it starts from the run's own."""
    at = stages.index(stage)
    if stage.start is None:
        return stages[at - 1] if at else None
    return next((each for each in stages[:at] if each.name == stage.start), None)


def check_starts(stages: Sequence[NamedStage]) -> None:
    """Raise ``ConfigError`` where two stages have one name, one that of the run's own student, if any starts from that
    (merges write it beside the stages' students), or one starts from what no stage before it hands on."""
    own = next((each.name for each in stages if each.start == OWN_START), None)
    for at, stage in enumerate(stages):
        before = [each.name for each in stages[:at]]
        where = f"stages.{at} ('{stage.name}')"
        if stage.name in before:
            raise ConfigError(f"{where} has the name of an earlier stage; give it another name")
        if stage.name == OWN_START and own is not None:
            raise ConfigError(
                f"{where} is called as the run's own student is, from which stage '{own}' starts; give it another name"
            )
        if stage.start is None:
            continue
        known = [OWN_START, *before]
        if stage.start not in known:
            near = did_you_mean(stage.start, known) or f"; wanted one of {', '.join(known)}"
            raise ConfigError(f"{where} starts from {stage.start!r}, which is no stage before it{near}")
        if isinstance(stage, MergeStage):
            _check_merged(stage, stages, before=before, where=where)


def _check_merged(stage: MergeStage, stages: Sequence[NamedStage], *, before: Sequence[str], where: str) -> None:
    """Raise where a merge names what is no stage before it, or one that did not start where the merge says."""
    source = source_of(stage, stages)
    for name in stage.of:
        if name not in before:
            near = did_you_mean(name, before) or f"; wanted some of {', '.join(before) or 'none: it is the first'}"
            raise ConfigError(f"{where} merges {name!r}, which is no stage before it{near}")
        found = source_of(stages[before.index(name)], stages)
        if found is not source:
            begun = f"stage {found.name}" if found is not None else f"'{OWN_START}'"
            raise UnsupportedCombination(
                f"{where} merges what was learnt since {stage.start!r}, but stage {name} started from {begun}; "
                f"set 'start: {stage.start}' there, or merge others"
            )


def check_adapted(stages: Sequence[NamedStage], *, adapter: str) -> None:
    """Raise where students with an adapter of this kind ('lora', 'bottleneck', "" for none) cannot be merged, or would
    go on from what is no base with an adapter."""
    for at, stage in enumerate(stages):
        source = source_of(stage, stages)
        if adapter == "bottleneck" and isinstance(stage, MergeStage):
            raise UnsupportedCombination(
                f"stages.{at} ('{stage.name}') merges students with a bottleneck: each makes the MLPs wider than those "
                "of the start, and units that were trained apart do not add up; use lora, or leave the merge out"
            )
        if adapter and isinstance(source, MergeStage) and not isinstance(stage, MergeStage):
            raise UnsupportedCombination(
                f"stages.{at} ('{stage.name}') starts from stage {source.name}, which merges, with {adapter}: adapters "
                "are merged as whole weights, and no adapter of that student is left to go on from; let the merge be "
                f"the last stage, or leave {adapter} out"
            )


def start_words(stages: Sequence[NamedStage]) -> list[str]:
    """A line for each stage that does not start from the one before it, and for each merge."""
    named = {OWN_START: "the run's own student"}
    words = []
    for stage in stages:
        if stage.start is None:
            continue
        start = named.get(stage.start, f"the student of stage {stage.start}")
        if isinstance(stage, MergeStage):
            words.append(f"stage {stage.name}: merges {', '.join(stage.of)} by {stage.method}, from {start} on")
        else:
            words.append(f"stage {stage.name}: starts from {start}")
    return words

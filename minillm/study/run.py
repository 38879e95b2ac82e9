"""Making the cells that a study lacks, seed by seed, so that what is there so far is balanced."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.errors import DataError
from minillm.preflight import require_checked_rows
from minillm.ranks import Ranks
from minillm.rows import counted
from minillm.store import make_folder
from minillm.study.cells import Asked, asked, code_digest, differs, forget_digests, sort_out, write_cell
from minillm.study.config import StudyConfig
from minillm.study.make import log_into, make, make_needed
from minillm.study.tuning import tune, untuned

SHOWN = ("validity", "coverage", "rouge_l", "reverse_kl")
"""Measures in the line of a finished cell, where it has them."""


def run_study(
    study: StudyConfig, *, arms: Sequence[str], seeds: Sequence[int], again: bool, say: Callable[[str], None]
) -> None:
    """Makes the cells of these arms and seeds that are not there, or all of them with ``again``.

    A cell that ends in numbers that are not finite, or in an alarm that stops, is a finding and kept as failed; any
    other error ends the study. ``say`` hears a line a cell. Every rank of a launcher must call it. Raises ``DataError``
    where what a cell is made from changed while it was made, or its checker has nothing to check.
    """
    ranks = Ranks(threads=study.cell_config(arms[0], seeds[0]).threads)
    tell = say if ranks.first else _quiet
    if ranks.first:
        make_folder(Path(study.results), setting="results")
    for arm in arms:  # a cell is trained before its test set is read
        require_checked_rows(study.cell_config(arm, seeds[0]))
    code_digest()  # of the code that runs, before anybody changes it
    _tune(study, arms, again=again, ranks=ranks, say=tell)
    todo = cells_to_make(study, arms=arms, seeds=seeds, again=again, say=tell)
    began = time.monotonic()
    for number, wanted in enumerate(todo, start=1):
        found = make_cell(study, wanted, ranks=ranks)
        tell(progress_line(wanted, found, made=number, of=len(todo), began=began))


def make_cell(study: StudyConfig, wanted: Asked, *, ranks: Ranks) -> dict[str, Any]:
    """One cell, what it needs first; kept in its file. ``DataError`` where what it is made from
    changed meanwhile."""
    with log_into(Path(wanted.run.out) / f"{wanted.run.name}.log", first=ranks.first):
        make_needed(wanted, ranks=ranks)
        found = make(wanted.run, ranks=ranks)
    forget_digests()
    if differs({"config": wanted.config, "made_from": wanted.made_from}, asked(study, wanted.arm, wanted.seed)):
        raise DataError(f"{wanted.file}: its recipe, models or data changed while it was made; it is not kept")
    ranks.of_first(lambda: write_cell(wanted, found))
    return found


def progress_line(wanted: Asked, found: Mapping[str, Any], *, made: int, of: int, began: float) -> str:
    """A finished cell in a line: how far the study is, the figures, the seconds left at this rate."""
    left = (time.monotonic() - began) * (of - made) / made
    return f"{made}/{of}  {wanted.arm} seed {wanted.seed}: {_in_words(found)}  {left:.0f} s left"


def _tune(study: StudyConfig, arms: Sequence[str], *, again: bool, ranks: Ranks, say: Callable[[str], None]) -> None:
    """Settles what the budget and the search leave open, for the arms where that is not there."""
    for arm in arms_to_tune(study, arms, again=again, say=say):
        tune(study, arm, ranks=ranks, say=say, again=again)


def arms_to_tune(study: StudyConfig, arms: Sequence[str], *, again: bool, say: Callable[[str], None]) -> list[str]:
    """The arms of which tuning is not there, or not any more."""
    open_arms = {arm: [] for arm in arms} if again and study.tunes else untuned(study, arms)
    for arm, changed in open_arms.items():
        if changed:
            say(f"{study.tuning_file(arm)}: made again, since it differs in {', '.join(changed)}")
    return list(open_arms)


def cells_to_make(
    study: StudyConfig, *, arms: Sequence[str], seeds: Sequence[int], again: bool, say: Callable[[str], None]
) -> list[Asked]:
    """The cells to be made, in order; everything else about them is told."""
    if again:
        todo = [asked(study, arm, seed) for seed in seeds for arm in arms]
        say(f"study {study.name}: {len(todo)} cells to make, those that are there again")
        return todo
    there, lacking, older = sort_out(study, arms=arms, seeds=seeds)
    for wanted, changed in lacking:
        if changed:
            say(f"{wanted.file}: made again, since it differs in {', '.join(changed)}")
    say(f"study {study.name}: {counted(len(lacking), 'cell')} to make, {len(there)} there already")
    if older:
        say(f"note: {older} of them were made by another version of the code; --again makes them anew")
    return [wanted for wanted, _ in lacking]


def _in_words(found: Mapping[str, Any]) -> str:
    training = found["training"]
    if found["reason"] is not None:
        return f"failed: {found['reason']}"
    headline = next(iter(found["temperatures"].values()))
    figures = "  ".join(f"{name} {headline[name]:.3f}" for name in SHOWN if name in headline)
    return f"{figures}  {training['cpu_seconds']:.0f} CPU s"


def _quiet(line: str) -> None:
    """For the ranks that do not speak."""

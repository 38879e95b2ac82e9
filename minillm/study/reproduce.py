"""One committed cell, made again from nothing and held against its file: do the table's figures come out here too?

On the machine and with the versions that made it, a cell comes out the same to the last digit. Elsewhere sums are taken
in another order, training takes another path, and what can be asked is that the figures are as near as ``within`` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.errors import ConfigError, DataError
from minillm.measures import MEASURES, temperature_key
from minillm.ranks import Ranks
from minillm.results import versions
from minillm.study.cells import Asked, asked, code_digest, differs, read_cell
from minillm.study.config import StudyConfig
from minillm.study.make import log_into, make, make_needed
from minillm.terminal import print_table

SHORT = 12
"""Characters of a digest that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One figure of the cell: as committed, as made again, and how far apart they may be."""

    measure: str
    expected: float
    seen: float | None
    within: float

    @property
    def holds(self) -> bool:
        """Whether it came out again; a figure that is gone did not."""
        return self.seen is not None and abs(self.seen - self.expected) <= self.within


def reproduce(study: StudyConfig, arm: str, seed: int) -> bool:
    """Makes a cell's models and the cell again, prints each figure beside the committed one; whether all hold.

    The cell's file stays as it is. Raises ``ConfigError`` where the study does not say how near figures must be,
    ``DataError`` where there is no such cell, or it was made from something else than the study now names.
    """
    if not study.within:
        raise ConfigError("'within' is empty: wanted a tolerance for each measure, such as {validity: 0.03}")
    wanted, stored = asked(study, arm, seed), _stored(study, arm, seed)
    ranks = Ranks(threads=wanted.run.threads)
    if ranks.first:
        _print_provenance(wanted, stored)
    run = wanted.run.model_copy(update={"name": study.run_name("reproduced", arm, seed)})
    with log_into(Path(run.out) / f"{run.name}.log", first=ranks.first):
        make_needed(wanted, ranks=ranks)
        found = make(run, ranks=ranks)
    held = hold(study, stored, found, temperature=temperature_key(run.evaluation.temperatures[0]))
    if ranks.first:
        _print(held, title=f"{study.name}: {arm}, seed {seed}, made again", reason=found["reason"])
    return all(each.holds for each in held)


def hold(
    study: StudyConfig, stored: Mapping[str, Any], found: Mapping[str, Any], *, temperature: str
) -> list[Held]:  # fmt: skip
    """The committed figures that have a tolerance, each beside what was found now."""
    expected = stored["temperatures"][temperature]
    seen = found.get("temperatures", {}).get(temperature, {})
    missing = [measure for measure in study.within if measure not in expected]
    if missing:
        raise ConfigError(f"within: the cell has no measure {missing[0]!r}; it has {', '.join(_measures(expected))}")
    return [
        Held(measure=measure, expected=expected[measure], seen=seen.get(measure), within=within)
        for measure, within in study.within.items()
    ]


def _measures(figures: Mapping[str, Any]) -> list[str]:
    return [name for name in figures if name in MEASURES]


def _stored(study: StudyConfig, arm: str, seed: int) -> dict[str, Any]:
    file = study.cell_file(arm, seed)
    stored = read_cell(file)
    if stored is None:
        raise DataError(f"{file}: there is no such cell to make again")
    if stored["state"] != "done":
        raise DataError(f"{file}: this cell failed ({stored['reason']}); wanted one with figures")
    changed = differs(stored, asked(study, arm, seed))
    if changed:
        raise DataError(
            f"{file}: made from something else than the study names now; it differs in {', '.join(changed)}"
        )
    return stored


def _print_provenance(wanted: Asked, stored: Mapping[str, Any]) -> None:
    print(f"{wanted.file}, made on {stored['date']}")
    for what, digest in wanted.made_from.items():
        print(f"  {what}: {digest[:SHORT]}, the same")
    print(f"  code: {'the same' if stored['code'] == code_digest() else 'another version'}")
    now = versions()
    for what, version in stored["versions"].items():
        print(f"  {what}: {version}" + ("" if now.get(what) == version else f", here {now.get(what)}"), flush=True)


def _print(held: list[Held], *, title: str, reason: str | None) -> None:
    rows = []
    for each in held:
        digits = MEASURES[each.measure].digits + 1
        seen = (
            ("–", "–") if each.seen is None else (f"{each.seen:.{digits}f}", f"{each.seen - each.expected:+.{digits}f}")
        )
        verdict = "holds" if each.holds else "DOES NOT HOLD"
        rows.append([MEASURES[each.measure].label, f"{each.expected:.{digits}f}", *seen, f"{each.within:g}", verdict])
    print_table(title, ("", "committed", "now", "difference", "within", ""), rows)
    if reason is not None:
        print(f"it failed: {reason}")

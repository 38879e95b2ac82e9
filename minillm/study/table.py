"""A study's cells as tables, a plot and JSON: means over training seeds, and differences paired by seed.

Intervals here are over *training seeds* (Student's t, in ``paired``), not over prompts: they say how far a figure moves
when the same run is made again with other random numbers. With few seeds they are wide, as they should be.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minillm.measures import MEASURES
from minillm.study.cells import sort_out
from minillm.study.config import StudyConfig
from minillm.study.paired import paired, spread, stars
from minillm.study.tuning import untuned
from minillm.study.yardsticks import LABELS, at_temperature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cells = Mapping[str, Mapping[int, dict[str, Any]]]
"""Arm -> seed -> finished cell."""
UNEQUAL = 0.05
"""Share of the budget from which on a difference from it is told."""


def read_cells(study: StudyConfig) -> tuple[dict[str, dict[int, dict[str, Any]]], list[str]]:
    """The cells that are what the study asks for now, and notes on the others."""
    there, lacking, older = sort_out(study, arms=list(study.arms), seeds=study.seeds)
    found: dict[str, dict[int, dict[str, Any]]] = {arm: {} for arm in study.arms}
    for (arm, seed), cell in there.items():
        found[arm][seed] = cell
    notes = [f"{at.file}: left out, since it differs in {', '.join(names)}" for at, names in lacking if names]
    stale = {arm: changed for arm, changed in untuned(study, list(study.arms)).items() if changed}
    notes += [f"{study.tuning_file(arm)}: out of date, since it differs in {', '.join(c)}" for arm, c in stale.items()]
    if older:
        notes.append(f"{older} cells were made by another version of the code")
    return found, notes


def summary(study: StudyConfig, cells: Cells) -> dict[str, Any]:
    """Every arm's figures over its seeds, and its differences from ``compare_with`` on the seeds that both have."""
    return {
        "study": study.name,
        "compare_with": study.compare_with,
        "budget": None if study.budget is None else {"unit": study.budget.unit, "amount": study.budget.amount},
        "arms": {
            arm: {
                "settings": study.arms[arm],
                "done": sorted(done := _done(cells[arm])),
                "failed": {seed: cell["reason"] for seed, cell in cells[arm].items() if cell["state"] == "failed"},
                "cpu_seconds": spread([cells[arm][seed]["training"]["cpu_seconds"] for seed in done]),
                "tokens": spread([cells[arm][seed]["training"]["tokens"] for seed in done]),
                "took": _took(study, [cells[arm][seed]["training"] for seed in done]),
                "alarms": _alarms(cells[arm]),
                "temperatures": _temperatures(cells[arm], cells[study.compare_with]),
            }
            for arm in study.arms
        },
    }


def headline_rows(found: Mapping[str, Any], temperature: str, measures: Sequence[str]) -> list[list[str]]:
    """One row an arm: seeds, mean and standard deviation of each measure, what it cost."""
    rows = []
    for arm, of in found["arms"].items():
        at = of["temperatures"].get(temperature, {})
        cells = [_plus_minus(at.get(name, {}).get("mean"), at.get(name, {}).get("sd"), name) for name in measures]
        seeds = f"{len(of['done'])}" + (f"\n{len(of['failed'])} failed" if of["failed"] else "")
        cost = of["cpu_seconds"]["mean"]
        rows.append([arm, seeds, *cells, "–" if cost is None else f"{cost:.0f}"])
    return rows


def yardstick_rows(found: Mapping[str, Any], temperature: str, measures: Sequence[str]) -> list[list[str]]:
    """The same of the yardsticks, which have neither seeds nor a cost of training."""
    rows = []
    for name, yardstick in found["yardsticks"].items():
        at = at_temperature(yardstick, temperature)
        rows.append([LABELS[name], "–", *(_plus_minus(at.get(measure), None, measure) for measure in measures), "–"])
    return rows


def words(found: Mapping[str, Any]) -> list[str]:
    """Whose budget was not met, which alarms rang in how many seeds, and what failed: a line each."""
    lines = _unequal(found)
    for arm, of in found["arms"].items():
        seeds = len(of["done"]) + len(of["failed"])
        if of["alarms"]:
            rang = ", ".join(f"{name} ({count} of {seeds} seeds)" for name, count in of["alarms"].items())
            lines.append(f"alarms rang in {arm}: {rang}")
        lines += [f"failed: {arm}, seed {seed}: {reason}" for seed, reason in of["failed"].items()]
    return lines


def _took(study: StudyConfig, trainings: Sequence[Mapping[str, Any]]) -> float | None:
    """What the last stage took of the budget, in the mean; None where there is none, or cells do not tell (seconds)."""
    if study.budget is None or study.budget.unit == "seconds" or not trainings:
        return None
    return statistics.fmean(each.get("last_stage", each)[study.budget.unit] for each in trainings)


def _unequal(found: Mapping[str, Any]) -> list[str]:
    """The arms that took clearly more or less than the budget has."""
    budget = found["budget"]
    if budget is None:
        return []
    off = {arm: of["took"] / budget["amount"] - 1 for arm, of in found["arms"].items() if of["took"] is not None}
    told = [f"{arm} {100 * share:+.0f} %" for arm, share in off.items() if abs(share) > UNEQUAL]
    return [f"not at the budget of {budget['amount']:,g} {budget['unit']}: {', '.join(told)}"] if told else []


def difference_rows(found: Mapping[str, Any], measure: str) -> list[list[str]]:
    """One row an arm: its difference from the arm that all are compared with, at each temperature."""
    rows = []
    for arm, of in found["arms"].items():
        if arm != found["compare_with"]:
            changes = [at.get(measure, {}).get("difference") for at in of["temperatures"].values()]
            rows.append([arm, *(_change(change, measure) for change in changes)])
    return rows


def diversity_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row an arm: seeds, the other's mean temperature, and the difference in each measure, at equal diversity."""
    rows = []
    for arm, of in found["arms"].items():
        left, mean = len(of["left_out"]), of["mean_temperature"]
        seeds = f"{len(of['temperatures'])}" + (f"\n{left} left out" if left else "")
        changes = (_change(of["differences"][name], name) for name in found["measures"])
        rows.append([arm, seeds, "–" if mean is None else f"{mean:.2f}", *changes])
    return rows


def draw_plot(found: Mapping[str, Any], *, measures: Sequence[str], temperature: str) -> Figure:
    """Each arm's seeds as points with their mean, one panel a measure."""
    from matplotlib.figure import Figure

    arms = list(found["arms"])
    figure = Figure(figsize=(4.2 * len(measures), 1.0 + 0.34 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for place, arm in enumerate(arms):
            at = found["arms"][arm]["temperatures"].get(temperature, {}).get(measure)
            if at is None:
                continue
            axes.plot(at["per_seed"], [place] * len(at["per_seed"]), "o", color="#9db4c9", markersize=4)
            axes.plot([at["mean"]], [place], "|", color="#1f4e79", markersize=14, markeredgewidth=2)
        axes.set(title=f"{MEASURES[measure].label}, temperature {temperature}")
        axes.set_yticks(range(len(arms)), arms, fontsize=8)
        axes.grid(axis="x", linewidth=0.4)
    panels[0].invert_yaxis()
    return figure


def _done(of_arm: Mapping[int, dict[str, Any]]) -> list[int]:
    return [seed for seed, cell in of_arm.items() if cell["state"] == "done"]


def _alarms(of_arm: Mapping[int, dict[str, Any]]) -> dict[str, int]:
    """How many seeds each alarm rang in."""
    counts: dict[str, int] = {}
    for cell in of_arm.values():
        for name in cell["training"].get("alarms", {}):
            counts[name] = counts.get(name, 0) + 1
    return counts


def _temperatures(own: Mapping[int, dict[str, Any]], other: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """By temperature, each with its kinds of prompts: figures of the seeds that are done."""

    def at(cells: Mapping[int, dict[str, Any]], key: str) -> dict[int, dict[str, Any]]:
        return {seed: cells[seed]["temperatures"][key] for seed in _done(cells) if key in cells[seed]["temperatures"]}

    def of_length(cells: Mapping[int, dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
        return {seed: found["by_length"][name] for seed, found in cells.items() if name in found["by_length"]}

    by_temperature = {}
    for key in dict.fromkeys(key for seed in _done(own) for key in own[seed]["temperatures"]):
        ours, theirs = at(own, key), at(other, key)
        lengths = dict.fromkeys(name for found in ours.values() for name in found["by_length"])
        by_temperature[key] = {
            **_figures(ours, theirs),
            "by_length": {name: _figures(of_length(ours, name), of_length(theirs, name)) for name in lengths},
        }
    return by_temperature


def _figures(own: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Of each measure: mean and spread over the seeds that have it, and the difference paired by seed."""
    found = {}
    for name in MEASURES:
        values = {seed: each[name] for seed, each in own.items() if name in each}
        pairs = [value - other[seed][name] for seed, value in values.items() if name in other.get(seed, {})]
        if values:
            found[name] = {
                **spread(list(values.values())), "per_seed": list(values.values()), "difference": paired(pairs),
            }  # fmt: skip
    return found


def _plus_minus(mean: float | None, deviation: float | None, name: str) -> str:
    if mean is None:
        return "–"
    digits = MEASURES[name].digits
    return f"{mean:.{digits}f}" + ("" if deviation is None else f"\n± {deviation:.{digits}f}")


def _change(change: Mapping[str, Any] | None, name: str) -> str:
    """A difference with its interval and its stars."""
    if change is None or change["mean"] is None:
        return "–"
    digits, ends = MEASURES[name].digits, change["ci95"]
    if ends is None:
        return f"{change['mean']:+.{digits}f}"
    return f"{change['mean']:+.{digits}f}{stars(change)}\n{ends[0]:+.{digits}f} {ends[1]:+.{digits}f}"

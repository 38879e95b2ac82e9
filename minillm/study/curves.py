"""What validation said while a study's cells were trained, against what training had taken by then."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minillm.measures import MEASURES
from minillm.study.table import Cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS_AGAINST = {
    "tokens": "response tokens learnt from",
    "update": "updates",
    "seconds": "seconds of training and validation",
}
"""What curves are drawn against, by its name in a cell."""
COLOURS = 10
"""That matplotlib has before it begins again."""


def draw_curves(cells: Cells, *, measures: Sequence[str], against: str) -> tuple[Figure, list[str]]:
    """Validation measures while training: of each arm the mean over its seeds, and the seeds behind it. The arms drawn.

    ``against`` is ``tokens``, ``update`` or ``seconds``: what training had taken by then. Cells that do not say (they
    were made before) are left out, and so are arms whose validation has none of the measures.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(measures), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    drawn: dict[str, str] = {}
    for axes, measure in zip(panels, measures, strict=True):
        for number, (arm, of_arm) in enumerate(cells.items()):
            courses = courses_of(of_arm, measure, against)
            if not courses:
                continue
            drawn.setdefault(arm, f"C{number % COLOURS}")
            style = "-" if number < COLOURS else "--"
            for course in courses:
                axes.plot(*zip(*course, strict=True), style, color=drawn[arm], linewidth=0.6, alpha=0.3)
            axes.plot(*zip(*mean_course(courses), strict=True), style, color=drawn[arm], linewidth=2, label=arm)
        axes.set(title=f"{MEASURES[measure].label}, validation prompts", xlabel=LABELS_AGAINST[against])
        axes.grid(linewidth=0.4)
    if drawn:
        panels[0].legend(fontsize=8)
    return figure, list(drawn)


def courses_of(of_arm: Mapping[int, Mapping[str, Any]], measure: str, against: str) -> list[list[tuple[float, float]]]:
    """A list of points for each seed of an arm whose validations have the measure."""
    courses = [_validations(cell, measure, against) for cell in of_arm.values() if cell["state"] == "done"]
    return [course for course in courses if course]


def mean_course(courses: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of the seeds at each validation. They validate at the same steps; one that stopped early has fewer."""
    points = [[course[at] for course in courses if at < len(course)] for at in range(max(map(len, courses)))]
    return [
        (statistics.fmean(x for x, _ in each), statistics.fmean(y for _, y in each)) for each in points
    ]  # fmt: skip


def _validations(cell: Mapping[str, Any], measure: str, against: str) -> list[tuple[float, float]]:
    return [
        (line[against], line[measure])
        for line in cell["training"]["validations"]
        if against in line and line.get(measure) is not None
    ]

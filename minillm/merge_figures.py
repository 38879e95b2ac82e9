"""What a merge is drawn as: how far its models went apart, and what lies between them and their start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minillm.plots import drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MADE_BY = "minillm merge"
BIN_DEGREES = 15
"""Width of a bar of the histogram."""
COLOUR, INK = "#3b6ea5", "#222222"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measure of one model: its value, and its interval where there is one."""

    mean: float
    ci95: tuple[float, float] | None

    @property
    def reach(self) -> list[list[float]]:
        """How far the interval goes to both sides; an interval of a skewed bootstrap may lie beside its mean."""
        low, high = self.ci95 or (self.mean, self.mean)
        return [[max(self.mean - low, 0.0)], [max(high - self.mean, 0.0)]]


def histogram(degrees: Sequence[float]) -> list[int]:
    """How many angles there are in each ``BIN_DEGREES`` of the half circle."""
    counts = [0] * (180 // BIN_DEGREES)
    for each in degrees:
        counts[min(int(each // BIN_DEGREES), len(counts) - 1)] += 1
    return counts


def angles_png(degrees: Sequence[float], *, title: str) -> bytes:
    """The histogram of a merge's angles, as the content of a file."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure()
    axes = figure.subplots()
    begins = range(0, 180, BIN_DEGREES)
    axes.bar(begins, histogram(degrees), width=BIN_DEGREES, align="edge", color=COLOUR, edgecolor="white")
    axes.axvline(90.0, color=INK, linewidth=0.8, linestyle="--")
    axes.set(xlim=(0, 180), xticks=range(0, 181, 30), xlabel="angle between two task vectors, degrees",
             ylabel="layer groups and pairs of models")  # fmt: skip
    axes.set_title(title, loc="left", fontsize=10)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn(figure, ".png", made_by=MADE_BY)


def front_png(
    points: Sequence[tuple[float, Measured, Measured]], *, x: str, y: str, title: str
) -> bytes:  # fmt: skip
    """Models between a start and a merge, each an eta and two measures with intervals, as the content of a file."""
    figure = _figure()
    axes = figure.subplots()
    axes.plot([at.mean for _, at, _ in points], [up.mean for *_, up in points], color=COLOUR, linewidth=1.2, alpha=0.6)
    for eta, at, up in points:
        axes.errorbar(
            at.mean, up.mean, xerr=at.reach, yerr=up.reach, fmt="o", color=COLOUR, ecolor=INK, elinewidth=0.8,
            capsize=2.5, markersize=5,
        )  # fmt: skip
        axes.annotate(f"{eta:g}", (at.mean, up.mean), (5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(linewidth=0.4)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=10)
    return drawn(figure, ".png", made_by=MADE_BY)


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(5.6, 3.8), layout="constrained")

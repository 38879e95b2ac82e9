"""Small plots as SVG text that sits inside an HTML page and takes its colours and font from the page.

matplotlib draws with stand-in colours; they are replaced by CSS variables afterwards (``--ink``, ``--grid``,
``--c0`` to ``--c7``), so that one plot serves a light and a dark page. Text stays text. Nothing global is touched:
no pyplot, no backend switch, settings in a context of their own.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm.errors import ConfigError
from minillm.own_files import OwnFile
from minillm.store import require_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 8
FILE_ENDINGS = (".png", ".svg", ".pdf")
"""What a plot can be written as, where a file is asked for."""
DOTS_PER_INCH = 150
PNG = b"\x89PNG\r\n\x1a\n"
INK, GRID = "#010a0b", "#010a0c"
STAND_IN = tuple(f"#010b0{n}" for n in range(COLOURS))
MARKERS = "os^Dv<P*"
LINES = ("-", "--", ":")
"""Of the first, second and third series that share a colour; their markers are hollow from the second on."""
SIZE_INCHES = (4.4, 3.0)
ROW_INCHES = 0.24
"""What a row of bars or intervals needs at least, so that their names do not meet."""
LONGEST_HEADING = 44
"""Characters of a heading above a group of bars."""
LARGE = 10_000
"""From here on an axis says 20k, or its numbers would meet."""
POINTS_AT_MOST = 240
"""Longer curves are averaged in blocks: a curve of 10,000 steps would weigh more than the whole page."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "minillm",
    "text.parse_math": False,  # a model named $x$ is a name, not a formula
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    **{key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
}


Bar = tuple[str, int, float, tuple[float, float] | None]
"""Name, colour, value, interval or None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one model or run, joined in the order given.

    Example: validity of one model over three temperatures, with intervals:
    ``Series(colour=1, x=(1.0, 0.8, 0.6), y=(.73, .79, .82), low=(.70, .76, .79), high=(.76, .82, .85))``.
    """

    colour: int
    """Which of the page's colours; counts round after ``COLOURS``, with other lines. The marker goes with it."""
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    faint: bool = False
    """Thin, pale and without markers: the noisy figures of single training steps."""
    band: bool = False
    """A line in a band, without markers: curves of many points."""
    labels: tuple[str, ...] = ()
    """A few characters beside each point, or none."""


def require_outputs(*, json_file: Path | None, plot: Path | None) -> None:
    """Raise ``ConfigError`` or ``DataError`` where what a command is to write into these files could not be written."""
    require_kind(plot)
    if plot is not None and plot == json_file:
        raise ConfigError(f"--json and --plot are both {plot}; name two files")
    for file in (json_file, plot):
        if file is not None:
            require_writable(file)


def require_kind(plot: Path | None, *, option: str = "--plot") -> None:
    """Raise ``ConfigError`` for a file of which no drawing can be made."""
    if plot is not None and plot.suffix not in FILE_ENDINGS:
        raise ConfigError(f"{option} {plot}: wanted a file ending in {', '.join(FILE_ENDINGS)}")


def drawing_file(file: Path, *, made_by: str) -> OwnFile:
    """A .png, .svg or .pdf from ``drawn``, told from other drawings by who it says made it."""
    return OwnFile(file=file, what=f"a drawing by `{made_by}`", known=lambda content: _made_by(content, made_by))


def drawn(figure: Figure, kind: str, *, made_by: str) -> bytes:
    """A figure as the content of a file whose ending is ``kind`` (".png"), which says who made it."""
    out = io.BytesIO()
    field = "Software" if kind == ".png" else "Creator"
    figure.savefig(out, format=kind.removeprefix("."), dpi=DOTS_PER_INCH, metadata={field: made_by})
    return out.getvalue()


def _made_by(content: bytes, made_by: str) -> bool:
    mark = made_by.encode()
    if content.startswith(PNG):
        text = b"Software\0" + mark
        return struct.pack(">I", len(text)) + b"tEXt" + text in content
    if content.startswith(b"%PDF"):
        return b"/Creator (" + mark + b")" in content
    # matplotlib's own place for it, at the head and before anything that is drawn.
    head = content.partition(b"</metadata>")[0]
    return b"<svg" in head and b"<dc:creator>" in head and b"<dc:title>" + mark + b"</dc:title>" in head


def lines(
    series: Sequence[Series],
    *,
    key: str,
    title: str,
    x: str,
    y: str,
    falling: bool = False,
    diagonal: bool = False,
) -> str:
    """SVG of curves; ``key`` makes the ids of this plot unique in its page. ``falling`` turns the x axis round;
    ``diagonal`` is for shares on both axes, and draws where they are equal."""

    def draw(axes: Axes) -> None:
        if diagonal:
            axes.plot((0.0, 1.0), (0.0, 1.0), color=INK, linewidth=1.0, alpha=0.45)
        for one in series:
            _curve(axes, one)
        _label(axes, series)
        axes.set(xlabel=x, ylabel=y)
        if falling:
            axes.invert_xaxis()
        if max((at for one in series for at in one.x), default=0.0) >= LARGE:
            from matplotlib.ticker import EngFormatter

            axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    return _svg(draw, key=key, title=title)


def bars(rows: Sequence[Bar], *, key: str, title: str, digits: int) -> str:
    """SVG of horizontal bars, first row on top."""
    return bar_groups([("", rows)], key=key, title=title, digits=digits)


def bar_groups(groups: Sequence[tuple[str, Sequence[Bar]]], *, key: str, title: str, digits: int) -> str:
    """SVG of horizontal bars on one axis, in groups with a heading each ("" for none), the first on top."""
    places: list[tuple[int, Bar]] = []
    headings: list[tuple[int, str]] = []
    below = 0
    for heading, rows in groups:
        if heading:
            headings.append((below, _short(heading, LONGEST_HEADING)))
            below += 1
        places += [(below + number, row) for number, row in enumerate(rows)]
        below += len(rows)

    def draw(axes: Axes) -> None:
        for place, (_, colour, value, ends) in places:
            _bar(axes, place, colour=colour, value=value, ends=ends, digits=digits)
        for place, heading in headings:
            axes.annotate(
                heading, (0.0, place), (4, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
                va="center", fontweight="bold",
            )  # fmt: skip
        axes.set_yticks([place for place, _ in places], [_short(row[0]) for _, row in places])
        if headings:  # they are no data: without limits the axis would leave out one at an end
            axes.set_ylim(-0.6, below - 0.4)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.22)

    return _svg(draw, key=key, title=title, rows=below)


def _bar(axes: Axes, place: int, *, colour: int, value: float, ends: tuple[float, float] | None, digits: int) -> None:
    # Pale in a full edge: an interval's ink is not lost on the bar, in dark pages above all.
    axes.barh(place, value, color=STAND_IN[colour % COLOURS], height=0.62, alpha=0.45, linewidth=0)
    axes.barh(place, value, fill=False, edgecolor=STAND_IN[colour % COLOURS], height=0.62, linewidth=1.2)
    if ends is not None:
        # An interval of a skewed bootstrap may lie beside its mean; a negative length is not drawable.
        reach = [[max(value - ends[0], 0.0)], [max(ends[1] - value, 0.0)]]
        axes.errorbar(value, place, xerr=reach, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    edge = max([value, *(ends or ())])
    axes.annotate(_rounded(value, digits), (max(edge, 0.0), place), (5, 0), textcoords="offset points", va="center")


def differences(
    rows: Sequence[tuple[str, int, float, tuple[float, float] | None, str]], *, key: str, title: str, digits: int
) -> str:
    """SVG of differences with their intervals beside a line at zero, first row on top: (name, colour, value, interval
    or None, what to put behind the number). What excludes zero is drawn in full, the rest pale."""

    def draw(axes: Axes) -> None:
        axes.axvline(0.0, color=INK, linewidth=1.0, linestyle="--")
        for place, (_, colour, value, ends, mark) in enumerate(rows):
            sure = ends is not None and not ends[0] <= 0 <= ends[1]
            low, high = ends or (value, value)
            axes.plot(
                (low, high), (place, place), color=STAND_IN[colour % COLOURS], alpha=1.0 if sure else 0.5,
                linewidth=3.5, solid_capstyle="butt",
            )  # fmt: skip
            axes.plot((value,), (place,), "|", color=INK, markersize=9, markeredgewidth=2)
            text = _rounded(value, digits)
            text = f"+{text}" if float(f"{value:.{digits}f}") > 0 else text
            axes.annotate(f"{text}{mark}", (max(high, 0.0), place), (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [_short(name) for name, *_ in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.22)

    return _svg(draw, key=key, title=title, rows=len(rows))


def block_means(x: Sequence[float], y: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """The points, or their means in equal blocks when they are too many to draw, and the block's size."""
    block = -(-len(x) // POINTS_AT_MOST) if x else 1
    if block == 1:
        return tuple(x), tuple(y), 1

    def mean(values: Sequence[float], start: int) -> float:
        part = values[start : start + block]
        return sum(part) / len(part)

    starts = range(0, len(x), block)
    return tuple(mean(x, s) for s in starts), tuple(mean(y, s) for s in starts), block


def _curve(axes: Axes, one: Series) -> None:
    colour, marker = STAND_IN[one.colour % COLOURS], MARKERS[one.colour % COLOURS]
    if one.faint:
        axes.plot(one.x, one.y, color=colour, linewidth=1.0, alpha=0.6)
        return
    if one.band:
        if one.low is not None and one.high is not None:
            axes.fill_between(one.x, one.low, one.high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(one.x, one.y, color=colour, linewidth=1.6)
        return
    if one.low is not None and one.high is not None:
        reach = [
            [max(y - low, 0.0) for y, low in zip(one.y, one.low, strict=True)],
            [max(high - y, 0.0) for y, high in zip(one.y, one.high, strict=True)],
        ]
        axes.errorbar(one.x, one.y, yerr=reach, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2.5, alpha=0.7)
    again = one.colour // COLOURS
    axes.plot(
        one.x, one.y, color=colour, marker=marker, markersize=4.5, linewidth=1.6,
        linestyle=LINES[again % len(LINES)], markerfacecolor="none" if again else colour,
    )  # fmt: skip


def _label(axes: Axes, series: Sequence[Series]) -> None:
    """The labels beside their points, each in the first corner that is free of other labels and points."""
    points = [(x, y, label) for one in series for x, y, label in zip(one.x, one.y, one.labels, strict=False)]
    if not points:
        return
    # Where things will be, in points, once the limits are settled: asking for them settles them.
    axes.get_xlim(), axes.get_ylim()
    scale = 72.0 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    at_N2 = axes.transData.transform([(x, y) for x, y, _ in points]) * scale
    least, most = axes.bbox.x0 * scale, axes.bbox.x1 * scale + 15
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in at_N2]
    for (x, y, label), (left, low) in zip(points, at_N2, strict=True):
        wide = 5.0 * len(label)
        corners = [(5.0, 4.0), (5.0, -10.0), (-wide - 4, -10.0), (-wide - 4, 4.0)]
        boxes = [(left + a, low + b, left + a + wide, low + b + 7) for a, b in corners]
        # Over the edge there are the figures of the axis.
        met = [sum(_meet(box, other) for other in taken) + (not least < box[0] < box[2] < most) for box in boxes]
        best = met.index(min(met))
        taken.append(boxes[best])
        axes.annotate(label, (x, y), corners[best], textcoords="offset points", fontsize=8)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes (left, low, right, high) share a part."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _rounded(value: float, digits: int) -> str:
    """A number as the tables have it: with a minus sign, and without one where it rounds to 0."""
    text = f"{value:.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _svg(draw: Callable[[Axes], None], *, key: str, title: str, rows: int = 0) -> str:
    """``rows`` that stand on top of each other make a drawing higher, where there are many."""
    import matplotlib
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # The browser draws the letters; whether matplotlib's own font has them does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        made = Figure(figsize=(SIZE_INCHES[0], max(SIZE_INCHES[1], 0.8 + ROW_INCHES * rows)), layout="constrained")
        axes = made.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left")
        made.savefig(out, format="svg", transparent=True)
    return _inline(out.getvalue(), key=key, title=title)


def _inline(svg: str, *, key: str, title: str) -> str:
    """The drawing as an element of a page: no prolog, metadata or namespaces, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    for number, colour in enumerate(STAND_IN):
        svg = svg.replace(colour, f"var(--c{number})")
    svg = svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    svg = re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-labelledby="{key}-t">', svg
    )
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return svg.replace(">", f'><title id="{key}-t">{label}</title>', 1)


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"

"""What lies between a start and the merge of models that were trained from it: a model at each of several etas, and
what each is worth (LITI's front: what merging gained against what the start could do before)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm import api
from minillm.config import RunConfig
from minillm.errors import ConfigError, did_you_mean
from minillm.measures import MAIN, MEASURES, QUALITIES
from minillm.merge_figures import Measured, front_png
from minillm.merge_models import merge_at, require_etas
from minillm.merge_places import FRONT
from minillm.merge_report import eta_words
from minillm.ranks import Ranks
from minillm.report_files import sets_in
from minillm.report_text import figure, interval
from minillm.rows import counted
from minillm.store import write_bytes, write_text
from minillm.terminal import print_table
from minillm.weight_merging import Method

RECORD, PLOT = FRONT, "front.png"
Measures = Mapping[str, Mapping[str, Any]]
"""By name, as in results.json; of several sets by SET:MEASURE."""


def merge_front(
    start: Path, models: Sequence[Path], config: RunConfig, *, into: Path, method: Method,
    weights: Sequence[float] | None = None, etas: Sequence[float], x: str | None = None, y: str | None = None,
    say: Callable[[str], None] = print, fresh: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Merges once, writes a model at each of ``etas`` into ``into``/eta-ETA/student, and evaluates each on the test
    prompts of ``config`` by ``api.evaluate``; writes and gives back the front (``front.json``, ``front.png``).

    ``x`` and ``y`` are the measures to draw, of several test sets SET:MEASURE. Without them the quality of the first
    set is drawn against that of the second or, of a single set, against the reverse KL. Models and evaluations that
    are there already are taken as they are; an interrupted front goes on. ``fresh`` makes all of them again, and is
    what replaces those of other models, another method or other weights.

    Works for a single process and on every rank of a launcher. Errors are those of ``merge_folders`` and
    ``api.evaluate``; a measure that no evaluation has is a ``ConfigError``.
    """
    _require_known(x, y)
    ranks = Ranks(threads=config.threads)
    require_etas(etas)
    wanted = sorted(etas)
    sources = ranks.of_first(
        lambda: merge_at(start, models, into=into, method=method, weights=weights, etas=wanted, say=say, fresh=fresh)
    )
    points: list[dict[str, Any]] = []
    for eta in wanted:
        at = into / f"eta-{eta_words(eta)}"
        results = api.evaluate(at / "student", config, out=at, fresh=fresh)
        points.append({"eta": eta, "folder": at.name, "measures": _measures(results)})
        x, y = _axes(points[0]["measures"], x, y)  # before hours go by for a measure that is not there
    front = {**sources, "x": x, "y": y, "points": points}
    if ranks.first:
        write_text(into / RECORD, json.dumps(front, indent=2) + "\n")
        write_bytes(into / PLOT, _drawn(front))
        _tell(front)
        for line in _not_drawn(front):
            say(line)
        say(f"written: {into / RECORD}, {into / PLOT}")
    ranks.barrier()
    return front


def _measures(results: Mapping[str, Any]) -> dict[str, Any]:
    if names := sets_in(results):
        return {f"{name}:{key}": of for name in names for key, of in results["sets"][name]["measures"].items()}
    return dict(results["measures"])


def _axes(measures: Measures, x: str | None, y: str | None) -> tuple[str, str]:
    """What to draw: the names given, if they are there, or the usual ones."""
    there = [name for name, found in measures.items() if found.get("mean") is not None]
    sets = list(dict.fromkeys(name.rpartition(":")[0] for name in there))
    best = [next((name for name in _of_set(one, QUALITIES) if name in there), None) for one in sets]
    usual_x = (
        best[1] if len(best) > 1 else next((name for name in _of_set(sets[0], ("reverse_kl",)) if name in there), None)
    )
    found = []
    for option, given, usual in (("x", x, usual_x), ("y", y, best[0])):
        name = given or usual
        if name is None or name not in there:
            got = f"got {name!r}" if name else "nothing to draw by itself"
            raise ConfigError(
                f"--{option}: {got}, wanted a measure that the evaluations have: {', '.join(there)}"
                f"{did_you_mean(name or '', there)}"
            )
        found.append(name)
    return found[0], found[1]


def _of_set(name: str, measures: Sequence[str]) -> list[str]:
    return [f"{name}:{measure}" if name else measure for measure in measures]


def _require_known(*axes: str | None) -> None:
    for given in axes:
        if given is not None and (name := given.rpartition(":")[2]) not in MEASURES:
            raise ConfigError(
                f"{given!r}: no measure{did_you_mean(name, MEASURES)}; wanted one of {', '.join(MEASURES)}, of several "
                "test sets as SET:MEASURE"
            )


def _label(name: str) -> str:
    of_set, _, measure = name.rpartition(":")
    return f"{MEASURES[measure].label}{f', {of_set}' if of_set else ''}"


def _drawn(front: Mapping[str, Any]) -> bytes:
    axes: tuple[str, str] = (front["x"], front["y"])
    points = []
    for point in front["points"]:
        if _missing(point, axes):
            continue
        at, up = (
            Measured(mean=of["mean"], ci95=None if of["ci95"] is None else (of["ci95"][0], of["ci95"][1]))
            for of in (point["measures"][name] for name in axes)
        )
        points.append((point["eta"], at, up))
    title = f"{counted(len(front['models']), 'model')} merged ({front['method']}), by eta"
    return front_png(points, x=_label(axes[0]), y=_label(axes[1]), title=title)


def _missing(point: Mapping[str, Any], axes: Sequence[str]) -> list[str]:
    """Those of the axes that a point has no figure for."""
    return [name for name in axes if (point["measures"].get(name) or {}).get("mean") is None]


def _not_drawn(front: Mapping[str, Any]) -> Iterator[str]:
    """A line for each point that is in the record and not in the picture."""
    for point in front["points"]:
        if missing := _missing(point, (front["x"], front["y"])):
            eta, what = eta_words(point["eta"]), " and no ".join(map(_label, missing))
            yield f"eta {eta} is not drawn: it has no {what} (infinite where a model forbids a token)"


def _tell(front: Mapping[str, Any]) -> None:
    """A row for each eta: what is drawn with intervals, then other main measures."""
    axes = [front["x"], front["y"]]
    first: Measures = front["points"][0]["measures"]
    others = [
        name for name, found in first.items()
        if name not in axes and name.rpartition(":")[2] in MAIN and found.get("mean") is not None
    ]  # fmt: skip
    columns = ["eta", *(part for name in axes for part in (_label(name), "95 %")), *map(_label, others)]
    rows = []
    for point in front["points"]:
        found = point["measures"]
        drawn = [part for name in axes for part in (_figure(found, name), _ends(found, name))]
        rows.append([eta_words(point["eta"]), *drawn, *(_figure(found, name) for name in others)])
    print_table("From the start (eta 0) to the merge (eta 1)", columns, rows, spare=list(map(_label, others))[::-1])


def _figure(found: Measures, name: str) -> str:
    return figure((found.get(name) or {}).get("mean"), name.rpartition(":")[2])


def _ends(found: Measures, name: str) -> str:
    """An interval in one word, so that a narrow terminal does not break it."""
    return interval(found.get(name), name.rpartition(":")[2]).replace(" to ", "–")

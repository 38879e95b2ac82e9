"""Exposure bias and calibration on the report's page: what is drawn, and the figures beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minillm import plots
from minillm.report_text import DASH, MINUS, clean

Evaluations = Mapping[str, Mapping[str, Any]]
Labelled = Mapping[str, Any]
LONGEST_TITLE = 24
"""Characters of a teacher's name above a drawing."""
ABOUT_EXPOSURE = (
    "How much more a student errs, added up to each length, on its own text than on its teacher's: per cent of the KL "
    "from the teacher on the teacher's text. Means at each position are over the responses still alive there, counted "
    "in the table (of the student's text and of the teacher's); positions with too few are left out. Bands are 95 % "
    "intervals over prompts, of each length by itself."
)
ABOUT_CALIBRATION = (
    "A model that is as right as it is sure lies on the diagonal; below it the model is too sure. ECE is the mean "
    "distance from it; chance makes it positive, so compare models on the same rows only. Intervals are over prompts."
)
KINDS = {"references": "tokens of the references", "choices": "labelled choices"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """A section of the page, of plain text and drawings."""

    heading: str
    models: tuple[str, ...]
    """Those that the legend names."""
    drawings: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def chapters(evaluations: Evaluations, colour: Mapping[str, int]) -> list[Chapter]:
    """One chapter for each of the two that some model was measured on."""
    exposed = {name: about["exposure"] for name, about in evaluations.items() if about.get("exposure")}
    sure = {name: about["calibration"] for name, about in evaluations.items() if about.get("calibration")}
    found = [_exposure(exposed, evaluations, colour)] if exposed else []
    return [*found, *([_calibration(sure, colour)] if sure else [])]


def without_curves(about: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation says of itself, less what has a chapter or a section of its own."""
    return {name: value for name, value in about.items() if name not in ("exposure", "calibration", "by_length")}


def _exposure(exposed: Mapping[str, Labelled], evaluations: Evaluations, colour: Mapping[str, int]) -> Chapter:
    teachers = {name: str((evaluations[name].get("teacher") or {}).get("name", DASH)) for name in exposed}
    named = f" against {_short(next(iter(teachers.values())))}" if len(set(teachers.values())) == 1 else ""
    series = [_curve(found, colour[name]) for name, found in exposed.items() if found["positions"]]
    drawing = plots.lines(series, key="exposure", title=f"ExAccErr{named}", x="tokens", y="per cent") if series else ""
    rows = []
    for name, found in exposed.items():
        alive = [found["alive"][kind][-1] if found["positions"] else 0 for kind in ("student", "teacher")]
        value, ends = (found[key][-1] if found["positions"] else None for key in ("ex_acc_err", "ci95"))
        rows.append(
            (
                *(name, teachers[name], str(found["positions"]), _figure(value, 1), _interval(ends, 1)),
                *(f"{alive[0]:,} and {alive[1]:,}", str(found["left_out"])),
            )
        )
    return Chapter(
        heading="Exposure bias",
        models=tuple(exposed),
        drawings=(drawing,) if drawing else (),
        head=("", "teacher", "at length", "ExAccErr, %", "95 % interval", "alive there", "positions left out"),
        rows=tuple(rows),
        note=ABOUT_EXPOSURE,
    )


def _short(name: str) -> str:
    """The end of a path, or of a name too long for a title; of a student in a run's folder the run."""
    parts = [part for part in clean(name).split("/") if part]
    last = parts[-2] if len(parts) > 1 and parts[-1] == "student" else parts[-1] if parts else DASH
    return last if len(last) <= LONGEST_TITLE else last[: LONGEST_TITLE - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _curve(found: Labelled, colour: int) -> plots.Series:
    """ExAccErr over length, thinned where it is very long; lengths without a value left out."""
    step = -(-found["positions"] // plots.POINTS_AT_MOST)
    last = found["positions"] - 1
    kept = [n for n in range(last + 1) if (last - n) % step == 0 and found["ex_acc_err"][n] is not None]
    ends = [found["ci95"][n] for n in kept]
    bounded = bool(kept) and None not in ends
    return plots.Series(
        colour=colour,
        x=tuple(float(n + 1) for n in kept),
        y=tuple(found["ex_acc_err"][n] for n in kept),
        low=tuple(low for low, _ in ends) if bounded else None,
        high=tuple(high for _, high in ends) if bounded else None,
        band=True,
    )


def _calibration(sure: Mapping[str, Labelled], colour: Mapping[str, int]) -> Chapter:
    drawings, rows = [], []
    for kind, told in KINDS.items():
        having = {name: found[kind] for name, found in sure.items() if found.get(kind, {}).get("curve")}
        if not having:
            continue
        series = [_reliability(found["curve"], colour[name]) for name, found in having.items()]
        title = f"Reliability, {told}"
        drawings.append(
            plots.lines(series, key=f"calibration-{kind}", title=title, x="confidence", y="share right", diagonal=True)
        )
        rows += list(_calibration_rows(having, told))
    return Chapter(
        heading="Calibration",
        models=tuple(sure),
        drawings=tuple(drawings),
        head=("", "on", "ECE", "95 % interval", "share right", "mean confidence", "answers", "bins"),
        rows=tuple(rows),
        note=ABOUT_CALIBRATION,
    )


def _calibration_rows(having: Mapping[str, Labelled], told: str) -> Iterator[tuple[str, ...]]:
    for name, found in having.items():
        figures = (_figure(found[key], 3) for key in ("accuracy", "confidence"))
        counts = (f"{found['answers']:,}", str(found["bins"]))
        yield (name, told, _figure(found["ece"], 3), _interval(found["ci95"], 3), *figures, *counts)


def _reliability(curve: Sequence[Labelled], colour: int) -> plots.Series:
    ends = [part["ci95"] for part in curve]
    bounded = None not in ends
    return plots.Series(
        colour=colour,
        x=tuple(part["confidence"] for part in curve),
        y=tuple(part["accuracy"] for part in curve),
        low=tuple(low for low, _ in ends) if bounded else None,
        high=tuple(high for _, high in ends) if bounded else None,
    )


def _figure(value: float | None, digits: int) -> str:
    if value is None:
        return DASH
    text = f"{value:.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", MINUS)


def _interval(ends: Sequence[float] | None, digits: int) -> str:
    return DASH if ends is None else f"{_figure(ends[0], digits)} to {_figure(ends[1], digits)}"

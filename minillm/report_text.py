"""How a number, an interval and a stranger's text are written in a report, on paper and in a terminal."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any

from minillm.measures import MEASURES

AT_EACH_TEMPERATURE = ("validity", "coverage", "rouge_l", "reverse_kl", "distinct_4")
"""The measures of the table of temperatures; the first table has all of them."""
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"

# CSI and OSC sequences whole, so that no "[31m" stays behind; then what is left of the control characters. The bidi
# overrides could show a text in another order than it has.
ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def figure(value: float | None, name: str, *, signed: bool = False) -> str:
    """A number with the digits of its measure; a dash where there is none. What rounds to 0 has no sign."""
    if value is None:
        return DASH
    if round(value, MEASURES[name].digits) == 0:
        return f"{0:.{MEASURES[name].digits}f}"
    text = f"{value:{'+' if signed else ''}.{MEASURES[name].digits}f}"
    return text.replace("-", MINUS)


def interval(estimate: Mapping[str, Any] | None, name: str, *, signed: bool = False) -> str:
    """``"0.701 to 0.766"``, or a dash where there is no interval."""
    ends = (estimate or {}).get("ci95")
    return DASH if ends is None else f"{figure(ends[0], name, signed=signed)} to {figure(ends[1], name, signed=signed)}"


def reading(estimate: Mapping[str, Any] | None) -> str:
    """Whether the interval of a difference includes zero (touching counts), in two words."""
    ends = (estimate or {}).get("ci95")
    if ends is None:
        return "no interval"
    return "includes zero" if ends[0] <= 0 <= ends[1] else "excludes zero"


def at_each_temperature(combined: Mapping[str, Any]) -> list[str]:
    """Those of ``AT_EACH_TEMPERATURE`` that have a row: all but the coverage, which only some data has."""
    models = [of for found in combined["temperatures"].values() for of in found["models"].values()]
    return [name for name in AT_EACH_TEMPERATURE if name != "coverage" or any(name in of for of in models)]


def clean(text: Any) -> str:
    """Text without terminal escapes, control characters (newline and tab stay), bidi overrides and lone surrogates."""
    return CONTROLS.sub("", ESCAPES.sub("", str(text)))


def safe(text: Any) -> str:
    """Cleaned text, escaped for HTML content and for a quoted attribute."""
    return html.escape(clean(text), quote=True)


def plain(text: str) -> str:
    """Text that cannot steer a terminal: escape sequences and control characters out, one line."""
    return " ".join(clean(text).split())


def finite(value: Any) -> bool:
    """True for a number that can be drawn; False for NaN, infinities, booleans and anything else."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

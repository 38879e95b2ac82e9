"""The prompts on which two models differ most, in both directions, with what they said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.compare.evaluated import Evaluated
from minillm.compare.pairs import ROUNDING, gains
from minillm.measures import MEASURES, reference_bucket
from minillm.statistics import Ratio

Row = Mapping[str, Any]


def extremes(
    base: Evaluated,
    other: Evaluated,
    *,
    at: tuple[str, str],
    ratios: tuple[Mapping[str, Ratio], Mapping[str, Ratio]],
    measures: Sequence[str],
    count: int,
) -> dict[str, list[dict[str, Any]]]:
    """Up to ``count`` prompts on which each of them is better: ``{"other": […], "base": […]}``, most different first.

    By the first of ``measures`` (a prompt's mean over its seeds), ties by the next, then by the order of the file. Each
    has ``uid``, ``gain`` (of the other, in the first measure, positive is better), ``length`` (bucket of the
    reference) and the two rows: those under the sampling seed at which they differ most in that direction.
    """
    if not measures:
        return {"other": [], "base": []}
    # What comes back as NaN (a prompt without the measure) differs in nothing.
    gain_MN = np.nan_to_num(np.array([gains(ratios[0][m], ratios[1][m], better=_better(m)) for m in measures]))
    gain_MN = np.where(np.abs(gain_MN) <= ROUNDING, 0.0, gain_MN)
    uids = ratios[0][measures[0]].uids
    rows = [_by_prompt(one.rows[key]) for one, key in zip((base, other), at, strict=True)]
    found: dict[str, list[dict[str, Any]]] = {}
    for who, sign in (("other", 1.0), ("base", -1.0)):
        places = [n for n in range(len(uids)) if sign * gain_MN[0, n] > 0]
        places.sort(key=lambda n: [*(-sign * gain_MN[:, n]), n])
        found[who] = [
            {
                "uid": uids[n],
                "gain": float(gain_MN[0, n]),
                "length": reference_bucket(dict(rows[0][uids[n]][0])),
                "rows": _shown(rows[0][uids[n]], rows[1][uids[n]], measures, sign=sign),
            }
            for n in places[:count]
        ]
    return found


def _better(name: str) -> Any:
    return MEASURES[name].better


def _by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row["uid"]), []).append(row)
    return found


def _shown(base: Sequence[Row], other: Sequence[Row], measures: Sequence[str], *, sign: float) -> list[Row]:
    """The pair of responses that differs most in this direction, the first such seed; paired by place."""

    def difference(pair: Sequence[Row]) -> list[float]:
        values = []
        for name in measures:
            one, two = (row["measures"].get(name) for row in pair)
            worth = 0.0 if one is None or two is None else float(two) - float(one)
            values.append(sign * (worth if _better(name) == "higher" else -worth))
        return values

    return max(([one, two] for one, two in zip(base, other, strict=False)), key=difference)

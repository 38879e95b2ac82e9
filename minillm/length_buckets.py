"""The measures of an evaluation by the length of the reference, as the paper splits S-NI and UnNI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minillm.measures import (
    LENGTH_BUCKETS,
    MAIN_TEMPERATURE,
    NAMES,
    OF_A_SET,
    ratios_of,
    reference_bucket,
    temperature_key,
)
from minillm.statistics import estimate

UNIT = "words of the first reference, split at white space"
OPEN_END = 10**9
"""From here on a bucket has no upper end."""
MEASURED = tuple(name for name in NAMES if name not in OF_A_SET)
"""Those whose value does not grow or fall with the number of responses, so that buckets of unlike sizes compare."""


def by_length(samples: Sequence[dict[str, Any]], *, resamples: int, seed: int) -> dict[str, Any]:
    """``{"by_length": …}`` for results.json, at the headline temperature; {} where no row has a reference.

    ``unit`` says what was counted, ``without_reference`` how many prompts are in no bucket, and ``buckets`` holds for
    each kind of prompt ``words`` (both ends included, None for no end), ``prompts``, and ``measures`` as everywhere,
    each with an interval over the prompts of its bucket. A bucket without a prompt is there, with no measures.
    """
    keys = list(dict.fromkeys(temperature_key(row["temperature"]) for row in samples))
    main = temperature_key(MAIN_TEMPERATURE)
    at = main if main in keys else keys[0]
    rows = [row for row in samples if temperature_key(row["temperature"]) == at]
    parts: dict[str | None, list[dict[str, Any]]] = {name: [] for name in LENGTH_BUCKETS}
    for row in rows:
        parts.setdefault(reference_bucket(row), []).append(row)
    bare = parts.pop(None, [])
    if len(bare) == len(rows):
        return {}
    buckets = {}
    for name, own in parts.items():
        least, most = LENGTH_BUCKETS[str(name)]
        measures = estimate(ratios_of(own, names=MEASURED), resamples=resamples, seed=seed) if own else {}
        buckets[name] = {
            "words": [least, None if most >= OPEN_END else most],
            "prompts": len({row["uid"] for row in own}),
            "measures": measures,
        }
    without = len({row["uid"] for row in bare})
    return {"by_length": {"unit": UNIT, "temperature": at, "without_reference": without, "buckets": buckets}}

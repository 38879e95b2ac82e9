"""How the rows of samples.jsonl become measures of a model.

Shapes here: S sampling seeds, N prompts.

Every measure is a ratio whose numerators and denominators are added over the prompts of one sampling seed:

    validity              valid responses           / responses      (micro-world only: its exact checker)
    coverage              values carried            / values in the prompts' dialogue acts  (data.checker: slots)
    rouge_l               ROUGE-L F                  / responses
    exact_match           responses equal to a reference / responses
    reverse_kl            nats, student from teacher / responses
    reverse_kl_per_token  nats                       / tokens that the KL was summed over
    forward_kl            nats, teacher from student / responses
    teacher_nll           nats of the response under the teacher / its tokens
    gold_nll              nats of the reference under the model / its tokens
    distinct_1 … 4        distinct n-grams of words  / n-grams of words, over the seed's whole set
    self_bleu             BLEU-4 against all other responses of the seed / responses that have a word
    repetition_3          responses that repeat a 3-gram of words / responses
    repeated_3            3-grams of words that stood earlier in their response / 3-grams of words
    mean_length           tokens without EOS         / responses
    cut_share             responses that reached the limit / responses

distinct_n and self_bleu depend on all responses of a seed together; a resample of prompts keeps what each response
contributed to the whole set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from minillm.errors import DataError
from minillm.self_bleu import self_bleu
from minillm.statistics import Ratio, estimate
from minillm.text_measures import distinct_contributions, repeated

MAIN_TEMPERATURE = 1.0
"""The temperature of the headline figures, where it was evaluated."""


LENGTH_BUCKETS = {"0-5": (0, 5), "6-10": (6, 10), "11+": (11, 10**9)}
"""The paper's three kinds of prompt: by the words of the first reference, both ends included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """How a measure is named and read."""

    label: str
    better: Literal["higher", "lower"] | None
    """Which way is good; None where neither is, and only the distance to the teacher says something."""
    digits: int
    meaning: str
    of_teacher: bool = False
    """Whether it is a quantity of the teacher that was there: against another one it is another quantity."""
    of_tokens: bool = False
    """Whether it counts tokens, or sums over them: of another tokenizer's it is another quantity."""


MEASURES: dict[str, Measure] = {
    "validity": Measure(
        label="validity", better="higher", digits=3, meaning="share of responses that pass the checker"
    ),
    "coverage": Measure(
        label="coverage", better="higher", digits=3,
        meaning="share of the values in the prompts' dialogue acts that the responses carry",
    ),
    "rouge_l": Measure(label="ROUGE-L", better="higher", digits=3, meaning="F of the best reference, 0 to 1"),
    "exact_match": Measure(
        label="exact match", better="higher", digits=3,
        meaning="share of responses equal to a reference, up to case, punctuation and white space",
    ),
    "reverse_kl": Measure(
        label="reverse KL", better="lower", digits=3, meaning="nats per response, student from teacher",
        of_teacher=True, of_tokens=True,
    ),
    "distinct_4": Measure(
        label="distinct-4", better=None, digits=3, meaning="distinct 4-grams of words over all of them: variety"
    ),
    "repetition_3": Measure(
        label="repetition-3", better=None, digits=3, meaning="share of responses that repeat a 3-gram of words"
    ),
    "mean_length": Measure(
        label="length", better=None, digits=2, meaning="tokens of a response, without the end token",
        of_tokens=True,
    ),
    "reverse_kl_per_token": Measure(
        label="reverse KL/token", better="lower", digits=3, meaning="nats per token",
        of_teacher=True, of_tokens=True,
    ),
    "forward_kl": Measure(
        label="forward KL", better="lower", digits=3,
        meaning="nats per response, teacher from student, at the states that the model visits",
        of_teacher=True, of_tokens=True,
    ),
    "teacher_nll": Measure(
        label="teacher NLL", better=None, digits=3, meaning="nats per token of the response under the teacher",
        of_teacher=True, of_tokens=True,
    ),
    "gold_nll": Measure(
        label="reference NLL", better="lower", digits=3, meaning="nats per token of the reference, at temperature 1",
        of_tokens=True,
    ),
    "distinct_1": Measure(label="distinct-1", better=None, digits=3, meaning="distinct words over all of them"),
    "distinct_2": Measure(label="distinct-2", better=None, digits=3, meaning="the same of 2-grams"),
    "distinct_3": Measure(label="distinct-3", better=None, digits=3, meaning="the same of 3-grams"),
    "self_bleu": Measure(
        label="self-BLEU", better=None, digits=3, meaning="BLEU-4 of a response against all others: likeness, 0 to 1"
    ),
    "repeated_3": Measure(
        label="repeated-3", better=None, digits=3, meaning="share of 3-grams that stood earlier in their response"
    ),
    "cut_share": Measure(
        label="cut", better=None, digits=3, meaning="share of responses cut at the length limit",
        of_tokens=True,
    ),
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(MEASURES)
OF_TEACHER = tuple(name for name, measure in MEASURES.items() if measure.of_teacher)
OF_TOKENS = tuple(name for name, measure in MEASURES.items() if measure.of_tokens)
MAIN = ("validity", "coverage", "rouge_l", "exact_match", "reverse_kl", "distinct_4", "repetition_3", "mean_length")
"""The measures of a report's first table."""
ALWAYS = tuple(name for name in MAIN if name not in {"coverage", "exact_match"})
"""Those that the first table has a row for whether or not there is a figure."""
QUALITIES = ("validity", "coverage", "rouge_l")
"""How right a response is, the most exact first."""
QUOTIENTS = {
    "coverage": ("carried", "values"),
    "reverse_kl_per_token": ("reverse_kl", "kl_tokens"),
    "teacher_nll": ("teacher_nll", "kl_tokens"),
    "gold_nll": ("gold_nll", "gold_tokens"),
}
"""Which two figures of a row they are the ratio of."""
MAY_BE_INFINITE = ("reverse_kl", "reverse_kl_per_token", "forward_kl", "teacher_nll", "gold_nll")
"""Infinite where a model forbids a token of the other's, or of the reference; a row then has null there, and the model
no such measure. ``infinite_rows`` counts them."""
OF_A_SET = {"distinct_1", "distinct_2", "distinct_3", "distinct_4", "self_bleu"}
"""Measures of all responses of a seed together."""


def temperature_key(temperature: float) -> str:
    """The name of a temperature in results.json: ``1.0``, ``0.8``."""
    return str(float(temperature))


def ratios_of(samples: Sequence[dict[str, Any]], *, names: Sequence[str] = NAMES) -> dict[str, Ratio]:
    """The measures of one model at one temperature as ratios, from rows of samples.jsonl; absent ones left out.

    Prompts keep the order of the first seed. A measure that only some rows have counts those rows; one that is infinite
    in a row is absent. Raises ``DataError`` when there is no row, a field is missing, a prompt occurs twice under a
    seed, the seeds do not share their prompts, or two temperatures are mixed.
    """
    by_seed = _by_seed(samples)
    uids = tuple(next(iter(by_seed.values())))
    grid = [[rows[uid] for uid in uids] for rows in by_seed.values()]
    found: dict[str, Ratio] = {}
    for name in names:
        if name in MAY_BE_INFINITE and any(_is_infinite(row, name) for line in grid for row in line):
            continue
        pairs = [_of_set(line, name) if name in OF_A_SET else [_pair(row, name) for row in line] for line in grid]
        value_SN2 = np.array(pairs, dtype=np.float64)
        if name.startswith("distinct") or value_SN2[..., 1].any():
            found[name] = Ratio(
                uids=uids,
                seeds=tuple(by_seed),
                numerator_SN=np.ascontiguousarray(value_SN2[..., 0]),
                denominator_SN=np.ascontiguousarray(value_SN2[..., 1]),
            )
    return found


def infinite_rows(samples: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """{temperature: {measure: rows in which it is infinite}}, where there are any: why a model has no such measure."""
    found: dict[str, dict[str, int]] = {}
    for row in samples:
        for name in MAY_BE_INFINITE:
            if _is_infinite(row, name):
                counted = found.setdefault(temperature_key(_field(row, "temperature")), {})
                counted[name] = counted.get(name, 0) + 1
    return found


def infinite_words(infinite: Mapping[str, Mapping[str, int]]) -> str:
    """Which measures have no mean because of infinities, and of how many rows, in plain words."""
    each = "; ".join(
        f"{', '.join(f'{MEASURES[name].label} in {count:,}' for name, count in counted.items())} at temperature {at}"
        for at, counted in infinite.items()
    )
    return f"infinite, so without a mean (rows in which a model forbids a token): {each}"


def measure_rows(samples: Sequence[dict[str, Any]], *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """``{NAME: {"mean", "ci95", "per_seed"}}`` of one model at one temperature (see ``statistics.estimate``).

    Errors as in ``ratios_of``.
    """
    return estimate(ratios_of(samples), resamples=resamples, seed=seed)


def summarise(
    samples: Sequence[dict[str, Any]], *, temperatures: Sequence[float], resamples: int, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, dict[str, Any]]]]:
    """The measures at temperature 1 (at the first temperature if 1 is not among them), and those at each one.

    The second dict holds *every* temperature in the given order, by ``temperature_key``. Raises ``DataError`` when a
    temperature has no row, or a row has another temperature.
    """
    wanted = {temperature_key(t): [] for t in temperatures}  # type: dict[str, list[dict[str, Any]]]
    for row in samples:
        key = temperature_key(_field(row, "temperature"))
        if key not in wanted:
            raise DataError(f"a sample was drawn at temperature {key}, wanted one of {', '.join(wanted) or 'none'}")
        wanted[key].append(row)
    empty = [key for key, rows in wanted.items() if not rows]
    if empty or not wanted:
        raise DataError(
            f"no sample at temperature {', '.join(empty) or '(none was asked for)'}; evaluate the model there"
        )
    found = {key: measure_rows(rows, resamples=resamples, seed=seed) for key, rows in wanted.items()}
    main = temperature_key(MAIN_TEMPERATURE)
    return found.get(main, found[next(iter(found))]), found


def reference_bucket(row: dict[str, Any]) -> str | None:
    """Which of ``LENGTH_BUCKETS`` a row of ``samples.jsonl`` belongs to; None without a reference."""
    references = row.get("references")
    if not references:
        return None
    words = len(references[0].split())
    return next(name for name, (least, most) in LENGTH_BUCKETS.items() if least <= words <= most)


def shown(models: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """The measures of a report's first table and those of its second: of the latter what some model has."""
    there = {name for measures in models.values() for name, found in measures.items() if found.get("mean") is not None}
    first = [name for name in MAIN if name in ALWAYS or name in there]
    return first, [name for name in NAMES if name not in MAIN and name in there]


def _of_set(line: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """What each row adds to a measure of all responses of its seed."""
    texts = [str(_field(row, "response")) for row in line]
    if name == "self_bleu":
        return [(0.0, 0.0) if score is None else (score, 1.0) for score in self_bleu(texts)]
    n = int(name.removeprefix("distinct_"))
    return [(share, float(count)) for share, count in distinct_contributions(texts, n)]


def _pair(row: dict[str, Any], name: str) -> tuple[float, float]:
    """What a row adds to a measure's numerator and denominator; (0, 0) where it does not have the measure."""
    if name == "mean_length":
        return float(_field(row, "tokens")), 1.0
    if name == "cut_share":
        return float(_field(row, "stop") == "length"), 1.0
    if name == "repeated_3":
        again, runs = repeated(str(_field(row, "response")), 3)
        return float(again), float(runs)
    own = _field(row, "measures")
    over, under = QUOTIENTS.get(name, (name, None))
    if own.get(over) is None:
        return 0.0, 0.0
    if under is not None and own.get(under) is None:
        raise DataError(f"the sample of prompt {row.get('uid')!r} has {over!r} and no {under!r}; evaluate again")
    return float(own[over]), 1.0 if under is None else float(own[under])


def _is_infinite(row: dict[str, Any], name: str) -> bool:
    """Whether a figure was computed and is infinite, which JSON cannot say: such a mean would be, too."""
    over, _ = QUOTIENTS.get(name, (name, None))
    return _field(row, "measures").get(over, 0.0) is None


def _by_seed(samples: Sequence[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    """{seed: {uid: row}}, checked to be a full grid at one temperature."""
    if not samples:
        raise DataError("no samples to measure, wanted at least one row in samples.jsonl; evaluate the model again")
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for row in samples:
        uid, seed = str(_field(row, "uid")), int(_field(row, "seed"))
        if uid in found.setdefault(seed, {}):
            raise DataError(
                f"prompt {uid!r} occurs twice under sampling seed {seed}, wanted once; give rows unique ids"
            )
        found[seed][uid] = row
    temperatures = sorted({float(row["temperature"]) for row in samples if "temperature" in row})
    if len(temperatures) > 1:
        raise DataError(f"samples at temperatures {temperatures} were given as one; measure each temperature by itself")
    first = next(iter(found))
    for seed, rows in found.items():
        odd = sorted(rows.keys() ^ found[first].keys())
        if odd:
            raise DataError(f"sampling seeds {first} and {seed} do not share prompt {odd[0]!r} ({len(odd)} in all)")
    return found


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise DataError(f"the sample of prompt {row.get('uid')!r} has no field {name!r}; evaluate the model again")
    return row[name]

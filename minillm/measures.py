"""What a response is worth as text, and how the rows of samples.jsonl become measures of a model.

Shapes here: S sampling seeds, N prompts.

Every measure is a ratio whose numerators and denominators are added over the prompts of one sampling seed:

    validity              valid responses           / responses      (micro-world only: its exact checker)
    rouge_l               ROUGE-L F                  / responses
    reverse_kl            nats, student from teacher / responses
    reverse_kl_per_token  nats                       / tokens that the KL was summed over
    distinct_4            distinct 4-grams of words  / 4-grams of words, over the seed's whole set
    repetition_3          responses that repeat a 3-gram of words / responses
    mean_length           tokens without EOS         / responses

Words are what whitespace separates, as written. ROUGE-L alone has a tokenizer of its own (see ``rouge_l``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from minillm.errors import DataError
from minillm.statistics import Ratio, estimate

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


MEASURES: dict[str, Measure] = {
    "validity": Measure(
        label="validity", better="higher", digits=3, meaning="share of responses that pass the checker"
    ),
    "rouge_l": Measure(label="ROUGE-L", better="higher", digits=3, meaning="F of the best reference, 0 to 1"),
    "reverse_kl": Measure(
        label="reverse KL", better="lower", digits=3, meaning="nats per response, student from teacher"
    ),
    "reverse_kl_per_token": Measure(label="reverse KL/token", better="lower", digits=3, meaning="nats per token"),
    "distinct_4": Measure(
        label="distinct-4", better=None, digits=3, meaning="distinct 4-grams of words over all of them: variety"
    ),
    "repetition_3": Measure(
        label="repetition-3", better=None, digits=3, meaning="share of responses that repeat a 3-gram of words"
    ),
    "mean_length": Measure(
        label="length", better=None, digits=2, meaning="tokens of a response, without the end token"
    ),
}
NAMES: tuple[str, ...] = tuple(MEASURES)


def rouge_l(response: str, references: Sequence[str]) -> float:
    """ROUGE-L F of the reference that fits best, 0 to 1, with Porter stemming, as ``rouge-score`` computes it.

    Its tokenizer lower-cases and keeps runs of ASCII letters and digits only: accents split a word, and text in
    another script has no tokens. Text without a token scores 0, also against a reference without one. Raises
    ``DataError`` when there is no reference: the measure does not exist then, and 0 would be a lie.
    """
    if not references:
        raise DataError("ROUGE-L got no reference, wanted at least one; leave the measure out for such rows")
    return max(_rouge_l_of_tokens(_rouge_tokens(reference), _rouge_tokens(response)) for reference in references)


def repetition_3(text: str) -> bool:
    """True when some run of three words occurs twice in the text; False below four words."""
    runs = ngrams(text, 3)
    return len(set(runs)) < len(runs)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The runs of ``n`` words in order, overlaps included; none in a text of fewer than ``n`` words."""
    words = text.split()
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def ngram_counts(texts: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of ``n`` words occurs in all the texts together; no run crosses from one into the next."""
    return Counter(run for text in texts for run in ngrams(text, n))


def distinct_contributions(texts: Sequence[str], n: int) -> list[tuple[float, int]]:
    """What each text adds to (distinct n-grams, n-grams) of the whole set.

    An n-gram that occurs c times in the set gives 1/c to the text at each occurrence, so the first numbers add up
    to the number of distinct n-grams. This makes the share a ratio over prompts that can be bootstrapped. A
    resample keeps these contributions: recounting would see every prompt drawn twice as a repetition.
    """
    counts = ngram_counts(texts, n)
    runs = [ngrams(text, n) for text in texts]
    return [(sum(1.0 / counts[run] for run in own), len(own)) for own in runs]


def temperature_key(temperature: float) -> str:
    """The name of a temperature in results.json: ``1.0``, ``0.8``."""
    return str(float(temperature))


def ratios_of(samples: Sequence[dict[str, Any]]) -> dict[str, Ratio]:
    """The measures of one model at one temperature as ratios, from rows of samples.jsonl; absent ones left out.

    Prompts keep the order of the first seed. A measure that only some rows have counts those rows. Raises
    ``DataError`` when there is no row, a field is missing, a prompt occurs twice under a seed, the seeds do not
    share their prompts, or two temperatures are mixed.
    """
    by_seed = _by_seed(samples)
    uids = tuple(next(iter(by_seed.values())))
    grid = [[rows[uid] for uid in uids] for rows in by_seed.values()]
    pairs: dict[str, list[list[tuple[float, float]]]] = {
        name: [[_pair(row, name) for row in line] for line in grid] for name in NAMES if name != "distinct_4"
    }
    pairs["distinct_4"] = [
        [(d, float(n)) for d, n in distinct_contributions([_field(row, "response") for row in line], 4)]
        for line in grid
    ]
    found: dict[str, Ratio] = {}
    for name in NAMES:
        value_SN2 = np.array(pairs[name], dtype=np.float64)
        if name == "distinct_4" or value_SN2[..., 1].any():
            found[name] = Ratio(
                uids=uids,
                seeds=tuple(by_seed),
                numerator_SN=np.ascontiguousarray(value_SN2[..., 0]),
                denominator_SN=np.ascontiguousarray(value_SN2[..., 1]),
            )
    return found


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


def _pair(row: dict[str, Any], name: str) -> tuple[float, float]:
    """What a row adds to a measure's numerator and denominator; (0, 0) where it does not have the measure."""
    if name == "mean_length":
        return float(_field(row, "tokens")), 1.0
    own = _field(row, "measures")
    if name == "reverse_kl_per_token":
        return (float(own["reverse_kl"]), float(_kl_tokens(row))) if own.get("reverse_kl") is not None else (0.0, 0.0)
    return (float(own[name]), 1.0) if own.get(name) is not None else (0.0, 0.0)


def _kl_tokens(row: dict[str, Any]) -> int:
    tokens = _field(row, "measures").get("kl_tokens")
    if tokens is None:
        raise DataError(f"the sample of prompt {row.get('uid')!r} has 'reverse_kl' and no 'kl_tokens'; evaluate again")
    return int(tokens)


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


@lru_cache(maxsize=1 << 17)
def _rouge_tokens(text: str) -> tuple[str, ...]:
    # Stemming is nine tenths of the time, and a reference meets every seed, temperature and model again.
    return tuple(_rouge_tokenizer().tokenize(text))


@lru_cache(maxsize=1)
def _rouge_tokenizer() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


@lru_cache(maxsize=1 << 17)
def _rouge_l_of_tokens(reference: tuple[str, ...], response: tuple[str, ...]) -> float:
    return float(_rouge_scorer().score(reference, response)["rougeL"].fmeasure)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_AlreadyTokens())


class _AlreadyTokens:
    """Hands ``RougeScorer`` tokens that were made (and kept) before."""

    def tokenize(self, text: tuple[str, ...]) -> tuple[str, ...]:
        return text

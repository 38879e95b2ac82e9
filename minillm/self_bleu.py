"""How alike the responses of a set are: BLEU-4 of each against all the others.

For one response with the others as its references (Papineni et al., 2002), over words, n = 1 to 4:

    p_n    n-grams of the response that a reference has, each at most as often as the one reference that has it most
           often, over the n-grams of the response
    c, r   words of the response, and of the reference whose length is closest to c (the shorter of two)
    BLEU   min(1, exp(1 - r / c)) times the geometric mean of p_1 to p_m, m = min(4, c)

Smoothing is that of a sentence's BLEU in ``sacrebleu`` ("exp", effective order): 0 where no word is shared; else the
k-th p_n without a match is 1 / 2^k over the number of n-grams. A response of fewer than four words has its own m.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from minillm.text_measures import ngrams

ORDER = 4
TWO_TEXTS = 2
"""A response needs another one to be compared with."""

Run = tuple[str, ...]


def self_bleu(texts: Sequence[str]) -> list[float | None]:
    """BLEU-4, 0 to 1, of each text against all others; None for a text without a word, which is no reference either,
    and for all when fewer than two have words.

    Takes one pass over the n-grams: of each the largest count in a text is kept, whose text that is, and the largest
    count in any other. So what the others have at most is known without comparing pairs.
    """
    written = [place for place, text in enumerate(texts) if text.split()]
    if len(written) < TWO_TEXTS:
        return [None] * len(texts)
    scores: list[float | None] = [None] * len(texts)
    counts = {place: _counts(texts[place]) for place in written}
    most = _two_largest(counts)
    lengths = sorted(len(texts[place].split()) for place in written)
    for place in written:
        words = len(texts[place].split())
        scores[place] = _bleu(counts[place], place, most, words=words, closest=_closest_other(lengths, words))
    return scores


def _counts(text: str) -> list[Counter[Run]]:
    """How often each n-gram stands in a text, by n."""
    return [Counter(ngrams(text, n)) for n in range(1, ORDER + 1)]


def _two_largest(counts: dict[int, list[Counter[Run]]]) -> dict[Run, tuple[int, int, int]]:
    """Of each n-gram (largest count, the text that has it, largest count in another text)."""
    found: dict[Run, tuple[int, int, int]] = {}
    for place, by_n in counts.items():
        for own in by_n:
            for run, count in own.items():
                first, holder, second = found.get(run, (0, -1, 0))
                if count > first:
                    found[run] = (count, place, first)
                elif count > second:
                    found[run] = (first, holder, count)
    return found


def _bleu(
    own: list[Counter[Run]], place: int, most: dict[Run, tuple[int, int, int]], *, words: int, closest: int
) -> float:
    logs, halvings = [], 0
    for n, by_run in enumerate(own[: min(ORDER, words)], start=1):
        matches, total = 0, words - n + 1
        for run, count in by_run.items():
            first, holder, second = most[run]
            matches += min(count, second if holder == place else first)
        if n == 1 and matches == 0:
            return 0.0  # then no longer run is shared either
        halvings += matches == 0
        logs.append(math.log(matches / total if matches else 1.0 / (2**halvings * total)))
    return math.exp(min(0.0, 1.0 - closest / words) + sum(logs) / len(logs))


def _closest_other(lengths: Sequence[int], words: int) -> int:
    """Of sorted lengths, one of them ``words``: the closest of the others, the shorter of two as close."""
    place = bisect_left(lengths, words)
    others = [*lengths[max(0, place - 1) : place], *lengths[place + 1 : place + 2]]
    return min(others, key=lambda length: (abs(length - words), length))

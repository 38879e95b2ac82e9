"""How alike the responses of a set are: BLEU-4 of each against all the others.

For one response with the others as its references (Papineni et al., 2002), over words, n = 1 to 4:

    p_n    n-grams of the response that a reference has, each at most as often as the one reference that has it most
           often, over the n-grams of the response
    c, r   words of the response, and of the reference whose length is closest to c (the shorter of two)
    BLEU   min(1, exp(1 - r / c)) times the geometric mean of p_1 to p_m, m = min(4, c)

Smoothing is that of a sentence's BLEU in ``sacrebleu`` ("exp", effective order): 0 where no word is shared; else the
k-th p_n without a match is 1 / 2^k over the number of n-grams. A response of fewer than four words has its own m.

Legend: B texts with words, N n-grams of all of them, C cells (an n-gram of a text, however often it stands there), R
different n-grams, O orders.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from minillm.text_measures import Numbers, numbered

ORDER = 4
TWO_TEXTS = 2
"""A response needs another one to be compared with."""


def self_bleu(texts: Sequence[str]) -> list[float | None]:
    """BLEU-4, 0 to 1, of each text against all others; None for a text without a word, which is no reference either,
    and for all when fewer than two have words.

    Takes one pass over the n-grams: of each the largest count in a text is kept, whose text that is, and the largest
    count in any other. So what the others have at most is known without comparing pairs.
    """
    written = [place for place, text in enumerate(texts) if text.split()]
    scores: list[float | None] = [None] * len(texts)
    if len(written) < TWO_TEXTS:
        return scores
    own = [texts[place] for place in written]
    words_B = [len(text.split()) for text in own]
    matches_BO = zip(*(_matches(run_N, count_B) for run_N, count_B in numbered(own, ORDER)), strict=True)
    lengths = sorted(words_B)
    for place, words, matches_O in zip(written, words_B, matches_BO, strict=True):
        scores[place] = _bleu(matches_O, words=words, closest=_closest_other(lengths, words))
    return scores


def _matches(run_N: Numbers, count_B: Numbers) -> list[int]:
    """How many n-grams of each text another text has, each at most as often as the one that has it most often."""
    texts = len(count_B)
    cell_C, times_C = np.unique(run_N * texts + np.repeat(np.arange(texts), count_B), return_counts=True)
    run_C, text_C = np.divmod(cell_C, texts)
    first_C, holder_C, second_C = _two_largest(run_C, text_C, times_C)
    matched_C = np.minimum(times_C, np.where(text_C == holder_C, second_C, first_C))
    found: list[int] = np.bincount(text_C, weights=matched_C, minlength=texts).astype(np.int64).tolist()
    return found


def _two_largest(run_C: Numbers, text_C: Numbers, times_C: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Of each cell's n-gram: largest count, the text that has it, largest count in another text. Cells of an n-gram
    stand side by side."""
    order_C = np.lexsort((-times_C, run_C))
    times_C, text_C = np.append(times_C[order_C], 0), text_C[order_C]
    _, start_R, cells_R = np.unique(run_C, return_index=True, return_counts=True)
    second_R = np.where(cells_R > 1, times_C[start_R + 1], 0)
    first_C, holder_C, second_C = (
        np.repeat(value_R, cells_R) for value_R in (times_C[start_R], text_C[start_R], second_R)
    )
    return first_C, holder_C, second_C


def _bleu(matches_O: Sequence[int], *, words: int, closest: int) -> float:
    logs, halvings = [], 0
    for n, matches in enumerate(matches_O[: min(ORDER, words)], start=1):
        total = words - n + 1
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

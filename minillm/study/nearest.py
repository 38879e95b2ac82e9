"""The nearest training answer: what a model that can only look things up would say.

A prompt's words are its runs of letters, digits and underscores in lower case, those of the row itself and not of a
template around it. A word's weight is ln(1 + N / n): N training prompts, n of them with the word, so that what stands
everywhere counts little. Two prompts are as near as the cosine of their weighted counts; of equally near ones the
earlier row counts. A prompt without a word in common with any has no neighbour, and the answer is no text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from minillm.records import Row

_WORD = re.compile(r"\w+")


def words_of(row: Row) -> list[str]:
    """The words of what a row asks."""
    parts = [row.instruction or "", row.prompt or "", row.input, *(content for _, content in row.messages)]
    return _WORD.findall(" ".join(parts).lower())


def nearest(known: Sequence[Sequence[str]], asked: Sequence[Sequence[str]]) -> list[int | None]:
    """For each list of words in ``asked`` the place of the nearest in ``known``; None where none shares a word."""
    holders: dict[str, list[tuple[int, int]]] = {}
    for place, words in enumerate(known):
        for word, count in Counter(words).items():
            holders.setdefault(word, []).append((place, count))
    weights = {word: math.log(1 + len(known) / len(places)) for word, places in holders.items()}
    rows = {word: np.array([place for place, _ in places]) for word, places in holders.items()}
    values = {word: np.array([count for _, count in places]) * weights[word] for word, places in holders.items()}
    square_N = np.zeros(len(known))
    for word, own in rows.items():
        square_N[own] += values[word] ** 2
    length_N = np.sqrt(np.where(square_N > 0, square_N, 1.0))  # a prompt without words is near to none
    found: list[int | None] = []
    for words in asked:
        product_N = np.zeros(len(known))
        for word, count in Counter(words).items():
            if word in rows:
                product_N[rows[word]] += count * weights[word] * values[word]
        # Rounded, or the order of additions would decide between equals.
        near_N = np.round(product_N / length_N, 9)
        best = int(near_N.argmax()) if len(near_N) else 0
        found.append(best if len(near_N) and near_N[best] > 0 else None)
    return found

"""What one response, or a set of responses, is worth as text.

Words are what white space separates, as written. ROUGE-L and exact match alone cut text up in ways of their own.

Legend: B texts, W words of all texts, N runs of words of all texts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minillm.errors import DataError

Numbers = NDArray[np.int64]
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def rouge_l(response: str, references: Sequence[str]) -> float:
    """ROUGE-L F of the reference that fits best, 0 to 1, with Porter stemming, as ``rouge-score`` computes it.

    Its tokenizer lower-cases and keeps runs of ASCII letters and digits only: accents split a word, and text in
    another script has no tokens. Text without a token scores 0, also against a reference without one. Raises
    ``DataError`` when there is no reference: the measure does not exist then, and 0 would be a lie.
    """
    if not references:
        raise DataError("ROUGE-L got no reference, wanted at least one; leave the measure out for such rows")
    return max(_rouge_l_of_tokens(_rouge_tokens(reference), _rouge_tokens(response)) for reference in references)


def exact_match(response: str, references: Sequence[str]) -> bool:
    """True when the response is one of the references, up to case, punctuation and white space.

    As SQuAD compares answers, except that articles stay: lower case, ASCII punctuation removed (nothing is put in its
    place, so "U.S." is "us"), runs of white space made one space. Raises ``DataError`` when there is no reference.
    """
    if not references:
        raise DataError("exact match got no reference, wanted at least one; leave the measure out for such rows")
    return _plain(response) in {_plain(reference) for reference in references}


def repetition_3(text: str) -> bool:
    """True when some run of three words occurs twice in the text; False below four words."""
    runs = ngrams(text, 3)
    return len(set(runs)) < len(runs)


def repeated(text: str, n: int) -> tuple[int, int]:
    """(runs of ``n`` words that stood earlier in the same text, all its runs of ``n`` words)."""
    runs = ngrams(text, n)
    return len(runs) - len(set(runs)), len(runs)


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """The runs of ``n`` words in order, overlaps included; none in a text of fewer than ``n`` words."""
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def numbered(texts: Sequence[str], longest: int) -> Iterator[tuple[Numbers, Numbers]]:
    """For n from 1 to ``longest``: all runs of n words, text after text, each as a number that equal runs share; and
    how many runs each text has. No run crosses from one text into the next.

    A run is the run of its first n - 1 words and its last word, so two numbers name it, however long it is.
    """
    words = [text.split() for text in texts]
    ids: dict[str, int] = {}
    word_W = np.array([ids.setdefault(word, len(ids)) for own in words for word in own], dtype=np.int64)
    length_B = np.array([len(own) for own in words], dtype=np.int64)
    left_W = np.repeat(length_B.cumsum(), length_B) - np.arange(len(word_W))
    run_W = word_W  # by the place where a run begins
    for n in range(1, longest + 1):
        (begin_N,) = np.nonzero(left_W >= n)
        if n > 1:
            run_N = np.unique(run_W[begin_N] * len(ids) + word_W[begin_N + n - 1], return_inverse=True)[1]
            run_W = np.zeros_like(word_W)
            run_W[begin_N] = run_N
        yield run_W[begin_N], np.maximum(length_B - n + 1, 0)


def distinct_contributions(texts: Sequence[str], n: int) -> list[tuple[float, int]]:
    """What each text adds to (distinct n-grams, n-grams) of the whole set.

    An n-gram that occurs c times in the set gives 1/c to the text at each occurrence, so the first numbers add up
    to the number of distinct n-grams. This makes the share a ratio over prompts that can be bootstrapped. A
    resample keeps these contributions: recounting would see every prompt drawn twice as a repetition.
    """
    *_, (run_N, count_B) = numbered(texts, n)
    shares = (1.0 / np.bincount(run_N)[run_N]).tolist()
    counts = count_B.tolist()
    starts = accumulate(counts, initial=0)
    return [(sum(shares[start : start + count]), count) for start, count in zip(starts, counts, strict=False)]


def forget_scores() -> None:
    """As in a process that has seen no text yet: what ROUGE-L keeps of earlier texts would flatter a benchmark."""
    for kept in (_rouge_tokens, _stems, _rouge_l_of_tokens):
        kept.cache_clear()


def _plain(text: str) -> str:
    return " ".join(_PUNCTUATION.sub("", text.lower()).split())


@lru_cache(maxsize=1 << 17)
def _rouge_tokens(text: str) -> tuple[str, ...]:
    # A reference meets every seed, temperature and model again.
    from rouge_score.tokenize import tokenize

    return tuple(tokenize(text, _stems()))


class _Stems:
    """The stemmer that rouge-score makes for itself, asked once for each word: stemming is nine tenths of its time."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import porter

        self.stem = lru_cache(maxsize=1 << 17)(porter.PorterStemmer().stem)


@lru_cache(maxsize=1)
def _stems() -> _Stems:
    return _Stems()


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

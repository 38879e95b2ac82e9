"""What one response, or a set of responses, is worth as text.

Words are what white space separates, as written. ROUGE-L and exact match alone cut text up in ways of their own.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from minillm.errors import DataError

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


def _plain(text: str) -> str:
    return " ".join(_PUNCTUATION.sub("", text.lower()).split())


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

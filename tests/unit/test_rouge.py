"""Promise: ROUGE-L is rouge-score's own, to the last bit, on text that people wrote and on text that nobody should."""

from __future__ import annotations

import gzip
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer

from minillm.text_measures import rouge_l

DATA = Path(os.environ.get("MINILLM_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
REAL = {"sgd_nlg": "eval.jsonl.gz", "sni": "eval.jsonl.gz", "dolly": "valid.jsonl.gz"}
"""Public sets: Schema-Guided Dialogue as text, Super-NaturalInstructions, Dolly."""
EACH = {"sgd_nlg": 334, "sni": 333, "dolly": 333}
"""Rows of each: a thousand in all."""
BY_HAND: list[tuple[str, list[str]]] = [
    ("", [""]),
    ("", ["a word"]),
    ("a word", [""]),
    ("", ["", "a"]),
    (" \n\t ", ["a word"]),
    ("...", ["!?"]),
    ("…—«»", ["…—«»"]),
    ("--- , ---", ["a word", "---"]),
    ("Ünïcödé naïve café", ["unicode naive cafe", "Ünïcödé naïve café"]),
    ("東京タワー", ["東京タワー"]),
    ("Привет, мир 42", ["42", "Привет, мир"]),
    ("👍🏽 yes", ["yes 👍🏽", "no"]),
    ("e\u0301te\u0301", ["\u00e9t\u00e9"]),
    ("\u200bzero\u200bwidth", ["zero width", "zerowidth"]),
    ("ﬁne ﬂow", ["fine flow"]),
    ("İstanbul ISTANBUL", ["istanbul"]),
    ("\x00null\ud800", ["null"]),
    ("running runs ran easily", ["run run run easy", "He runs easily."]),
    ("running", ["runs"]),
    ("It's U.S. state-of-the-art", ["its us state of the art", "It is the U.S. state of art"]),
    ("1,000.50 3.14", ["1000.50 3 14", "1 000 50"]),
    ("a a a a b", ["b a a a a", "a b a b a", "b"]),
    ("one two three four", ["four three two one", "two four", "one three five"]),
    ("the " * 70, ["the " * 65, "the cat " * 40]),
]


@pytest.fixture(scope="module")
def plain() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def theirs(plain: RougeScorer, response: str, references: Sequence[str]) -> float:
    """The best reference's, by the package as its users call it."""
    found: float = plain.score_multi(list(references), response)["rougeL"].fmeasure
    return found


@pytest.mark.parametrize("place", range(len(BY_HAND)))
def test_pairs_by_hand_are_the_same_to_the_last_bit(place: int, plain: RougeScorer) -> None:
    response, references = BY_HAND[place]
    assert rouge_l(response, references) == theirs(plain, response, references)
    one_by_one = [plain.score(reference, response)["rougeL"].fmeasure for reference in references]
    assert rouge_l(response, references) == max(one_by_one)


def test_all_pairs_of_the_texts_by_hand_are_the_same(plain: RougeScorer) -> None:
    texts = sorted({text for response, references in BY_HAND for text in (response, *references) if len(text) < 99})
    for response, reference in itertools.product(texts, repeat=2):
        assert rouge_l(response, [reference]) == theirs(plain, response, [reference]), (response, reference)


def test_control_without_stems_or_with_the_first_reference_they_are_not() -> None:
    unstemmed = RougeScorer(["rougeL"], use_stemmer=False)
    assert any(rouge_l(*pair) != theirs(unstemmed, *pair) for pair in BY_HAND)
    stemmed = RougeScorer(["rougeL"], use_stemmer=True)
    assert any(rouge_l(response, own) != theirs(stemmed, response, own[:1]) for response, own in BY_HAND)


def real_pairs() -> Iterator[tuple[str, list[str]]]:
    """A row's references, with them an answer to a neighbouring prompt, or the first part of its own."""
    for name, file in REAL.items():
        with gzip.open(DATA / name / file, "rt", encoding="utf-8") as lines:
            rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        outputs = [row["output"] if isinstance(row["output"], list) else [row["output"]] for row in rows]
        some = [own for own in outputs if len(" ".join(own)) < 1500][: EACH[name] + 1]  # tables of words are squares
        for number, (own, after) in enumerate(itertools.pairwise(some)):
            yield (after[0] if number % 2 else own[0][: len(own[0]) * 2 // 3]), own


def test_a_thousand_real_pairs_are_the_same_to_the_last_bit(plain: RougeScorer) -> None:
    if missing := [name for name in REAL if not (DATA / name).is_dir()]:
        pytest.skip(f"no {', '.join(missing)} in {DATA}; set MINILLM_SHARED_DATA to a folder that has them")
    pairs = list(real_pairs())
    assert len(pairs) == 1000
    scores = [rouge_l(response, references) for response, references in pairs]
    assert scores == [theirs(plain, response, references) for response, references in pairs]
    assert len(set(scores)) > 300 and 0.0 in scores, "they say something"

"""Promises: self-BLEU is sacrebleu's sentence BLEU of each text against all others, in one pass over the texts."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from minillm import self_bleu as module
from minillm.measures import ratios_of
from minillm.self_bleu import self_bleu

WORDS = ["ann", "bob", "walks", "feeds", "north", "south", "the", "cat", "and", "then"]


def drawn(seed: int, *, texts: int, words: int, longest: int) -> list[str]:
    """Texts of 1 to ``longest`` words, of which a small vocabulary makes many n-grams shared and repeated."""
    dice = random.Random(seed)
    return [" ".join(dice.choices(WORDS[:words], k=dice.randint(1, longest))) for _ in range(texts)]


SETS = {
    "two": ["a b c d e", "a b c d"],
    "equal": ["a b c d e"] * 3,
    "nothing-shared": ["a b c d", "e f g h", "i j"],
    "short": ["a", "a b", "b a c", "a"],
    "repeats": ["a b a b a b a b", "a b a b", "a b a b a b", "c a b"],
    "as-close": ["a b c d", "a b c", "a b c d e", "x y"],  # references of 3 and 5 words to one of 4
    "case-and-marks": ["Ann walks, then stops.", "ann walks , then stops .", "Größe zählt 鱼 鱼", "Größe zählt"],
    "two-words-of-language": drawn(0, texts=12, words=2, longest=9),
    "many": drawn(1, texts=40, words=6, longest=14),
    "long": drawn(2, texts=15, words=10, longest=40),
}


def theirs(texts: Sequence[str]) -> list[float]:
    """The same by the library, one text after the other."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", lowercase=False, smooth_method="exp", effective_order=True)
    others = [[*texts[:place], *texts[place + 1 :]] for place in range(len(texts))]
    return [bleu.sentence_score(text, rest).score / 100 for text, rest in zip(texts, others, strict=True)]


@pytest.mark.parametrize("name", SETS)
def test_each_text_has_the_bleu_of_the_library(name: str) -> None:
    assert self_bleu(SETS[name]) == pytest.approx(theirs(SETS[name]), abs=1e-12)


@pytest.mark.parametrize("part", ["_two_largest", "_closest_other"])
def test_control_a_text_that_is_its_own_reference_is_seen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for its n-grams, once for its length."""
    real = module._two_largest
    broken = {
        "_two_largest": lambda *cells: (real(*cells)[0], *[np.full_like(cells[0], -1)] * 2),
        "_closest_other": lambda lengths, words: words,
    }
    monkeypatch.setattr(module, part, broken[part])
    wrong = [name for name, texts in SETS.items() if self_bleu(texts) != pytest.approx(theirs(texts), abs=1e-12)]
    assert len(wrong) >= 4, wrong


def test_equal_texts_are_1_and_strangers_0() -> None:
    assert self_bleu(["a b c d e"] * 4) == pytest.approx([1.0] * 4)
    assert self_bleu(["a b c d", "e f g h"]) == [0.0, 0.0]
    assert self_bleu(["a", "a"]) == [1.0, 1.0]


def test_a_text_without_words_has_none_and_is_no_reference() -> None:
    with_it, without = self_bleu(["a b c", " ", "a b", ""]), self_bleu(["a b c", "a b"])
    assert [with_it[0], with_it[2]] == without and with_it[1] is with_it[3] is None
    assert self_bleu(["a b", ""]) == [None, None]
    assert self_bleu([]) == []


def test_the_measure_is_the_mean_over_the_texts_of_each_seed() -> None:
    texts = {10: SETS["many"][:5], 20: SETS["long"][:5]}
    samples = [
        {"uid": str(n), "temperature": 1.0, "seed": seed, "response": text, "tokens": 1, "stop": "eos", "measures": {}}
        for seed, lines in texts.items()
        for n, text in enumerate(lines)
    ]
    found = ratios_of(samples)["self_bleu"]
    assert found.numerator_SN.tolist() == [pytest.approx(theirs(lines)) for lines in texts.values()]
    assert found.denominator_SN.tolist() == [[1.0] * 5] * 2
    together = self_bleu([text for lines in texts.values() for text in lines])
    assert sum(found.numerator_SN.ravel()) < sum(score for score in together if score is not None)  # the control


def test_time_grows_with_the_texts_and_not_with_their_pairs() -> None:
    """Ten times as many texts take some ten times as long; pairs would take a hundred."""
    few, many = (drawn(3, texts=texts, words=10, longest=40) for texts in (200, 2000))
    seconds = []
    for texts in (few, many):
        start = time.process_time()
        assert not any(math.isnan(score or 0.0) for score in self_bleu(texts))
        seconds.append(time.process_time() - start)
    assert seconds[1] < 40 * max(seconds[0], 1e-3)

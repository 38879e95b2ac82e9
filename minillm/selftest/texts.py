"""What is measured on text, and which two tokenizers may meet."""

from __future__ import annotations

from collections.abc import Callable

from minillm import text_measures, vocabulary
from minillm.errors import VocabularyMismatch
from minillm.selftest.check import Check, Found
from minillm.world import build_tokenizer


def rouge() -> Found:
    """'the cat sat' beside 'the cat is on the mat' 4/9, equal texts 1, of references the best, nothing alike 0."""
    cat = "the cat is on the mat"
    cases = (
        ("the cat sat", [cat], 4 / 9),
        (cat, [cat], 1.0),
        ("the cat sat", [cat, "a dog", "the cat sat"], 1.0),
        ("a dog", [cat], 0.0),
        ("The cats, sitting", ["the cat sits"], 1.0),
    )
    return Found(max(abs(text_measures.rouge_l(text, refs) - want) for text, refs, want in cases), 1e-12)


def variety() -> Found:
    """Distinct 4-grams over a set of texts, and repeated runs of three words."""
    texts = ["a b c d e", "a b c d", "e e"]
    shares = text_measures.distinct_contributions(texts, 4)
    wrong = abs(sum(share for share, _ in shares) - 2.0) + abs(sum(count for _, count in shares) - 3)
    wrong += text_measures.repetition_3("a b c d") + (not text_measures.repetition_3("a b c a b c"))
    return Found(wrong, 1e-12)


def refused(call: Callable[[], object]) -> bool:
    """Whether two vocabularies are told apart."""
    try:
        call()
    except VocabularyMismatch:
        return True
    return False


def vocabularies() -> Found:
    """Equal tokenizers share all ids; one more token, or a head without a row for an id, is refused before training."""
    one, same, other = build_tokenizer(), build_tokenizer(), build_tokenizer()
    other.add_tokens(["another"])
    count = vocabulary.agree(one, same)
    wrong = [
        count != len(one),
        vocabulary.real_ids(other) != count + 1,
        not refused(lambda: vocabulary.agree(one, other)),
        not refused(lambda: vocabulary.check_heads(real_ids=count, teacher_rows=count - 1, student_rows=count)),
        refused(lambda: vocabulary.check_heads(real_ids=count, teacher_rows=count + 9, student_rows=count)),
    ]
    return Found(float(sum(wrong)), 0.0)


CHECKS = (
    Check(name="text: ROUGE-L, golden numbers", run=rouge),
    Check(name="text: distinct-4 and repetition-3", run=variety),
    Check(name="text: other vocabularies are refused", run=vocabularies),
)

"""Teacher and student speak the same ids, or are refused with the first differing ones. Strings decide, not sizes."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from minillm import vocabulary
from minillm.errors import ModelError, VocabularyMismatch
from minillm.vocabulary import agree, check_heads, eos_ids, identity

LETTERS = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,'!"]
WORDS = ["<unk>", "<pad>", "<eos>", "<bos>", *LETTERS]


def made(
    words: list[str] = WORDS, *, name: str = "", lower: bool = False, split: str = ".", **special: str | None
) -> PreTrainedTokenizerFast:
    """One token per character, unless ``split`` says otherwise."""
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    if lower:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(split), behavior="isolated")
    names = {"unk_token": "<unk>", "eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"} | special
    given = {key: value for key, value in names.items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=name, **given)


def swapped(first: int, second: int) -> list[str]:
    words = list(WORDS)
    words[first], words[second] = words[second], words[first]
    return words


def test_equal_tokenizers_share_all_their_ids() -> None:
    assert agree(made(), made()) == len(WORDS)


def test_two_swapped_ids_are_shown_with_both_tokens() -> None:
    with pytest.raises(VocabularyMismatch) as caught:
        agree(made(name="big"), made(swapped(4, 6), name="small"))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"teacher big and student small disagree on 2 of {len(WORDS)} token ids."
    assert lines[1:3] == [
        "  id 4 is 'a' for the teacher and 'c' for the student",
        "  id 6 is 'c' for the teacher and 'a' for the student",
    ]
    assert "load the student with the teacher's tokenizer" in lines[3]


def test_comparing_sizes_would_not_have_seen_it() -> None:
    """Negative control of the test above."""
    assert len(made()) == len(made(swapped(4, 6)))


def test_an_offset_shows_the_first_few_and_counts_the_rest() -> None:
    shifted = [*WORDS[:4], "~", *WORDS[4:]]
    with pytest.raises(VocabularyMismatch) as caught:
        agree(made(), made(shifted))
    message = str(caught.value)
    count = len(WORDS) + 1 - 4
    assert f"disagree on {count} of {len(WORDS) + 1} token ids" in message
    assert message.count("\n  id ") == vocabulary.SHOWN and f"and {count - vocabulary.SHOWN} more" in message


@pytest.mark.parametrize("teacher_has_more", [True, False])
def test_an_id_that_only_one_side_has_is_missing_for_the_other(teacher_has_more: bool) -> None:
    pair = (made([*WORDS, "~"]), made())
    with pytest.raises(VocabularyMismatch, match=f"disagree on 1 of {len(WORDS) + 1} token ids") as caught:
        agree(*(pair if teacher_has_more else pair[::-1]))
    sides = ("'~'", "missing") if teacher_has_more else ("missing", "'~'")
    assert f"id {len(WORDS)} is {sides[0]} for the teacher and {sides[1]} for the student" in str(caught.value)


@pytest.mark.parametrize(
    ("special", "line"),
    [
        ({"eos_token": "<pad>"}, "the end-of-text token is '<eos>' (id 2) for the teacher and '<pad>' (id 1)"),
        ({"eos_token": None}, "the end-of-text token is '<eos>' (id 2) for the teacher and missing"),
        ({"bos_token": "a"}, "the begin token is '<bos>' (id 3) for the teacher and 'a' (id 4)"),
        ({"pad_token": "<eos>"}, "the pad token is '<pad>' (id 1) for the teacher and '<eos>' (id 2)"),
    ],
)
def test_other_special_tokens_are_a_mismatch(special: dict[str, str | None], line: str) -> None:
    with pytest.raises(VocabularyMismatch) as caught:
        agree(made(), made(**special))  # type: ignore[arg-type]
    assert line in str(caught.value) and "other special tokens" in str(caught.value)


def test_a_pad_that_one_side_lacks_is_no_mismatch() -> None:
    assert agree(made(), made(pad_token=None)) == len(WORDS)


def test_another_normaliser_is_found_by_the_probes() -> None:
    with pytest.raises(VocabularyMismatch, match="split text differently") as caught:
        agree(made(), made(lower=True))
    assert "differs from token 0 on" in str(caught.value)


def test_another_pre_tokeniser_is_found_by_the_probes() -> None:
    with pytest.raises(VocabularyMismatch, match="split text differently"):
        agree(made(), made(split=r"\S+|\s"))


def test_without_the_probes_they_would_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the two tests above."""
    monkeypatch.setattr(vocabulary, "PROBES", ())
    monkeypatch.setattr(vocabulary, "OWN_WORDS", 0)
    assert agree(made(), made(lower=True)) == agree(made(), made(split=r"\S+|\s")) == len(WORDS)


def test_tokenizers_that_agree_have_one_identity_and_others_another() -> None:
    assert identity(made()) == identity(made(name="elsewhere")) == identity(made(pad_token=None))
    others = [
        made(swapped(7, 9)),
        made([*WORDS, "ä"]),
        made(eos_token="<bos>"),
        made(lower=True),
        made(split=r"\S+|\s"),
        closed(),
        closed(lower=True),
    ]
    assert len({identity(each) for each in [made(), *others]}) == len(others) + 1


def closed(*, lower: bool = False, unknown: bool = False) -> PreTrainedTokenizerFast:
    """Whole words and no token for others, as small worlds have."""
    words = ["<eos>", "A", "a", "b"]
    kind = models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="a" if unknown else "<unk>")
    backend = Tokenizer(kind)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if lower:
        backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_closed_vocabulary_is_probed_with_its_own_words() -> None:
    assert agree(closed(), closed()) == 4
    with pytest.raises(VocabularyMismatch, match=r"'A a b' differs from token 0 on"):
        agree(closed(), closed(lower=True))


def test_a_text_that_only_one_side_can_read_is_a_mismatch() -> None:
    with pytest.raises(VocabularyMismatch, match=r"the teacher's tokenizer cannot read .*, the student's can"):
        agree(closed(), closed(unknown=True))


def test_a_head_may_have_more_rows_than_ids_but_not_fewer() -> None:
    check_heads(real_ids=100, teacher_rows=128, student_rows=100)
    with pytest.raises(VocabularyMismatch, match=r"the student's head has 98 rows .* ids 98 to 99 have no row"):
        check_heads(real_ids=100, teacher_rows=128, student_rows=98)
    with pytest.raises(VocabularyMismatch, match="the teacher's head has 99 rows") as caught:
        check_heads(real_ids=100, teacher_rows=99, student_rows=100)
    assert "resize_token_embeddings" in str(caught.value)


def test_eos_ids_are_the_tokenizers_then_the_generation_configs() -> None:
    assert eos_ids(made(), None) == (2,)
    assert eos_ids(made(), GenerationConfig()) == (2,)
    assert eos_ids(made(), GenerationConfig(eos_token_id=3)) == (2, 3)
    assert eos_ids(made(), GenerationConfig(eos_token_id=[3, 2, 1])) == (2, 3, 1)
    assert eos_ids(made(eos_token=None), GenerationConfig(eos_token_id=1)) == (1,)


def test_no_eos_or_one_outside_the_ids_is_refused() -> None:
    with pytest.raises(ModelError, match="no end-of-text token and the generation config names none"):
        eos_ids(made(eos_token=None), GenerationConfig())
    with pytest.raises(ModelError, match="end-of-text id 5000 is none of the"):
        eos_ids(made(), GenerationConfig(eos_token_id=[2, 5000]))

"""Rows to token ids. Promises:

1. nothing is added, cut or dropped that the report does not count;
2. the response is tokenised apart from the prompt and closed with EOS;
3. the over-long policies do what they are called;
4. the hash changes with anything a model would read, and with nothing else.
"""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from minillm import prompts as prompts_module
from minillm.errors import DataError
from minillm.prompts import PrepareReport, Row, data_hash, encode, prepare
from minillm.types import Prompt

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "c", "d"]
EOS = 1
A, B, C, D = 4, 5, 6, 7


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words between blanks. Its post-processor would add BOS and EOS if special tokens were asked for."""
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>", unk_token="<unk>"
    )


def made(tokenizer: PreTrainedTokenizerFast, rows: list[Row], **settings: object) -> tuple[list[Prompt], PrepareReport]:
    defaults: dict[str, object] = {
        "template": "plain",
        "max_prompt_tokens": 4,
        "over_long": "error",
        "max_response_tokens": 3,
        "eos_id": EOS,
        "need_response": True,
        "name": "train",
    }
    return prepare(rows, tokenizer=tokenizer, **(defaults | settings))  # type: ignore[arg-type]


def row(uid: str, prompt: str = "a b", *responses: str) -> Row:
    return Row(uid=uid, prompt=prompt, responses=responses or ("c",))


def test_prompt_and_response_become_ids_and_nothing_is_added_but_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    source = Row(uid="x", prompt="a b", responses=("c d", "other"), extra={"topic": "t"})
    (prompt,), report = made(tokenizer, [source])
    assert prompt == Prompt(
        uid="x", text="a b", ids=(A, B), responses=("c d", "other"), response_ids=(C, D, EOS), extra={"topic": "t"}
    )
    assert str(report) == "train: 1 row read, 1 used"


def test_the_tokenizer_here_would_add_tokens_if_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    """Negative control of the test above."""
    assert tokenizer("a")["input_ids"] == [2, A, 1]


def test_no_token_spans_the_border_of_prompt_and_response() -> None:
    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": 1, "b": 2, "ab": 3}, merges=[("a", "b")]))
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    (prompt,), _ = made(merging, [row("x", "a", "b")], eos_id=0)
    assert prompt.ids + prompt.response_ids == (1, 2, 0)
    assert merging("ab", add_special_tokens=False)["input_ids"] == [3]  # the control: together they merge


def test_batches_of_encoding_keep_the_order(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "b b", "", "c", "d a b"]
    whole = encode(texts, tokenizer, uids=texts)
    monkeypatch.setattr(prompts_module, "ENCODE_ROWS", 2)
    assert encode(texts, tokenizer, uids=texts) == whole == [(A,), (B, B), (), (C,), (D, A, B)]


def test_a_tokenizer_file_that_asks_for_cuts_and_padding_gets_neither(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["a", "b b c d", "d"]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(pad_id=0)
    control = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert [encoding.ids for encoding in control] == [[A, 0], [B, B], [D, 0]]
    assert encode(texts, tokenizer, uids=texts) == [(A,), (B, B, C, D), (D,)]


def test_a_tokenizer_in_python_gives_what_it_gives_itself() -> None:
    slow = ByT5Tokenizer()
    assert not slow.is_fast
    texts = ["a b", "é"]
    assert encode(texts, slow, uids=texts) == [
        tuple(slow(text, add_special_tokens=False)["input_ids"]) for text in texts
    ]


@pytest.mark.parametrize("blank", ["", " \n\t", "\u00a0"])
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_a_blank_prompt_is_dropped_and_counted(tokenizer: PreTrainedTokenizerFast, blank: str, template: str) -> None:
    rows = [row("x"), Row(uid="y", instruction=blank, input=blank, responses=("c",)), row("z", blank)]
    got, report = made(tokenizer, rows, template=template, max_prompt_tokens=99)
    assert [prompt.uid for prompt in got] == ["x"]
    assert str(report) == "train: 3 rows read, 1 used; dropped 2 blank prompts: y, z"


def test_rows_that_cannot_be_learnt_from_are_dropped_each_for_its_reason(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("x"), Row(uid="none", prompt="a"), row("blank", "a", " "), row("early", "a", "c <eos> d"[:7])]
    got, report = made(tokenizer, rows)
    assert [prompt.uid for prompt in got] == ["x"]
    assert str(report) == (
        "train: 4 rows read, 1 used; dropped 1 prompt without a response: none; dropped 1 blank response: blank; "
        "dropped 1 response with the end-of-text token inside: early"
    )


def test_without_need_of_a_response_those_rows_stay_and_the_change_is_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [
        Row(uid="none", prompt="a"),
        row("blank", "a", " "),
        row("early", "a", "c <eos>"),
        row("long", "a", "c c c"),
    ]
    got, report = made(tokenizer, rows, need_response=False)
    assert [prompt.response_ids for prompt in got] == [(), (EOS,), (), ()]
    assert got[3].responses == ("c c c",)
    assert str(report) == (
        "train: 4 rows read, 4 used; kept as text, not as token ids, 1 over-long response (> 3 tokens): long; "
        "kept as text, not as token ids, 1 response with the end-of-text token inside: early"
    )


def test_over_long_error_names_the_rows_the_limit_and_the_remedy(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("ok"), *[row(f"p-{place}", "a " * (5 + place)) for place in range(5)]]
    with pytest.raises(DataError) as caught:
        made(tokenizer, rows)
    message = str(caught.value)
    assert message.startswith("train: 5 over-long prompts (> 4 tokens): p-0, p-1, p-2, …\n")
    assert "the longest has 9 tokens; raise data.max_prompt_tokens" in message and "keep_right" in message


def test_over_long_drop_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    got, report = made(tokenizer, [row("x"), row("y", "a a a a a")], over_long="drop")
    assert [prompt.uid for prompt in got] == ["x"]
    assert str(report) == "train: 2 rows read, 1 used; dropped 1 over-long prompt (> 4 tokens): y"


def test_over_long_keep_right_keeps_the_end_and_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    (prompt,), report = made(tokenizer, [row("y", "a b a b c d")], over_long="keep_right")
    assert prompt.ids == (A, B, C, D) and prompt.text == "a b c d"
    assert str(report) == "train: 1 row read, 1 used; kept the right end of 1 over-long prompt (> 4 tokens): y"


@pytest.mark.parametrize("over_long", ["error", "drop", "keep_right"])
def test_a_length_at_its_limit_is_not_over_long(tokenizer: PreTrainedTokenizerFast, over_long: str) -> None:
    (prompt,), report = made(tokenizer, [row("x", "a a a a", "c c")], over_long=over_long)
    assert (len(prompt.ids), len(prompt.response_ids)) == (4, 3) and report.dropped == report.changed == ()


def test_an_over_long_response_is_an_error_or_dropped_and_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row("x"), row("y", "a", "c c c")]
    with pytest.raises(DataError, match=r"1 over-long response \(> 3 tokens\): y\n.*raise decoding.max_new_tokens"):
        made(tokenizer, rows)
    for over_long in ("drop", "keep_right"):
        got, report = made(tokenizer, rows, over_long=over_long)
        assert [prompt.uid for prompt in got] == ["x"] and "dropped 1 over-long response" in str(report)


def test_no_prompt_left_is_an_error_with_the_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"2 rows read, 0 used; dropped 2 blank prompts: x, y\n  no prompt is left"):
        made(tokenizer, [row("x", " "), row("y", "")])
    with pytest.raises(DataError, match="0 rows read"):
        made(tokenizer, [])


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_a_word_that_no_token_stands_for_names_its_row(field: str) -> None:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    closed = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    bad = row("bad", "a zebra", "a") if field == "prompt" else row("bad", "a", "zebra")
    with pytest.raises(DataError, match=r"row 'bad': the tokenizer cannot read the text .*vocabulary: 'zebra'\)"):
        made(closed, [row("x", "a", "a"), bad], eos_id=0)


def test_the_hash_knows_everything_that_is_read_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt(uid="x", text="a b", ids=(A, B), responses=("c",), response_ids=(C, EOS))
    other = dataclasses.replace(prompt, uid="y")
    base = data_hash([prompt, other])
    changed = [
        [other, prompt],
        [prompt],
        [dataclasses.replace(prompt, uid="z"), other],
        [dataclasses.replace(prompt, ids=(A,)), other],
        [dataclasses.replace(prompt, ids=(A, B, C), response_ids=(EOS,)), other],
    ]
    assert len({base, *map(data_hash, changed)}) == 1 + len(changed)
    assert data_hash([dataclasses.replace(prompt, extra={"topic": "t"}), other]) == base
    assert len(base) == 64

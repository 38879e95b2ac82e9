"""Templates. The Alpaca texts are golden: models in the field were trained on exactly these characters."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minillm import templates
from minillm.errors import DataError
from minillm.records import Row
from minillm.templates import is_blank, render

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n"
)
CHAT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", name_or_path="tiny")


def test_plain_leaves_a_prompt_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<bos> say  {x}\n<sep>"
    assert render(Row(uid="x", prompt=text), template="plain", tokenizer=tokenizer) == text


@pytest.mark.parametrize(("more", "want"), [("2+2", "Add.\n\n2+2"), ("", "Add."), (" \n", "Add.")])
def test_plain_joins_instruction_and_input_by_a_blank_line(
    tokenizer: PreTrainedTokenizerFast, more: str, want: str
) -> None:
    row = Row(uid="x", instruction="Add.", input=more)
    assert render(row, template="plain", tokenizer=tokenizer) == want


@pytest.mark.parametrize(("more", "want"), [("2+2", ALPACA_WITH_INPUT), ("", ALPACA), (" ", ALPACA)])
def test_alpaca_is_the_published_text(tokenizer: PreTrainedTokenizerFast, more: str, want: str) -> None:
    row = Row(uid="x", instruction="Add.", input=more)
    assert render(row, template="alpaca", tokenizer=tokenizer) == want


def test_alpaca_takes_a_bare_prompt_as_the_instruction(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render(Row(uid="x", prompt="Add."), template="alpaca", tokenizer=tokenizer) == ALPACA


def test_alpaca_does_not_wrap_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="row 'x' has a prompt in the Alpaca form already"):
        render(Row(uid="x", prompt=ALPACA), template="alpaca", tokenizer=tokenizer)


def test_braces_of_the_user_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(uid="x", instruction="{input} {0}", input="{instruction}")
    text = render(row, template="alpaca", tokenizer=tokenizer)
    assert "### Instruction:\n{input} {0}\n\n### Input:\n{instruction}\n\n" in text


def test_the_instruction_goes_before_a_ready_made_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    """Test files often carry both; training files only the instruction. Both must reach the model in one form."""
    both, bare = Row(uid="x", instruction="Add.", prompt="ready"), Row(uid="x", instruction="Add.")
    for template in ("plain", "alpaca"):
        assert render(both, template=template, tokenizer=tokenizer) == render(
            bare, template=template, tokenizer=tokenizer
        )


@pytest.mark.parametrize("row", [Row(uid="x", prompt="Add."), Row(uid="x", instruction="Add.")])
def test_chat_makes_a_prompt_one_user_message(tokenizer: PreTrainedTokenizerFast, row: Row) -> None:
    tokenizer.chat_template = CHAT
    assert render(row, template="chat", tokenizer=tokenizer) == "<user>Add.</><assistant>"


def test_chat_keeps_every_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    row = Row(uid="x", messages=(("user", "a"), ("assistant", "b"), ("user", "c")))
    assert render(row, template="chat", tokenizer=tokenizer) == "<user>a</><assistant>b</><user>c</><assistant>"


def test_chat_without_a_template_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"needs a chat template, and tokenizer 'tiny' has none\n  set template: plain"):
        render(Row(uid="x", prompt="a"), template="chat", tokenizer=tokenizer)


def test_a_chat_template_that_refuses_names_the_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHAT
    row = Row(uid="row-7", messages=(("system", "a"), ("user", "b")))
    with pytest.raises(DataError, match=r"row 'row-7': .* refuses the messages \('system', 'user'\): no system role"):
        render(row, template="chat", tokenizer=tokenizer)


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_messages_need_the_chat_template(tokenizer: PreTrainedTokenizerFast, template: templates.Template) -> None:
    with pytest.raises(DataError, match="set template: chat"):
        render(Row(uid="x", messages=(("user", "a"),)), template=template, tokenizer=tokenizer)


def test_blank_is_what_the_user_wrote_not_what_the_template_adds() -> None:
    blank = [
        Row(uid="x", prompt=" \n"),
        Row(uid="x", instruction="", input=" "),
        Row(uid="x", messages=(("user", ""),)),
    ]
    full = [Row(uid="x", prompt="a"), Row(uid="x", instruction="", input="a"), Row(uid="x", messages=(("user", "a"),))]
    assert [is_blank(row) for row in blank + full] == [True] * 3 + [False] * 3


def test_alpaca_equals_the_ready_made_prompts_of_a_public_test_set(tokenizer: PreTrainedTokenizerFast) -> None:
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("MINILLM_SHARED_DATA", default)) / "self_instruct" / "user_oriented.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent; set MINILLM_SHARED_DATA to the folder of public data sets")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    assert len(records) == 252
    for record in records:
        row = Row(uid=record["id"], instruction=record["instruction"], input=record["input"])
        assert render(row, template="alpaca", tokenizer=tokenizer) == record["prompt"]

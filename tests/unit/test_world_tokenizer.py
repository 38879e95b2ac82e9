"""The world's tokenizer: one id a word, the same text back, nothing from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minillm.world import build_tokenizer, rows
from minillm.world.phrases import vocabulary
from minillm.world.tokenizer import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def built() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module", params=["built", "reloaded"])
def tokenizer(
    request: pytest.FixtureRequest, built: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerFast:
    if request.param == "built":
        return built
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    built.save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def texts() -> list[str]:
    found = rows("train", count=2000) + rows("test", count=100)
    return [text for row in found for text in (str(row["prompt"]), *row["responses"])]


def test_the_vocabulary_is_the_special_tokens_and_the_words(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == [*SPECIAL_TOKENS, *vocabulary()]
    assert len(tokenizer) == 232
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2, 3)


def test_every_word_is_used_by_some_row() -> None:
    used = {word for row in rows("train") for text in (str(row["prompt"]), *row["responses"]) for word in text.split()}
    assert used == {*vocabulary(), "<bos>", "<sep>"}


def test_text_comes_back_as_it_went_in(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in texts():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


def test_special_tokens_vanish_on_request(tokenizer: PreTrainedTokenizerFast) -> None:
    row = rows("test", count=1)[0]
    ids = [*tokenizer(row["responses"][0])["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == row["responses"][0]
    assert tokenizer.decode(ids, skip_special_tokens=False) != row["responses"][0]


def test_nothing_is_added_to_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = str(rows("test", count=1)[0]["prompt"])
    bare = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer(prompt, add_special_tokens=True)["input_ids"] == bare
    assert (bare[0], bare[-1]) == (tokenizer.bos_token_id, tokenizer.sep_token_id)


def test_a_word_from_outside_raises_instead_of_turning_into_another(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("anna likes teapots")

"""A corpus of running text. Promises:

1. every accepted form gives the same documents; what is neither text nor prompt, or both, is an error with its place;
2. every token of the documents that are used stands in the blocks once and in order, each document closed with EOS;
3. all tokens of a block but its first are learnt;
4. what is dropped is counted: blank documents, those with an end token inside, a last token alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minillm import prompts, row_sources
from minillm.batches import example_batch
from minillm.corpus import Blocks, blocks_of
from minillm.errors import DataError
from minillm.prompts import data_hash
from minillm.records import Document, Row
from minillm.rows import read_corpus, read_rows
from tests import tiny

EOS, PAD = tiny.WORDS.index(tiny.EOS), tiny.WORDS.index("<pad>")
TEXTS = ("a b c", "d", "e f g h i")


def ids_of(text: str) -> list[int]:
    return [tiny.WORDS.index(word) for word in text.split()]


STREAM = [token for text in TEXTS for token in (*ids_of(text), EOS)]


def documents(*texts: str) -> list[Document]:
    return [Document(uid=f"d-{place}", text=text) for place, text in enumerate(texts)]


def blocks(texts: Sequence[str], length: int, ends: Sequence[int] = (EOS,)) -> tuple[Blocks, str]:
    made, report = blocks_of(documents(*texts), tokenizer=tiny.tokenizer(), ends=ends, length=length, name="corpus")
    return made, str(report)


def written(folder: Path, name: str, lines: Sequence[dict[str, Any]]) -> str:
    path = folder / name
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(lines)), path)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def texts_of(source: str, **policy: Any) -> list[str]:
    found, _ = read_corpus(source, **policy)
    assert all(isinstance(one, Document) for one in found)
    return [one.text for one in found if isinstance(one, Document)]


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("a b c\n\nd\n\ne f\ng h i\n", ["a b c", "d", "e f\ng h i"]),
        ("a\n \t\n\n\nb", ["a", "b"]),
        ("\n\n  a\nb  \n\n", ["  a\nb  "]),
        ("a\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
        ("é\n", ["é"]),
    ],
)
def test_blank_lines_part_the_documents_of_a_text_file(tmp_path: Path, raw: str, want: list[str]) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(raw.encode())
    assert texts_of(str(path)) == want


def test_a_document_of_a_text_file_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("\na\nb\n\nc\n", encoding="utf-8")
    found, report = read_corpus(str(path))
    assert [one.uid for one in found] == ["c-2", "c-5"] and report.rows == 2


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_rows_with_a_text_field_are_documents(tmp_path: Path, name: str) -> None:
    source = written(tmp_path, name, [{"text": text, "url": "u"} for text in TEXTS])
    found, report = read_corpus(source)
    assert [(one.uid, one.text) for one in found if isinstance(one, Document)] == [
        (f"c-{number}", text) for number, text in enumerate(TEXTS, start=1)
    ]
    assert report.ignored == {"url": 3}


def test_a_row_with_a_prompt_is_read_as_everywhere(tmp_path: Path) -> None:
    """Alpaca's rows carry prompt and response once more in a field 'text'."""
    row = {"instruction": "a", "output": "b", "text": "a b"}
    source = written(tmp_path, "c.jsonl", [row])
    (found,), _ = read_corpus(source)
    assert found == read_rows(source)[0][0]
    assert isinstance(found, Row) and (found.instruction, found.responses) == ("a", ("b",))


def test_documents_and_prompts_in_one_corpus_are_refused(tmp_path: Path) -> None:
    source = written(tmp_path, "c.jsonl", [{"text": "a"}, {"prompt": "a", "response": "b"}, {"text": "c"}])
    with pytest.raises(DataError, match=r"2 documents \('c-1' is the first\) and 1 row with a prompt \('c-2'\)"):
        read_corpus(source, broken="skip", max_broken=3)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"txt": "a"}, "neither text nor prompt: the fields are 'txt'; wanted 'text', or a prompt"),
        ({"txt": "a"}, "did you mean 'text'?"),
        ({"response": "a"}, "neither text nor prompt"),
        ({"text": None}, "neither text nor prompt"),
        ({"text": 3}, "field 'text' is a number, wanted text"),
        ({"text": "a\x00"}, "field 'text' holds a NUL character"),
        ({}, "the object is empty"),
    ],
)
def test_a_broken_row_is_an_error_or_counted(tmp_path: Path, line: dict[str, Any], reason: str) -> None:
    source = written(tmp_path, "c.jsonl", [{"text": "a"}, line])
    with pytest.raises(DataError) as caught:
        read_corpus(source)
    assert str(caught.value).startswith(f"{source}, line 2") and reason in str(caught.value)
    found, report = read_corpus(source, broken="skip", max_broken=1)
    assert len(found) == 1 and "skipped 1 broken row: line 2 (" in str(report)


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"a\n\nb\nc\xff\n\nd\n", "line 4, column 2: not UTF-8"),
        (b"a\n\nb\x00\n", "line 3, column 2: a NUL byte"),
        (b"\xef\xbb\xbfa\n", "line 1, column 1: the file starts with a byte-order mark"),
    ],
)
def test_a_text_file_that_is_not_plain_text_names_the_line(tmp_path: Path, raw: bytes, place: str) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=place):
        read_corpus(str(path))


def test_a_document_without_end_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "MAX_LINE_BYTES", 10)
    path = tmp_path / "c.txt"
    path.write_text("a\n\nb b b\nb b b\nb\n\nc\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 3: a document longer than 16 MiB .* a blank line parts documents"):
        read_corpus(str(path))
    assert texts_of(str(path), broken="skip", max_broken=1) == ["a", "c"]


@pytest.mark.parametrize("raw", ["", "\n \n"])
def test_an_empty_text_file_is_an_error(tmp_path: Path, raw: str) -> None:
    path = tmp_path / "c.txt"
    path.write_text(raw, encoding="utf-8")
    with pytest.raises(DataError, match=r"c.txt is empty(.|\n)*in a .txt file lines of text"):
        read_corpus(str(path))


def test_a_missing_corpus_names_its_neighbour_and_a_prompt_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"did you mean 'corpus.txt'"):
        read_corpus(str(tmp_path / "corpsu.txt"))
    with pytest.raises(DataError, match="not a kind of prompt file"):
        read_rows(str(tmp_path / "corpus.txt"))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 11, 12, 13, 99])
def test_every_token_stands_in_the_blocks_once_and_in_order(length: int) -> None:
    made, report = blocks(TEXTS, length)
    joined = [token for block in made for token in block.ids + block.response_ids]
    alone = len(STREAM) % length == 1
    assert len(STREAM) == 12 and joined == (STREAM[:-1] if alone else STREAM)
    assert all(len(block.ids) == 1 and block.response_ids for block in made)
    sizes = [1 + len(block.response_ids) for block in made]
    assert set(sizes[:-1]) <= {length} and len(made) == len(sizes)
    assert ("left out 1 token" in str(made)) is alone
    assert report == "corpus: 3 documents read, 3 used"


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (4, "3 blocks of 4 tokens"),
        (5, "3 blocks of 5 tokens, the last of 2"),
        (11, "1 block of 11 tokens; left out 1 token at the end"),
        (12, "1 block of 12 tokens"),
        (99, "1 block of 12 tokens"),
    ],
)
def test_blocks_say_how_many_and_how_long_they_are(length: int, words: str) -> None:
    assert str(blocks(TEXTS, length)[0]) == words


def test_all_of_a_block_but_its_first_token_is_learnt() -> None:
    made, _ = blocks(TEXTS, 5)
    batch = example_batch(list(made), pad_id=PAD, device="cpu")
    assert batch.ids_BL.tolist() == [STREAM[:5], STREAM[5:10], [*STREAM[10:], PAD, PAD, PAD]]
    assert batch.target_BL.tolist() == [[False, *[True] * 4]] * 2 + [[False, True, False, False, False]]
    assert batch.mask_BL.sum() == len(STREAM)


def test_documents_are_encoded_in_batches_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    want = [*blocks(TEXTS, 5)[0]]
    monkeypatch.setattr("minillm.corpus.ENCODE_ROWS", 2)
    assert [*blocks(TEXTS, 5)[0]] == want and prompts.ENCODE_ROWS > 2


@pytest.mark.parametrize("ends", [(EOS,), (ids_of("z")[0], EOS)])
def test_a_text_never_brings_an_end_token_of_its_own(ends: tuple[int, ...]) -> None:
    """Such a document is dropped, whichever of the ids that end a response it holds; and blank ones are."""
    made, report = blocks(["a b", f"c {tiny.EOS} d", " \n", "e", f"f {tiny.EOS}"], 99, ends)
    assert made[0].ids + made[0].response_ids == (*ids_of("a b"), ends[0], *ids_of("e"), ends[0])
    assert report == (
        "corpus: 5 documents read, 2 used; dropped 1 blank document: d-2; "
        "dropped 2 documents with an end token inside: d-1, d-4"
    )


def test_no_document_left_is_an_error_with_its_remedy() -> None:
    with pytest.raises(DataError, match=r"1 blank document: d-0\n  no document is left; write something"):
        blocks([" "], 5)
    with pytest.raises(DataError, match="take the end tokens out of the text"):
        blocks([f"a {tiny.EOS} b"], 5)


def test_the_hash_knows_text_and_length() -> None:
    changed = [blocks(TEXTS, 5), blocks(TEXTS, 6), blocks((*TEXTS, "j"), 5), blocks(("a b d", *TEXTS[1:]), 5)]
    assert len({data_hash(made) for made, _ in changed}) == len(changed)
    again = data_hash([dataclasses.replace(block) for block in blocks(TEXTS, 5)[0]])
    assert again == data_hash(blocks(TEXTS, 5)[0])

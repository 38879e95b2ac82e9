"""Reading prompt files. Promises:

1. every kind of broken row is a ``DataError`` that names file and line, and the column where there is one;
2. ``broken: skip`` counts what it leaves out, lists it, and stops at ``max_broken``;
3. a source that cannot be read at all is an error in both modes, with a hint at what was meant;
4. every accepted form of a row gives the same ``Row``, and nothing is left out silently.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest

from minillm import records, row_sources
from minillm.errors import DataError
from minillm.rows import read_rows
from minillm.world import rows as world_rows

GOOD = b'{"prompt": "2+2=", "response": "4"}\n'
BROKEN = {
    "invalid UTF-8": (b'{"prompt": "\xc3\xa9\xff"}\n', "column 14: not UTF-8: byte 0xff"),
    "NUL byte": (b'{"prompt"\x00: "a"}\n', "column 10: a NUL byte"),
    "NUL character": (b'{"prompt": "a\\u0000b"}\n', "field 'prompt' holds a NUL character"),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}\n', "holds half a character (\\ud800)"),
    "cut last line": (b'{"prompt": "abc', "column 12: not JSON: unterminated string; the last line has no end"),
    "missing comma": (b'{"prompt": "a" "response": "b"}\n', "column 16: not JSON: expecting ',' delimiter"),
    "text after the object": (b'{"prompt": "a"} {"prompt": "b"}\n', "column 17: not JSON: extra data"),
    "blank line": (b"\n", "the line is blank"),
    "not an object": (b'["a"]\n', "got a list, wanted a JSON object"),
    "duplicate key": (b'{"prompt": "a", "prompt": "b"}\n', "field 'prompt' is there twice"),
    "duplicate inner key": (b'{"prompt": "a", "x": {"y": 1, "y": 2}}\n', "field 'y' is there twice"),
    "NaN": (b'{"prompt": "NaN", "x": NaN}\n', "column 24: NaN is not a JSON number"),
    "minus Infinity": (b'{"prompt": "a\\"", "x": -Infinity}\n', "column 24: -Infinity is not a JSON number"),
    "a number without bound": (b'{"prompt": "a", "x": 1e999}\n', "number '1e999' is too large"),
    "an integer without end": (b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}\n", "not JSON: Exceeds the limit"),
    "nested without end": (b"[" * 100_000 + b"\n", "nested too deeply"),
    "misspelt field": (b'{"promt": "a"}\n', "no prompt: the fields are 'promt'; wanted 'prompt'"),
    "null prompt": (b'{"prompt": null}\n', "no prompt: the fields are 'prompt'"),
    "empty object": (b"{}\n", "no prompt: the object is empty"),
    "prompt a number": (b'{"prompt": 3}\n', "field 'prompt' is a number, wanted text"),
    "prompt a boolean": (b'{"prompt": true}\n', "field 'prompt' is true or false, wanted text"),
    "response a list of numbers": (b'{"prompt": "a", "output": [1]}\n', "field 'output' is a number, wanted text or a"),
    "response an empty list": (b'{"prompt": "a", "output": []}\n', "field 'output' is an empty list"),
    "two response fields": (b'{"prompt": "a", "output": "x", "response": "y"}\n', "'response' and 'output' both hold"),
    "input alone": (b'{"prompt": "a", "input": "b"}\n', "field 'input' needs an 'instruction'"),
    "id a list": (b'{"prompt": "a", "id": [1]}\n', "field 'id' is a list, wanted text or a whole number"),
    "id blank": (b'{"prompt": "a", "id": " "}\n', "field 'id' is blank"),
    "messages a text": (b'{"messages": "hello"}\n', "field 'messages' is text, wanted a list"),
    "messages empty": (b'{"messages": []}\n', "field 'messages' is an empty list"),
    "message without content": (b'{"messages": [{"role": "user"}]}\n', "messages[0] has the fields 'role'"),
    "message of parts": (
        b'{"messages": [{"role": "user", "content": [{"text": "a"}]}]}\n',
        "'messages[0].content' is a list, wanted text",
    ),
    "no user": (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "no turn of the user"),
}


def write(folder: Path, *lines: bytes, name: str = "train.jsonl") -> str:
    path = folder / name
    data = b"".join(lines)
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def test_rows_of_the_world_are_the_same_however_often_they_are_read() -> None:
    """They are made once in a process, and no reader changes them."""
    first, again = read_rows("world:test")[0], read_rows("world:test")[0]
    assert first == again and first is not again
    made = world_rows("test")
    assert [row.uid for row in first] == [row["id"] for row in made]
    assert [list(row.responses) for row in again] == [row["responses"] for row in made]


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_a_broken_row_is_an_error_with_file_line_and_reason(tmp_path: Path, case: str, name: str) -> None:
    line, reason = BROKEN[case]
    source = write(tmp_path, GOOD, line, name=name)
    with pytest.raises(DataError) as caught:
        read_rows(source)
    message = str(caught.value)
    assert message.startswith(f"{source}, line 2") and reason in message
    assert "data.broken: skip" in message


@pytest.mark.parametrize("case", BROKEN)
def test_skip_counts_a_broken_row_and_keeps_the_rest(tmp_path: Path, case: str) -> None:
    line, _ = BROKEN[case]
    # The cut line can only be the last; so it is here for all.
    got, report = read_rows(write(tmp_path, GOOD, line), broken="skip", max_broken=1)
    assert [row.uid for row in got] == ["train-1"]
    assert (report.rows, report.used) == (2, 1)
    assert "skipped 1 broken row: line 2 (" in str(report)


def test_the_cases_above_are_broken_by_what_they_name(tmp_path: Path) -> None:
    """Negative control: the good line alone reads, so no case fails because of its neighbour."""
    got, report = read_rows(write(tmp_path, GOOD, GOOD))
    assert len(got) == 2 and str(report).endswith("2 rows read")


def test_without_the_strict_decoder_a_duplicate_key_would_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the strict reader: Python's own keeps the last of two values and says nothing."""
    source = write(tmp_path, BROKEN["duplicate key"][0], BROKEN["NaN"][0])
    monkeypatch.setattr(records, "_DECODER", json.JSONDecoder())
    assert [row.prompt for row in read_rows(source)[0]] == ["b", "NaN"]


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe"])
def test_a_byte_order_mark_is_an_error_with_its_remedy(tmp_path: Path, mark: bytes) -> None:
    with pytest.raises(DataError, match="line 1, column 1: the file starts with a byte-order mark; save it as UTF-8"):
        read_rows(write(tmp_path, mark, GOOD))


def test_a_duplicate_id_names_both_lines(tmp_path: Path) -> None:
    line = b'{"id": "x", "prompt": "a"}\n'
    with pytest.raises(DataError, match="line 3: id 'x' already names line 1"):
        read_rows(write(tmp_path, line, GOOD, line))


def test_ids_that_would_steer_a_terminal_are_escaped(tmp_path: Path) -> None:
    line = b'{"id": "a\\u001b[31m", "prompt": "a"}\n'
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, line, line))
    assert "\x1b" not in str(caught.value)


def test_a_line_over_the_bound_is_broken_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "MAX_LINE_BYTES", 64)
    long = b'{"prompt": "' + b"a" * 1000 + b'"}\n'
    got, report = read_rows(write(tmp_path, long, GOOD), broken="skip", max_broken=1)
    assert [row.uid for row in got] == ["train-2"]
    assert report.skipped[0].where == "line 1" and "longer than" in report.skipped[0].reason


def test_a_line_at_the_bound_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "MAX_LINE_BYTES", len(GOOD))
    assert len(read_rows(write(tmp_path, GOOD, GOOD))[0]) == 2


def test_more_broken_rows_than_allowed_are_an_error_that_lists_them(tmp_path: Path) -> None:
    source = write(tmp_path, GOOD, b"x\n", GOOD, b"y\n", b"z\n")
    assert read_rows(source, broken="skip", max_broken=3)[1].used == 2
    with pytest.raises(DataError) as caught:
        read_rows(source, broken="skip", max_broken=2)
    message = str(caught.value)
    assert "line 5" in message and "max_broken allows 2" in message and "broken before it: line 2, line 4" in message


def test_strict_mode_ignores_max_broken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2"):
        read_rows(write(tmp_path, GOOD, b"x\n"), broken="error", max_broken=9)


def test_many_skips_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    _, report = read_rows(write(tmp_path, GOOD, *[b"x\n"] * 5), broken="skip", max_broken=5)
    assert str(report).count("line") == records.SHOWN and str(report).endswith("…")


def test_an_empty_file_and_a_file_of_broken_rows_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty: it holds no rows"):
        read_rows(write(tmp_path, b""))
    with pytest.raises(DataError, match="no row is left"):
        read_rows(write(tmp_path, b"x\n"), broken="skip", max_broken=9)


def test_a_missing_file_points_to_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, GOOD, name="train.jsonl")
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist; did you mean 'train\.jsonl'\?"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"is there; it holds train\.jsonl"):
        read_rows(str(tmp_path / "zzz.parquet"))
    with pytest.raises(DataError, match="neither does its folder"):
        read_rows(str(tmp_path / "no" / "train.jsonl"))


def test_an_empty_folder_or_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.jsonl .* file lies in it"):
        read_rows(str(tmp_path))
    with pytest.raises(DataError, match="not a kind of prompt file"):
        read_rows(write(tmp_path, GOOD, name="train.csv"))


def test_a_named_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="not a kind of prompt file"):
        read_rows(str(tmp_path / "train.jsonl"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain text"])
def test_a_damaged_archive_is_never_skipped(tmp_path: Path, damage: str) -> None:
    lines = b"".join(b'{"prompt": "%d"}\n' % number for number in range(5000))
    whole = gzip.compress(lines)
    flipped = whole[:2000] + bytes([whole[2000] ^ 0xFF]) + whole[2001:]
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes({"cut": whole[:-20], "flipped": flipped, "plain text": lines}[damage])
    with pytest.raises(DataError):
        read_rows(str(path), broken="skip", max_broken=0)
    if damage != "flipped":  # a flipped bit may spoil text before the checksum is met: then rows are broken first
        with pytest.raises(DataError, match="the file is damaged"):
            read_rows(str(path), broken="skip", max_broken=10_000)


def test_every_form_of_a_row_is_read(tmp_path: Path) -> None:
    forms = [
        {"uid": "a", "prompt": "p", "response": "r"},
        {"id": 7, "instruction": "i", "input": "n", "output": ["r", "s"]},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "r"}]},
        {"prompt": "p", "responses": ["r"], "answer": 72, "topic": "sum", "score": 0.5, "ok": True, "none": None},
    ]
    got, report = read_rows(write(tmp_path, *[json.dumps(form).encode() + b"\n" for form in forms]))
    assert [row.uid for row in got] == ["a", "7", "train-3", "train-4"]
    assert (got[0].prompt, got[0].responses) == ("p", ("r",))
    assert (got[1].instruction, got[1].input, got[1].responses) == ("i", "n", ("r", "s"))
    assert (got[2].messages, got[2].responses) == ((("user", "u"),), ("r",))
    assert got[3].extra == {"answer": "72", "topic": "sum", "score": "0.5", "ok": "true"}
    assert report.ignored == {}


def test_a_last_line_without_a_newline_is_whole(tmp_path: Path) -> None:
    assert len(read_rows(write(tmp_path, GOOD, GOOD.rstrip()))[0]) == 2


def test_fields_left_out_are_reported(tmp_path: Path) -> None:
    line = b'{"prompt": "a", "tags": ["x"]}\n'
    _, report = read_rows(write(tmp_path, line, line))
    assert str(report).endswith("left out 1 field not read here: 'tags' (in 2 rows)")


def test_a_prompt_beside_messages_is_left_out_and_reported(tmp_path: Path) -> None:
    line = b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}\n'
    got, report = read_rows(write(tmp_path, line))
    assert got[0].prompt is None and "'prompt' (in 1 row)" in str(report)


def test_two_answers_to_one_conversation_are_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "r"}]
    line = json.dumps({"messages": turns, "response": "other"}).encode()
    with pytest.raises(DataError, match="there is a response field too"):
        read_rows(write(tmp_path, line))


def test_parquet_gives_the_rows_of_the_same_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records_ = [
        {"id": "a", "prompt": "p", "responses": ["r", "s"], "answer": 1},
        {"id": "b", "prompt": "q", "responses": None, "answer": 2},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records_), tmp_path / "train.parquet")
    from_lines = read_rows(write(tmp_path, *[json.dumps(record).encode() + b"\n" for record in records_]))[0]
    assert read_rows(str(tmp_path / "train.parquet"))[0] == from_lines


def test_a_broken_parquet_row_is_named_and_a_broken_file_is_an_error(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"train\.parquet, row 2: no prompt"):
        read_rows(str(tmp_path / "train.parquet"))
    with pytest.raises(DataError, match="cannot be read as Parquet: "):
        read_rows(write(tmp_path, GOOD, name="other.parquet"))


def test_hub_names_are_loaded_by_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, object]]:
        calls.append((name, config, split))
        return [{"prompt": "a", "response": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    got, report = read_rows("hub:openai/gsm8k:main@train")
    read_rows("hub:some@test[:5]")
    assert calls == [("openai/gsm8k", "main", "train"), ("some", None, "test[:5]")]
    assert got[0].uid == "gsm8k-1" and str(report).startswith("hub:openai/gsm8k:main@train: 1 row read")


def test_a_hub_failure_is_a_data_error_with_its_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nlong tail")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"could not be loaded: ConnectionError: no route\n  check name"):
        read_rows("hub:some/set@train")


@pytest.mark.parametrize("source", ["hub:name", "hub:@train", "hub:name@"])
def test_a_hub_name_without_name_or_split_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="wanted 'hub:NAME@SPLIT'"):
        read_rows(source)


def test_an_unknown_split_of_the_world_has_a_hint() -> None:
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        read_rows("world:trian")


def test_world_rows_come_from_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [{"id": "w-1", "prompt": "<bos> say a <sep>", "responses": ["a"], "family": "say"}]
    monkeypatch.setitem(sys.modules, "minillm.world", types.SimpleNamespace(rows=lambda split: made))
    # As in a process that has read none yet; the real ones are not forgotten.
    monkeypatch.setattr(row_sources, "_world_rows", row_sources._world_rows.__wrapped__)
    (row,), report = read_rows("world:test")
    assert (row.uid, row.prompt, row.responses, row.extra) == ("w-1", "<bos> say a <sep>", ("a",), {"family": "say"})
    assert str(report) == "world:test: 1 row read"


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 7_473), ("sgd_nlg", 63_821)])
def test_public_files_read_whole(name: str, count: int) -> None:
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    path = Path(os.environ.get("MINILLM_SHARED_DATA", default)) / name / "train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent; set MINILLM_SHARED_DATA to the folder of public data sets")
    got, report = read_rows(str(path))
    assert len(got) == count and report.skipped == () and report.ignored == {}
    assert str(report).endswith(f"{count:,} rows read")
    assert all(row.instruction and row.responses for row in got)

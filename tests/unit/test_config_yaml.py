"""Promises of the strict YAML reader:

1. every refusal names file, line and column;
2. nothing is built that the text does not plainly say: no tag, alias, duplicate key or deep nesting gets through;
3. what is written reads back equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.errors import ConfigError
from minillm.yaml_reader import MAX_BYTES, MAX_DEPTH, read_yaml, read_yaml_file, write_yaml

REFUSED = [
    ("a: 1\nb: 2\na: 3", ":3:1", "key 'a' is given twice, first on line 1"),
    ("x: {a: 1,\n a: 2}", ":2:2", "given twice"),
    ("a: &x 1", ":1:4", "anchor '&x'"),
    ("a: *x", ":1:4", "alias '*x'"),
    ("a: !!python/object/apply:os.system [id]", ":1:4", "tag '!!python/object/apply:os.system'"),
    ("a: !!str 5", ":1:4", "tag '!!str'"),
    ("a: !mine x", ":1:4", "tag '!mine'"),
    ("a: 1\n---\nb: 1", ":2:1", "second document"),
    ("1: a", ":1:1", "key '1' is not a word"),
    ("true: a", ":1:1", "key 'true' is not a word"),
    ("[a]: 1", ":1:1", "a list or mapping"),
    ("a: [1,", ":1:7", "not valid YAML"),
    ("a: b: c", ":1:5", "not valid YAML"),
    ("ok: 1\nbell: \x07", ":2:7", "U+0007"),
    ("a: " + "9" * 5000, ":1:4", "5000 digits"),
    ("[" * (MAX_DEPTH + 1), f":1:{MAX_DEPTH + 1}", "levels deep"),
    ("[" * 100_000, f":1:{MAX_DEPTH + 1}", "levels deep"),
    ("#" * (MAX_BYTES + 1), "", "larger than"),
]


@pytest.mark.parametrize(("text", "where", "what"), REFUSED)
def test_refusals_name_the_place(text: str, where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, source="f.yaml")
    assert str(caught.value).startswith(f"f.yaml{where}: ")
    assert what in str(caught.value)


def test_the_ordinary_reader_takes_what_we_refuse() -> None:
    """Negative control: a duplicate key and an alias pass through PyYAML's safe loader unremarked."""
    assert yaml.safe_load("a: 1\na: 3") == {"a": 3}
    assert yaml.safe_load("a: &x 1\nb: *x") == {"a": 1, "b": 1}


def test_bytes_that_are_not_utf8_are_located() -> None:
    with pytest.raises(ConfigError, match=r"^f:2:4: byte 0xff is not UTF-8"):
        read_yaml(b"a: 1\nb: \xff", source="f")


def test_a_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-2", 0.01), ("8e-3", 0.008), ("5", 5), ("-5", -5), ("5.", 5.0), (".5", 0.5), ("010", 10),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), (".inf", float("inf")),
        ("no", "no"), ("on", "on"), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"),
        ("'5'", "5"), ('"true"', "true"), ("0x10", "0x10"), ("<<", "<<"),
    ],
)  # fmt: skip
def test_plain_words_are_read_as_yaml_1_2(text: str, value: Any) -> None:
    got = read_yaml(text, source="f")
    assert got == value
    assert type(got) is type(value)


def test_the_ordinary_reader_misreads_numbers_and_words() -> None:
    """Negative control: why the schema is our own."""
    assert yaml.safe_load("1e-2") == "1e-2"
    assert yaml.safe_load("no") is False


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_TEXT, _VALUES, max_size=4))
def test_what_is_written_reads_back_equal(value: dict[str, Any]) -> None:
    assert read_yaml(write_yaml(value), source="f") == value


def test_shared_values_are_written_out_without_alias() -> None:
    shared = [1, 2]
    assert read_yaml(write_yaml({"a": shared, "b": shared}), source="f") == {"a": [1, 2], "b": [1, 2]}
    with pytest.raises(ConfigError, match="anchor"):  # negative control: PyYAML's own dumper writes an alias
        read_yaml(yaml.safe_dump({"a": shared, "b": shared}), source="f")

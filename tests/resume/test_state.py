"""A state comes back from JSON and safetensors as it was, bit for bit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.state import State, from_json, to_json, together
from tests.resume.toy import from_bytes, tensor_bytes, to_bytes

FLOATS = [math.nan, math.inf, -math.inf, -0.0, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, 1.0, 1e22]
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def exactly(value: Any) -> Any:
    """A value in which 1, 1.0 and True, and 0.0 and -0.0, are not equal, but NaN and NaN are."""
    if isinstance(value, dict):
        return {name: exactly(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [exactly(inner) for inner in value]
    return type(value), repr(value)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=4), PLAIN, max_size=3))
def test_a_record_comes_back_as_it_was(record: dict[str, Any]) -> None:
    assert exactly(from_json(to_json(record))) == exactly(record)


def test_every_float_comes_back_bit_for_bit() -> None:
    text = to_json({"floats": FLOATS, "by name": {str(value): value for value in FLOATS}})
    assert exactly(from_json(text)) == exactly({"floats": FLOATS, "by name": {str(value): value for value in FLOATS}})
    json.loads(text, parse_constant=pytest.fail)  # no NaN or Infinity, which are no JSON


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, {1, 2}, torch.tensor(1.0), b"x", {"float": "nan"}, [{"float": 1.0}]], ids=repr
)
def test_what_json_would_change_without_a_word_is_a_mistake(value: Any) -> None:
    with pytest.raises(AssertionError):
        to_json({"value": value})


def test_states_of_several_owners_in_one() -> None:
    one = State({"a": 1, "one": [2.5]}, {"x": torch.arange(3), "y/z": torch.tensor([[True], [False]])})
    other = State({}, {"x": torch.full((2, 0), 1.0)})
    both = from_bytes(to_bytes(together({"one": one, "on": other, "none": State()})))
    for name, want in {"one": one, "on": other, "none": State()}.items():
        found = both.part(name)
        assert found.record == want.record and found.tensors.keys() == want.tensors.keys()
        for key, value in want.tensors.items():
            assert found.tensors[key].dtype == value.dtype and found.tensors[key].shape == value.shape
            assert tensor_bytes(found.tensors[key]) == tensor_bytes(value)
    nested = together({"outer": together({"inner": one})})
    assert nested.part("outer").part("inner").tensors.keys() == one.tensors.keys()
    with pytest.raises(AssertionError):
        together({"a/b": one})
    with pytest.raises(KeyError):
        both.part("two")

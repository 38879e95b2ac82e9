"""What a part of a run leaves in a checkpoint: plain values, which become JSON, and tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

_FLOAT = "float"
"""The one key of an object that stands for a number which JSON does not have."""


@dataclass(frozen=True, slots=True)
class State:
    """Plain values by name, and tensors by name, on whatever device they are and contiguous."""

    record: dict[str, Any] = field(default_factory=dict)
    """None, bool, int, float, str, and lists and dicts of them."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def part(self, name: str) -> State:
        """What ``together`` was given under this name."""
        begin = f"{name}/"
        tensors = {key.removeprefix(begin): value for key, value in self.tensors.items() if key.startswith(begin)}
        return State(self.record[name], tensors)


class States(NamedTuple):
    """A state that every rank has its share of."""

    shared: State
    """Equal on all ranks."""
    own: State
    """This rank's."""


def together(parts: Mapping[str, State]) -> State:
    """Several states as one, by their owners' names."""
    assert not any("/" in name for name in parts), sorted(parts)
    return State(
        {name: part.record for name, part in parts.items()},
        {f"{name}/{key}": value for name, part in parts.items() for key, value in part.tensors.items()},
    )


def to_json(record: Mapping[str, Any]) -> str:
    """A record as JSON from which ``from_json`` makes the same again, every bit of its floats included.

    JSON has no NaN and no infinities, so they are written as objects: ``{"float": "nan"}``.
    """
    return json.dumps(_plain(record), allow_nan=False)


def from_json(text: str) -> dict[str, Any]:
    """The record that ``to_json`` wrote."""
    record: dict[str, Any] = json.loads(text, object_hook=_number)
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        # JSON would make strings of other keys without a word.
        assert all(isinstance(name, str) for name in value) and set(value) != {_FLOAT}, list(value)
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(float(value))}
    assert value is None or isinstance(value, bool | int | float | str), repr(value)
    return value


def _number(value: dict[str, Any]) -> Any:
    return float(value[_FLOAT]) if set(value) == {_FLOAT} else value

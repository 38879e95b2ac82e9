"""A8: a header of weights that lies is the library's to refuse; here it is told in a line and nothing large is made."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.attacks.hostile import Place, Run, refused


def file_of(header: Any, body: bytes = b"\0" * 64, *, length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def weight(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


HEADERS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "shorter than a length": lambda: b"\x01\x00",
    "a length of 2^64": lambda: file_of(weight(), length=2**64 - 1),
    "a length of 100 MB": lambda: file_of(weight(), length=100 * 2**20),
    "a length beyond the file": lambda: file_of(weight(), length=5000),
    "a length of nothing": lambda: file_of(weight(), length=0),
    "no JSON": lambda: file_of(b"{{{{"),
    "not UTF-8": lambda: file_of(b'{"\xff": 1}'),
    "a list": lambda: file_of([1]),
    "nested without end": lambda: file_of(b'{"a":' * 50_000),
    "a name twice": lambda: file_of(
        b'{"w":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]},"w":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}}x'
    ),
    "overlap": lambda: file_of({**weight(), "v": weight()["w"]}),
    "a hole": lambda: file_of(weight(shape=[2], data_offsets=[56, 64])),
    "short": lambda: file_of(weight(), b"\0" * 10),
    "more than it says": lambda: file_of(weight(), b"\0" * 100),
    "offsets the wrong way": lambda: file_of(weight(data_offsets=[64, 0])),
    "offsets below 0": lambda: file_of(weight(data_offsets=[-64, 0])),
    "offsets beyond the end": lambda: file_of(weight(data_offsets=[2**40, 2**40 + 64])),
    "a shape that does not fit": lambda: file_of(weight(shape=[5, 5])),
    "a shape of 2^63": lambda: file_of(weight(shape=[2**32, 2**32])),
    "a shape below 0": lambda: file_of(weight(shape=[-4, -4])),
    "a kind of its own": lambda: file_of(weight(dtype="PICKLE")),
    "no kind": lambda: file_of({"w": {"shape": [4, 4], "data_offsets": [0, 64]}}),
    "metadata of another kind": lambda: file_of({**weight(), "__metadata__": {"format": ["pt"]}}),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused(what: str, place: Place, run: Run) -> None:
    (place.student / "model.safetensors").write_bytes(HEADERS[what]())
    outcome = run("evaluate", place.student, "--config", place.config, "--out", place.top / "e")
    refused(outcome, "ModelError", "model.safetensors")


@pytest.mark.parametrize("what", [what for what in HEADERS if "2^6" in what or "MB" in what or "beyond" in what])
def test_nothing_is_made_as_large_as_a_header_says(what: str, place: Place, run: Run) -> None:
    (place.student / "model.safetensors").write_bytes(HEADERS[what]())
    tracemalloc.start()
    try:
        assert run("evaluate", place.student, "--config", place.config, "--out", place.top / "e").code == 2
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_control_a_header_that_is_true_is_read(place: Place) -> None:
    file = place.top / "w.safetensors"
    file.write_bytes(file_of(weight()))
    assert load_file(file)["w"].shape == (4, 4)

"""Tensors written piece by piece are what the safetensors library reads, and slices of them are what was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from minillm import tensor_files
from minillm.disk import DISK, Sink
from minillm.errors import CheckpointError
from minillm.tensor_files import CODES, open_tensors, write_tensors
from tests.unit.tensor_worker import MIB

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)


class Remembered:
    """A disk of one file in memory."""

    def __init__(self) -> None:
        self.content, self.longest = bytearray(), 0

    def write(self, file: int, content: memoryview) -> None:
        self.content += content
        self.longest = max(self.longest, content.nbytes)


def written(tensors: dict[str, Tensor]) -> bytes:
    disk = Remembered()
    write_tensors(Sink(disk, 0), tensors)  # type: ignore[arg-type]
    return bytes(disk.content)


def some(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int, turned: bool = False) -> Tensor:
    """Random bits of a type, so that NaN and negative zero are among them; ``turned``: not in memory's order."""
    shape = shape[::-1] if turned else shape
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        tensor = torch.randint(0, 2, shape, generator=draw).bool()
    else:
        size = torch.empty(0, dtype=dtype).element_size()
        count = int(torch.Size(shape).numel())
        tensor = torch.randint(0, 256, (count * size,), generator=draw, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor.permute(list(range(tensor.dim()))[::-1]) if turned else tensor


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return {name: bits(t) for name, t in found.items()} == {name: bits(t) for name, t in wanted.items()}


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        st.tuples(SHAPES, st.sampled_from(list(CODES)), st.booleans()), max_size=6,
    ),
    seed=st.integers(0, 2**31),
    at_once=st.integers(1, 40),
)  # fmt: skip
def test_the_library_reads_back_every_bit(
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype, bool]], seed: int, at_once: int
) -> None:
    tensors = {name: some(*kind[:2], seed=seed + n, turned=kind[2]) for n, (name, kind) in enumerate(kinds.items())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "AT_ONCE", at_once)
        content = written(tensors)
    assert same(load(content), tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    for name, entry in json.loads(content[8:start]).items():
        size = 1 if name == "__metadata__" else tensors[name].element_size()
        assert name == "__metadata__" or (start + entry["data_offsets"][0]) % size == 0


def test_control_another_bit_would_be_seen() -> None:
    zero = torch.zeros(3)
    assert same(load(written({"a": zero})), {"a": zero})
    assert not same(load(written({"a": -zero})), {"a": zero})
    assert not same(load(written({"a": zero})), {"b": zero})


def test_a_tensor_that_requires_grad_is_written_and_left_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    assert torch.equal(load(written({"w": weight}))["w"], weight)
    assert weight.requires_grad and weight.grad is None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    content = written({"flat": torch.arange(10.0), "half": torch.ones(4, dtype=torch.bfloat16), "one": torch.tensor(7)})
    path = tmp_path / "it.safetensors"
    path.write_bytes(content)
    return path


def test_slices_are_read(file: Path) -> None:
    with open_tensors(file) as tensors:
        assert tensors.names == {"flat", "half", "one"}
        assert (tensors.shape("flat"), tensors.dtype("flat"), tensors.dtype("half")) == ((10,), "F32", "BF16")
        for start in range(11):
            for stop in range(start, 11):
                assert torch.equal(tensors.rows("flat", start, stop), torch.arange(10.0)[start:stop])
        with pytest.raises(CheckpointError, match="has no tensor 'flt'"):
            tensors.rows("flt", 0, 1)


@pytest.mark.parametrize("fault", ["gone", "cut", "header", "overlap", "long", "empty"])
def test_a_file_that_is_not_whole_is_an_error_of_ours(fault: str, file: Path) -> None:
    """That a hostile header can do no harm is the library's promise; that its complaint reaches the user is ours."""
    content = file.read_bytes()
    file.unlink()
    if fault != "gone":
        broken = {
            "cut": content[:-1],
            "header": content[:8] + b"[" + content[9:],
            "overlap": content.replace(b"[8,48]", b"[0,40]"),
            "long": (2**62).to_bytes(8, "little") + content[8:],
            "empty": b"",
        }[fault]
        assert broken != content
        file.write_bytes(broken)
    with pytest.raises(CheckpointError, match=r"it\.safetensors"), open_tensors(file):
        pass


def test_writing_and_reading_need_no_memory_of_the_file_s_size() -> None:
    """Of a file of 128 MiB; the control is the library's own way, which holds the whole file."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.unit.tensor_worker"]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, slices, library = (int(word) for word in done.stdout.split())
    assert ours < 40 * MIB and slices < 24 * MIB, (ours, slices)
    assert library > 100 * MIB


def test_the_disk_gets_whole_files_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "AT_ONCE", 16)
    disk = Remembered()
    write_tensors(Sink(disk, 0), {"a": torch.ones(1000)})  # type: ignore[arg-type]
    header = int.from_bytes(disk.content[:8], "little")
    assert disk.longest == max(64, header) and len(disk.content) == 8 + header + 4000


def test_what_is_written_has_the_length_and_hash_that_the_sink_says(tmp_path: Path) -> None:
    file = DISK.create(tmp_path / "a")
    sink = Sink(DISK, file)
    write_tensors(sink, {"a": torch.ones(5)})
    DISK.close(file)
    content = (tmp_path / "a").read_bytes()
    assert len(content) == sink.bytes and torch.equal(load(content)["a"], load(save({"a": torch.ones(5)}))["a"])

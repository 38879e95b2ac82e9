"""Safetensors files that need no memory of their size: written tensor by tensor through a sink, read slice by slice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from minillm.disk import Sink
from minillm.errors import CheckpointError

CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls the types of elements that we write."""
AT_ONCE = 1 << 22
"""Elements of a tensor that are taken to the disk at once: all that a tensor on a GPU needs of the host's memory."""


Kind = tuple[torch.dtype, tuple[int, ...]]
"""Type of elements and shape of a tensor that need not be there yet."""


def write_tensors(sink: Sink, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file of the tensors as they are now; no two of them are held in copy."""
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_pieces(sink, kinds, lambda name: torch.split(tensors[name].detach().reshape(-1), AT_ONCE))


def write_pieces(sink: Sink, kinds: Mapping[str, Kind], pieces: Callable[[str], Iterable[Tensor]]) -> None:
    """The same of tensors that are made while they are written: ``pieces`` gives one's elements from first to last, cut
    anyhow, and is asked for a piece when the one before is in the file."""
    # Wide elements first, as the library does it: every tensor then starts at a multiple of its element's size.
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little"))
    sink.write(text)
    for name in names:
        for piece in pieces(name):
            assert piece.dtype == kinds[name][0], name
            sink.write(piece.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    assert sink.bytes == 8 + len(text) + end, "pieces that are not the tensors announced"


class TensorFile:
    """A safetensors file of which slices are read; nothing else of it is brought into memory."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path, self._handle = path, handle
        self.names = frozenset(handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's; ``CheckpointError`` where the file has none of this name."""
        return tuple(self._slices(name).get_shape())

    def dtype(self, name: str) -> str:
        """The type of a tensor's elements, as the format calls it (one of ``CODES``)."""
        return str(self._slices(name).get_dtype())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Entries ``start`` .. ``stop - 1`` along a tensor's first dimension, on the CPU; a number alone is one."""
        slices = self._slices(name)
        with _told(self.path):
            rows: Tensor = slices[start:stop] if slices.get_shape() else self._handle.get_tensor(name).view(1)
        return rows

    def _slices(self, name: str) -> Any:
        if name not in self.names:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        with _told(self.path):
            return self._handle.get_slice(name)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """The file for the time of the block; ``CheckpointError`` where it is not there or no whole safetensors file."""
    with _told(path):
        handle = safe_open(path, framework="pt")
    with handle:
        yield TensorFile(path, handle)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU; ``CheckpointError`` as ``open_tensors``."""
    with _told(path):
        tensors: dict[str, Tensor] = load_file(path)
    return tensors


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the library finds wrong, as an error of ours."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error

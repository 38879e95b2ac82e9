"""Promise: neither a save nor a look at a checkpoint needs memory by the size of its files."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillm.checkpoints import Checkpoints, verified
from minillm.disk import Sink
from minillm.tensor_files import read_tensors, write_tensors
from tests.faults.sides import alone

LARGE = 96 * 2**20
"""Bytes of a file."""
FEW = 24 * 2**20
"""Bytes that may come to what a process has, most of them what imports and allocators do."""


def grown_by(work: Callable[[], Callable[[], object]]) -> int:
    """How far what ``work`` gives raises the most memory that a process had once ``work`` was done, in bytes."""
    out, into = os.pipe()
    if not (child := os.fork()):
        try:
            call = work()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            call()
            os.write(into, json.dumps(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as told:
        text = told.read()
    os.waitpid(child, 0)
    return int(text)


def store(folder: Path) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", ranks=alone(), say=lambda line: None)


def tensor() -> dict[str, torch.Tensor]:
    return {"weight": torch.full((LARGE // 4,), 1.5)}


def saving(folder: Path) -> Callable[[], object]:
    """A save of a tensor that is there already."""
    tensors = tensor()

    def write(sink: Sink) -> None:
        write_tensors(sink, tensors)

    return lambda: store(folder).save(step=1, stage="a", fingerprints={}, files={"engine-rank00000.safetensors": write})


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_a_save_and_a_look_take_no_memory_by_the_size_of_files(tmp_path: Path) -> None:
    assert grown_by(lambda: saving(tmp_path)) < FEW
    (kept,) = (tmp_path / "checkpoints").glob("step-*")
    file = kept / "engine-rank00000.safetensors"
    assert file.stat().st_size > LARGE
    assert grown_by(lambda: lambda: verified(kept)) < FEW
    assert grown_by(lambda: lambda: store(tmp_path).choose("auto")) < FEW
    assert grown_by(lambda: file.read_bytes) > LARGE // 2, "control: it is seen"
    assert float(read_tensors(file)["weight"][-1]) == 1.5

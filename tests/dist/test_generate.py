"""Two ranks write the file that one process writes, with the model on each of them or sharded over both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.generate_worker import CELLS, STREAMED, write, write_inputs
from tests.dist.ranks import start_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generate")
    write_inputs(folder)
    printed = start_ranks("tests.dist.generate_worker", str(folder))
    assert printed.count("of 26 responses") == len(CELLS) + 1  # one rank speaks
    return folder


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_write_what_one_process_writes(folder: Path, cell: str) -> None:
    write(folder, cell.replace("zero3", "replicated"), f"{cell}-one", batch=256)
    one, two = ((folder / f"{cell}-{name}.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    lengths = {json.loads(line)["tokens"] for line in one.splitlines()}
    assert len(lengths) > 4  # rows end at different times
    assert not list(folder.glob("*.partial"))


def test_random_numbers_of_a_rank_are_seen(folder: Path) -> None:
    """Negative control: with a stream of its own on each rank the file is another."""
    one, two = ((folder / f"{name}.jsonl").read_bytes() for name in (f"{CELLS[0]}-two", STREAMED))
    assert one != two and len(one.splitlines()) == len(two.splitlines())

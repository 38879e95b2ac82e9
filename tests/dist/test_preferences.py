"""Two ranks write the pairs that one process writes, with the models on each of them or sharded over both.

Not in a run of every day: ``bash scripts/test.sh -m slow tests/dist/test_preferences.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm.pair_manifest import read_pair_manifest
from tests.dist.pairs_worker import CELLS, write, write_inputs
from tests.dist.ranks import start_ranks

pytestmark = pytest.mark.slow

LOGPS = ("teacher_logps", "student_logps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_inputs(folder)
    printed = start_ranks("tests.dist.pairs_worker", str(folder))
    assert printed.count("from 13 prompts") == len(CELLS)  # one rank speaks
    return folder


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_write_what_one_process_writes(folder: Path, cell: str) -> None:
    write(folder, cell.replace("zero3", "replicated"), f"{cell}-one", batch=256)
    one, two = (lines_of(folder / f"{cell}-{name}.jsonl") for name in ("one", "two"))
    if "float64" in cell:
        assert one == two
    assert len(one) == len(two) > 4
    for left, right in zip(one, two, strict=True):
        for name in left:
            if name in LOGPS:
                assert left[name] == pytest.approx(right[name], abs=1e-3)
            else:
                assert left[name] == right[name]
    # Negative control: numbers of another row would be seen.
    assert one[0][LOGPS[0]] != pytest.approx(one[1][LOGPS[0]], abs=1e-2)
    manifests = [read_pair_manifest(folder / f"{cell}-{name}.jsonl") for name in ("one", "two")]
    assert manifests[0] is not None and manifests[1] is not None and manifests[0].counts == manifests[1].counts
    assert not [file.name for file in folder.iterdir() if "jsonl.student" in file.name or "joined" in file.name]

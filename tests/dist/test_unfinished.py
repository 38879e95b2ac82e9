"""An evaluation of two ranks that is stopped goes on, on two ranks or on one, and ends with what one process makes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from minillm.store import UNFINISHED
from tests import tiny
from tests.dist.ranks import start_ranks
from tests.dist.unfinished_worker import PROMPTS, SEEDS, make

ROWS = PROMPTS * len(SEEDS)
STOPPED, KEPT = 2, 8
"""After two of four batches, of two rows on each rank, one in the last."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole`` by one process; ``two`` stopped on two ranks, and gone on with there in ``two`` and here in ``one``."""
    folder = tmp_path_factory.mktemp("unfinished")
    tiny.save_model(folder / "teacher", "llama", seed=1)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    assert make(folder, folder / "whole", stop=-1, budget=65_536) == ROWS
    told = start_ranks("tests.dist.unfinished_worker", str(folder), f"two:{STOPPED}")
    shutil.copytree(folder / "two", folder / "one")
    told += start_ranks("tests.dist.unfinished_worker", str(folder), "two:-1")
    (folder / "told.txt").write_text(told, encoding="utf-8")
    return folder


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def require_same(out: Path, whole: Path) -> None:
    for mine, theirs in zip(rows(out), rows(whole), strict=True):
        for name in tiny.NATS:
            assert mine["measures"].pop(name) == pytest.approx(theirs["measures"].pop(name), abs=1e-4), name
        assert mine == theirs
    mine, theirs = (json.loads((where / "results.json").read_text(encoding="utf-8")) for where in (out, whole))
    for name, found in theirs["measures"].items():
        assert mine["measures"][name]["per_seed"] == pytest.approx(found["per_seed"], abs=1e-4), name
    assert not (out / UNFINISHED).exists()


def test_two_ranks_go_on_where_they_were(folder: Path) -> None:
    require_same(folder / "two", folder / "whole")
    text = (folder / "told.txt").read_text(encoding="utf-8")
    drawn = [int(count) for count in re.findall(r"drawn two (\d+)", text)]
    assert len(drawn) == 4 and sum(drawn) == ROWS and sum(drawn[:2]) == KEPT
    assert text.count("going on with an unfinished evaluation") == 1  # the first rank speaks


def test_one_process_goes_on_where_two_ranks_were(folder: Path) -> None:
    assert len((folder / "one" / UNFINISHED).read_text(encoding="utf-8").splitlines()) == KEPT + 1
    assert make(folder, folder / "one", stop=-1) == ROWS - KEPT
    require_same(folder / "one", folder / "whole")

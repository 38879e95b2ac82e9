"""sDPO on two ranks, the student whole or sharded: the chunks, the answers of each stage's start and the losses of one
process.

Not in a run of every day: ``bash scripts/test.sh -m slow tests/dist/test_sdpo.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import distill
from tests import tiny
from tests.dist import sdpo_worker
from tests.dist.ranks import start_ranks

pytestmark = pytest.mark.slow

ENGINES = ("zero2", "zero3")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdpo")
    sdpo_worker.write_inputs(folder)
    start_ranks("tests.dist.sdpo_worker", str(folder), *ENGINES)
    for name, seed in (("alone", 10), ("other", 11)):
        distill(sdpo_worker.config(folder, name, "zero0", seed=seed))
    return folder


def answers(run: Path) -> list[tuple[str, str, list[int]]]:
    """Of both stages."""
    found = []
    for name in ("first", "second"):
        kept: dict[str, Any] = json.loads((run / "stages" / name / "refreshed.json").read_text(encoding="utf-8"))
        found += [(each["uid"], each["fate"], each["ids"]) for each in kept["answers"]]
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_have_the_chunks_answers_and_losses_of_one_process(folder: Path, engine: str) -> None:
    alone, both = folder / "alone", folder / engine
    chunks = [json.loads((run / "chunks.json").read_text(encoding="utf-8"))["chunks"] for run in (alone, both)]
    assert chunks[0] == chunks[1] and sum(each["pairs"] for each in chunks[0]) == 18
    assert answers(both) == answers(alone) and len(answers(alone)) == 18
    assert len({fate for _, fate, _ in answers(alone)}) > 1 and any(ids for *_, ids in answers(alone))
    losses = [[line["loss"] for line in tiny.logged(run)] for run in (alone, both)]
    assert len(losses[0]) == 2 * sdpo_worker.STEPS and losses[1] == pytest.approx(losses[0], abs=CLOSE)


def test_other_random_numbers_would_be_seen(folder: Path) -> None:
    """The control: the same run under another seed."""
    assert answers(folder / "other") != answers(folder / "alone")

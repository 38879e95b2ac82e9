"""Where a teacher's weights are on two ranks: what each keeps, what it gathers, and that it changes no figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import distill
from minillm.cards import SHARDED
from tests import tiny
from tests.dist import parity_worker, placement_worker
from tests.dist.ranks import start_ranks

RANKS = 2
OF_ALL = ("loss", "single_loss", "long_loss", "lm_loss", "reverse_kl", "tokens", "mean_length", "grad_norm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything on two ranks in one launch, and one run on one process."""
    folder = tmp_path_factory.mktemp("placement")
    placement_worker.write_inputs(folder)
    start_ranks("tests.dist.placement_worker", str(folder))
    distill(parity_worker.config(folder, "zero0.replicated"))
    return folder


def told(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("cell", [cell for cell in placement_worker.RUNS if cell.endswith("offload")])
def test_an_offloaded_teacher_trains_as_a_whole_one_on_one_process(folder: Path, cell: str) -> None:
    one, two = (tiny.logged(folder / name) for name in ("zero0.replicated", cell))
    assert len(one) == len(two) == parity_worker.STEPS
    for mine, theirs in zip(one, two, strict=True):
        for name in OF_ALL:
            assert theirs[name] == pytest.approx(mine[name], abs=1e-6, rel=1e-5), name
    answers = [(folder / name / "student" / "model.safetensors").stat().st_size for name in ("zero0.replicated", cell)]
    assert answers[0] == answers[1]


def test_steps_of_one_run_differ_by_more_than_is_forgiven(folder: Path) -> None:
    """Negative control of the comparison above."""
    first, second = tiny.logged(folder / "zero0.replicated")[:2]
    assert all(first[name] != pytest.approx(second[name], abs=1e-6, rel=1e-5) for name in ("loss", "grad_norm"))


@pytest.mark.parametrize("placement", SHARDED)
def test_each_rank_keeps_its_share_and_five_percent_at_most(folder: Path, placement: str) -> None:
    for record in (
        told(folder, f"untied-{placement}")["kept"],
        json.loads((folder / f"zero2.{placement}" / "run.json").read_text(encoding="utf-8"))["teacher_bytes"],
    ):
        assert record["ranks"].keys() == {"0", "1"}
        for kept in record["ranks"].values():
            assert 1 / RANKS <= (kept["device"] + kept["host"]) / record["whole"] <= 1 / RANKS + 0.05
            assert (kept["host"] > 0) == (placement == "offload")
            if placement == "offload":
                assert kept["device"] < 0.02 * record["whole"]


def test_a_whole_teacher_is_kept_whole(folder: Path) -> None:
    """The control."""
    record = json.loads((folder / "zero0.replicated" / "run.json").read_text(encoding="utf-8"))["teacher_bytes"]
    assert record["ranks"] == {"0": {"device": record["whole"], "host": 0}}


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("placement", SHARDED)
def test_gathers_are_counted_as_torch_makes_them(folder: Path, placement: str, rank: int) -> None:
    """Of every way to read a teacher, also of its head. Of what is gathered half is the rank's own: that comes from the
    host or not at all."""
    record = told(folder, f"untied-{placement}", rank)
    share = 1 if placement == "offload" else 1 - 1 / RANKS
    for name, found in record["readings"].items():
        calls, gathered = found["seen"]
        want = {"teacher_gathers": calls, "teacher_gathered_bytes": gathered * share}
        assert found["told"] == want, name
        assert (calls > 0) == (not name.startswith("nothing")), name
    # A head of its own is all that a backbone has not. A forward may fetch more than it reads: DeepSpeed runs ahead.
    read, head = (record["readings"][f"{name}-1"]["seen"][1] for name in ("read", "head"))
    assert read + head >= record["kept"]["whole"] > 10 * head > 0


@pytest.mark.parametrize("cell", placement_worker.RUNS)
def test_every_step_tells_what_its_teacher_gathered(folder: Path, cell: str) -> None:
    """At least as often as the teacher was called; with a whole one nothing is told."""
    record = json.loads((folder / cell / "run.json").read_text(encoding="utf-8"))["teacher_bytes"]
    share = 1 if cell.endswith("offload") else 1 - 1 / RANKS
    for line in tiny.logged(folder / cell):
        assert line["teacher_gathers"] >= line["teacher_forwards"] > 0
        assert line["teacher_gathered_bytes"] >= 0.9 * share * record["whole"] * line["teacher_forwards"]
    assert not any("teacher_gathers" in line for line in tiny.logged(folder / "zero0.replicated"))

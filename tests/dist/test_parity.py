"""ZeRO parity: where weights live and how many ranks share the work changes no loss, no text and no weight."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minillm import distill
from minillm.run_log import OF_THE_PROCESS
from tests import corpus_twin, quick, tiny
from tests.dist import matrix, parity_worker
from tests.dist.matrix import figures
from tests.dist.ranks import start_ranks

CELLS = matrix.eight()
CREDIT = [f"zero2.replicated.{name}" for name in parity_worker.CREDIT]
NEIGHBOURS = ["zero2.zero3.kd", "zero2.replicated.gkd", "zero3.zero3.skewed"]
HELD = ["zero0.replicated.held", "zero3.replicated.held"]
"""Students that are held to an anchor, beside the one of CREDIT at ZeRO stage 2."""
BESIDE, ALONE = "zero2.replicated.text", "zero3.zero3.alone"
"""Runs with a corpus: one beside the policy gradient, and one that learns from nothing else."""
FORWARD, FORWARD_GKD = "zero3.zero3.forward", "zero3.replicated.gkd.forward"
"""Runs of a student that is gathered in every forward: its rollouts, validation and evaluation too."""
BROKEN = "zero2.replicated" + parity_worker.AVERAGED
SEED = 10
"""Of every run here, which leaves it at its default."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells on two ranks in one launch, and what they are held against on one process."""
    folder = tmp_path_factory.mktemp("parity")
    parity_worker.write_inputs(folder)
    printed = start_ranks("tests.dist.parity_worker", str(folder), *CELLS, *CREDIT, *HELD, *NEIGHBOURS, BESIDE, ALONE, FORWARD, FORWARD_GKD, BROKEN)
    (folder / "printed.txt").write_text(printed, encoding="utf-8")
    for cell in {matrix.single_of(cell) for cell in CELLS}:
        distill(parity_worker.config(folder, cell).model_copy(update={"name": alone(cell)}))
    for cell in (*CREDIT, *NEIGHBOURS, BESIDE):
        distill(parity_worker.config(folder, cell).model_copy(update={"name": f"alone-{cell}"}))
    return folder


def disagreements(folder: Path, one: str, other: str) -> set[str]:
    """Names of the figures in which two runs differ at some step."""
    found = matrix.deviations(figures(folder, one), figures(folder, other))
    return {name for name, deviation in found.items() if not deviation <= matrix.TOLERANCE["fp32"]}


def alone(cell: str) -> str:
    """The run of one process that trains the same."""
    return "alone.lora" if cell.endswith(".lora") else "alone"


@pytest.mark.parametrize("cell", [*CELLS, FORWARD])
def test_two_ranks_of_any_stage_have_the_losses_of_one_process(runs: Path, cell: str) -> None:
    assert not disagreements(runs, alone(cell), cell)


@pytest.mark.parametrize("cell", CREDIT)
def test_credit_from_the_rows_of_two_ranks_is_that_of_one_process(runs: Path, cell: str) -> None:
    assert not disagreements(runs, f"alone-{cell}", cell)
    assert {"long_loss", "advantage_std", "grad_norm"} <= disagreements(runs, "alone", cell)


@pytest.mark.parametrize("cell", HELD)
def test_an_anchor_is_the_same_wherever_the_student_lives(runs: Path, cell: str) -> None:
    """Its divergence, how far the student is from it, and what is learnt from it."""
    one = f"alone-{CREDIT[-2]}"
    assert one.endswith("held") and not disagreements(runs, one, cell)
    assert {"anchor_kl", "anchor_drift"} <= disagreements(runs, "alone", cell)
    weights, other = (load_file(runs / name / "student" / "model.safetensors") for name in (one, cell))
    assert max(float((weight - other[name]).abs().max()) for name, weight in weights.items()) < 1e-4


def test_a_neighbour_that_is_gathered_in_every_forward_has_the_losses_of_one_process(runs: Path) -> None:
    assert not disagreements(runs, "alone-zero2.replicated.gkd", FORWARD_GKD)


@pytest.mark.parametrize("cell", NEIGHBOURS)
def test_the_neighbours_on_two_ranks_have_the_losses_of_one_process(runs: Path, cell: str) -> None:
    assert not disagreements(runs, f"alone-{cell}", cell)
    assert all(line["loss"] > 0 for line in figures(runs, cell))
    if cell.endswith("skewed"):
        assert {line["kept_rows"] for line in figures(runs, cell)} > {0.0}


def test_two_ranks_share_the_blocks_of_a_corpus_without_changing_the_losses(runs: Path) -> None:
    assert not disagreements(runs, f"alone-{BESIDE}", BESIDE)
    assert {"lm_loss", "grad_norm"} <= disagreements(runs, "alone", BESIDE)


def test_two_ranks_on_a_corpus_alone_train_as_plain_models_do(runs: Path) -> None:
    blocks = corpus_twin.read_blocks(runs / "corpus.txt", parity_worker.BLOCK)
    twin = corpus_twin.CorpusTwin(
        runs / "student", runs / "teacher", blocks=blocks, batch=parity_worker.TAKEN, share=0.5
    )
    for update, line in enumerate(figures(runs, ALONE)):
        loss, norm = twin.step(update, seed=SEED, purpose="minillm/corpus")
        assert line["lm_loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    found, want = load_file(runs / ALONE / "student" / "model.safetensors"), twin.weights()
    assert max(float((weight - want[name]).abs().max()) for name, weight in found.items()) < 1e-5


def test_ranks_stop_the_passes_over_a_rollout_together(runs: Path) -> None:
    """After as many updates as one process, which are fewer than there could be."""
    stopped = "zero2.replicated.grpo"
    one, two = (tiny.logged(runs / name) for name in (f"alone-{stopped}", stopped))
    assert [line["update"] for line in one] == [line["update"] for line in two]
    assert one[-1]["update"] < 6 * len(one)


def test_gradients_that_are_averaged_over_the_ranks_are_seen(runs: Path) -> None:
    """Negative control: Adam forgives a factor, the norm of the gradient does not."""
    assert "grad_norm" in disagreements(runs, "alone", BROKEN)
    first, broken = figures(runs, "alone")[0]["grad_norm"], figures(runs, BROKEN)[0]["grad_norm"]
    assert broken == pytest.approx(first / 2, rel=1e-4)


def test_the_report_of_a_run_on_two_ranks_has_its_drawings(runs: Path) -> None:
    """Of the first cell; those of the others are left out, which is the control."""
    first, second = ((runs / cell / "report.html").read_text(encoding="utf-8") for cell in CELLS[:2])
    assert first.count("<svg") == second.count("<svg") > 2
    assert "<path" in first and quick.NOT_DRAWN not in first
    assert "<path" not in second and quick.NOT_DRAWN in second


def test_another_seed_is_another_run(runs: Path) -> None:
    """Negative control: the figures that are compared above do tell two runs apart."""
    other = parity_worker.config(runs, "zero0.replicated").model_copy(update={"name": "other", "seed": 11})
    distill(other)
    assert {"loss", "reverse_kl", "grad_norm"} <= disagreements(runs, "alone", "other")


@pytest.mark.parametrize("cell", [*CELLS, FORWARD])
def test_two_ranks_publish_the_weights_of_one_process(runs: Path, cell: str) -> None:
    one, two = (load_file(runs / name / "student" / "model.safetensors") for name in (alone(cell), cell))
    begun = load_file(runs / "student" / "model.safetensors")
    assert one.keys() == two.keys() == begun.keys()
    for name, weight in one.items():
        assert float((weight - two[name]).abs().max()) < 1e-4, name
        assert cell.endswith(".lora") or float((weight - begun[name]).abs().max()) > 1e-3, name
    assert max(float((weight - begun[name]).abs().max()) for name, weight in one.items()) > 1e-3


@pytest.mark.parametrize("cell", [*CELLS, FORWARD])
def test_two_ranks_validate_and_evaluate_as_one_process(runs: Path, cell: str) -> None:
    """Also where a rank has no row for a batch."""
    one, two = (tiny.logged(runs / name, "validation") for name in (alone(cell), cell))
    assert len(one) == len(two) == 1
    for name in one[0].keys() - {"kind", "stage", "seconds"}:
        assert two[0][name] == pytest.approx(one[0][name], abs=1e-4), name
    for mine, theirs in zip(samples(runs / alone(cell)), samples(runs / cell), strict=True):
        for name in tiny.NATS:
            nats = mine["measures"].pop(name), theirs["measures"].pop(name)
            assert nats[0] == pytest.approx(nats[1], abs=1e-4), name
        assert mine == theirs


def samples(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == parity_worker.HELD_OUT
    return lines


def teacher_shares(runs: Path, placement: str) -> list[float]:
    """The share of the teacher's bytes that each rank said it keeps between forwards, in every cell."""
    said = re.findall(
        rf"rank \d: frozen teacher-{placement} \({placement}\) keeps ([\d,]+) of ([\d,]+) bytes",
        (runs / "printed.txt").read_text(encoding="utf-8"),
    )
    return [int(kept.replace(",", "")) / int(whole.replace(",", "")) for kept, whole in said]


def test_a_sharded_teacher_keeps_half_of_its_bytes_on_each_of_two_ranks(runs: Path) -> None:
    """The control: a replicated one keeps all of them."""
    sharded, whole = teacher_shares(runs, "zero3"), teacher_shares(runs, "replicated")
    launched = [*CELLS, *CREDIT, *HELD, *NEIGHBOURS, BESIDE, ALONE, FORWARD, FORWARD_GKD, BROKEN]
    in_shards = sum(cell.split(".")[1] == "zero3" for cell in launched)
    in_whole = sum(cell.split(".")[1] == "replicated" for cell in launched)
    assert (len(sharded), len(whole)) == (2 * in_shards, 2 * in_whole) and in_shards and in_whole
    assert all(0.5 <= share < 0.52 for share in sharded), sharded
    assert set(whole) == {1.0}

"""An engine that goes on from a checkpoint is the engine that never stopped.

1. The same number of ranks and the same stage: bit for bit, at every stage and precision, in a fresh process.
2. Another number of ranks or another stage: weights and moments bit for bit, later updates to rounding.
3. Each part of the state is needed: without it the later updates are others.
4. An update that is refused for its numbers is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minillm.engine_state import layout_of
from minillm.ranks import Ranks
from minillm.student_engine import Student
from tests.dist.ranks import start_ranks
from tests.resume import engine_worker
from tests.resume.engine_worker import AFTER, BEFORE, CELLS, kept, student, train

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_scatter_tensor.*:FutureWarning")  # DeepSpeed's own

MOVES = {
    1: [("zero3", "zero3@2"), ("zero2", "zero2-robin@2"), ("zero0", "zero2@1"), ("zero2-offload", "zero3-offload@2")],
    2: [
        *(("zero2", "zero2@1"), ("zero3", "zero2@2"), ("zero2", "zero0@2"), ("zero3-bf16", "zero1-bf16@2")),
        *(("zero3-offload", "zero2@2"), ("zero0", "zero3-offload@1"), ("zero3-offload-bf16", "zero2-offload-bf16@1")),
    ],
    3: [("zero2", "zero2@2"), ("zero3", "zero3@2"), ("zero3-offload", "zero2-offload@2")],
}
"""By the number of ranks: which engine goes on, and from whose checkpoint (CELL@RANKS)."""
OFFLOADED = ["zero2-offload@1", "zero2-offload@2", "zero3-offload@2"]
ALL_MOVES = [(cell, source, ranks) for ranks, moves in MOVES.items() for cell, source in moves]
STILL = [move for move in ALL_MOVES if not CELLS[move[1].partition("@")[0]].dropout]
"""Those whose updates can be compared: masks of dropout are of the rank."""
NEAR = 2e-6
"""Most that a weight or moment in 32 bits differs after updates that were rounded in another order."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process in this one, with a fresh engine each; two ranks that save, two fresh ones and three that go on."""
    folder = tmp_path_factory.mktemp("engines")
    engine_worker.write_inputs(folder)
    saves = [f"save {cell}" for cell in CELLS]
    resumes = {ranks: [f"resume {cell} {cell}@{ranks}" for cell in CELLS] for ranks in (1, 2)}
    moves = {ranks: [f"resume {cell} {source}" for cell, source in pairs] for ranks, pairs in MOVES.items()}
    engine_worker.main(folder, saves)
    start_ranks("tests.resume.engine_worker", str(folder), *saves)
    start_ranks("tests.resume.engine_worker", str(folder), *resumes[2], *moves[2])
    start_ranks("tests.resume.engine_worker", str(folder), *moves[3], ranks=3)
    engine_worker.main(folder, [*resumes[1], *moves[1]])
    return folder


def told(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text(encoding="utf-8"))
    return found


def tensors(folder: Path, name: str, at: str) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.{at}.safetensors")


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any entry."""
    assert one.keys() == other.keys()
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_it_goes_on_bit_for_bit(folder: Path, cell: str, ranks: int) -> None:
    for rank in range(ranks):
        never, again = told(folder, f"{cell}@{ranks}", rank), told(folder, f"{cell}@{ranks}-from-{cell}@{ranks}", rank)
        assert again.pop("differences") == []
        assert again["at"] == never["at"]
        for update, (mine, theirs) in enumerate(zip(again["trace"], never["trace"], strict=True)):
            assert mine == theirs, update
        assert len(never["trace"]) == AFTER + 1 and again == never


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_numbers_that_are_not_finite_change_no_bit_on_any_rank(folder: Path, cell: str, ranks: int) -> None:
    """Of losses and of gradients whose loss is finite, on the last rank alone."""
    for rank in range(ranks):
        for poison, found in told(folder, f"{cell}@{ranks}.refused", rank).items():
            what = "loss is" if poison.startswith("loss") else "the gradient's norm is"
            assert found["words"].startswith(what) and "no update was made" in found["words"], (poison, found)
            assert found["changed"] == [], poison


@pytest.mark.parametrize("cell", CELLS)
def test_every_update_changes_every_weight_and_moment(folder: Path, cell: str) -> None:
    """Negative control: what is compared above does move (but the positions behind the last, which nobody reads)."""
    found = told(folder, f"{cell}@2", 1)
    for before, after in zip([found["at"], *found["trace"]], found["trace"][:AFTER], strict=False):
        same = {name for name, value in before.items() if after[name] == value and "wpe" not in name}
        assert not any(name.startswith(("weight/", "exp_avg/", "momentum/", "updates")) for name in same), same
    kinds = {name.partition("/")[0] for name in found["at"]}
    assert kinds >= {"weight", "exp_avg", "exp_avg_sq", "steps", "updates_done"}


@pytest.mark.parametrize(("cell", "source", "ranks"), ALL_MOVES)
def test_other_ranks_and_stages_take_every_bit(folder: Path, cell: str, source: str, ranks: int) -> None:
    name = f"{cell}@{ranks}-from-{source}"
    saved, taken = tensors(folder, source, "at"), tensors(folder, name, "at")
    assert saved.keys() == taken.keys()
    assert all(torch.equal(tensor, taken[kind]) for kind, tensor in saved.items())
    then = int(source[-1])
    words = [f"ranks {ranks}, saved with {then}"] * (ranks != then)
    words += [f"ZeRO stage {cell[4]}, saved with {source[4]}"] * (cell[4] != source[4])
    assert told(folder, name)["differences"] == words


@pytest.mark.parametrize(("cell", "source", "ranks"), STILL)
def test_other_ranks_and_stages_go_on_as_before(folder: Path, cell: str, source: str, ranks: int) -> None:
    never, moved = tensors(folder, source, "end"), tensors(folder, f"{cell}@{ranks}-from-{source}", "end")
    assert apart(never, moved) < NEAR
    assert apart(never, tensors(folder, source, "at")) > 1e-3, "the control: three updates are more than that"


@pytest.mark.parametrize("name", ["zero2@1", "zero3@1", "zero0@2", "zero2@2", "zero3@2", *OFFLOADED])
def test_every_stage_keeps_the_same_under_the_same_names(folder: Path, name: str) -> None:
    """Moments too, of which DeepSpeed itself gathers none at stages 1 and 2."""
    plain = tensors(folder, "zero0@1", "at")
    assert apart(plain, tensors(folder, name, "at")) < NEAR
    turned = {kind: tensor.roll(1) for kind, tensor in plain.items()}
    assert all(float((turned[kind] - tensor).abs().max()) > NEAR for kind, tensor in plain.items()), "the control"


@pytest.mark.parametrize("cell", ["zero2", "zero1-bf16", "zero3-groups", "zero2-offload-bf16", "zero3-offload-bf16"])
def test_an_engine_that_has_trained_on_can_go_back(folder: Path, cell: str) -> None:
    """Also where parameters stay gathered between forwards: those are made anew."""
    ranks = Ranks()
    it = student(folder, CELLS[cell], ranks)
    train(it, range(BEFORE + 1))
    assert resumed(folder, cell, it) == told(folder, f"{cell}@1")["trace"]
    it.close()


def resumed(folder: Path, cell: str, it: Student, drop: Callable[[Student], None] | None = None) -> list[Any]:
    """The trace of what follows on the cell's checkpoint, without what is dropped."""
    checkpoint = engine_worker.store(folder, f"{cell}@1", it.ranks).choose(True)
    assert checkpoint is not None and it.restore(checkpoint) == []
    if drop is not None:
        drop(it)
    return train(it, range(BEFORE, BEFORE + AFTER))


def zeroed(kind: str) -> Callable[[Student], None]:
    def drop(it: Student) -> None:
        for piece in layout_of(it._engine).pieces:
            piece.tensors()[kind].zero_()

    return drop


def uncounted(it: Student) -> None:
    for piece in layout_of(it._engine).pieces:
        piece.optimiser.state[piece.stepped]["step"] = torch.tensor(0.0)


def short(it: Student) -> None:
    """As if the 16 bits that the model computes with had been saved."""
    for piece in layout_of(it._engine).pieces:
        piece.weight_N.copy_(piece.weight_N.bfloat16())


def stale(it: Student) -> None:
    """As if the model went on with what it computed with before."""
    layout = layout_of(it._engine)
    before = [piece.weight_N.clone() for piece in layout.pieces]
    for piece in layout.pieces:
        piece.weight_N.mul_(1.5)
    layout.refresh()
    for piece, weight_N in zip(layout.pieces, before, strict=True):
        piece.weight_N.copy_(weight_N)


def restarted(it: Student) -> None:
    it.updates_done = 0


ABLATIONS = {
    "exp_avg": zeroed("exp_avg"), "exp_avg_sq": zeroed("exp_avg_sq"), "steps": uncounted,
    "weight": zeroed("weight"), "low bits of the weight": short, "working copy": stale, "updates_done": restarted,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(folder: Path) -> Student:
    """One that every ablation restores anew."""
    return student(folder, CELLS["zero1-bf16"], Ranks())


@pytest.mark.parametrize("part", [None, *ABLATIONS])
def test_every_part_is_needed(part: str | None, folder: Path, engine: Student) -> None:
    """The test of the tests above; with nothing dropped the trace is that of the engine that never stopped."""
    never = told(folder, "zero1-bf16@1")["trace"]
    found = resumed(folder, "zero1-bf16", engine, ABLATIONS[part] if part else None)
    assert (found == never) == (part is None)
    if part is not None:
        assert found[AFTER - 1]["weight/backbone.ln_f.weight+0"] != never[AFTER - 1]["weight/backbone.ln_f.weight+0"]


def test_muon_s_momentum_is_needed(folder: Path) -> None:
    it = student(folder, CELLS["zero0-muon"], Ranks())

    def drop(it: Student) -> None:
        for piece in layout_of(it._engine).pieces:
            if "momentum" in piece.moments:
                piece.tensors()["momentum"].zero_()

    never = told(folder, "zero0-muon@1")["trace"]
    assert resumed(folder, "zero0-muon", it) == never
    assert resumed(folder, "zero0-muon", it, drop) != never
    it.close()


def test_before_the_first_update_there_are_no_moments(folder: Path, tmp_path: Path) -> None:
    """And an engine that has some gives them up."""
    ranks = Ranks()
    for cell in ("zero0", "zero2"):
        it = student(folder, CELLS[cell], ranks)
        checkpoints = engine_worker.store(tmp_path, cell, ranks)
        saved = checkpoints.save(step=0, stage="it", fingerprints={}, files=it.state_files())
        first = kept(it)
        assert not any(name.startswith("exp_avg") for name in first)
        trace = train(it, range(2))
        assert it.restore(saved) == [] and kept(it) == first
        assert train(it, range(2)) == trace
        it.close()

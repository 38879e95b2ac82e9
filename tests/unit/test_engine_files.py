"""Pieces of an engine's state, cut anyhow over any number of ranks, are taken by any other cut over any other number;
and a checkpoint that does not fit changes nothing. Without DeepSpeed: tests/resume has its engines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.checkpoint_manifest import MANIFEST
from minillm.checkpoints import Checkpoint, Checkpoints
from minillm.engine_files import Progress, engine_writers, restore_engine
from minillm.engine_state import Layout, Piece, layout_of
from minillm.errors import CheckpointError
from minillm.muon import Muon
from minillm.ranks import Ranks
from tests.faults.sides import alone, in_threads

SHAPES = {"a.weight": (3, 4), "b": (5,), "c": (2, 2, 2), "d": (), "e": (0, 7)}
LENGTHS = {name: math.prod(shape) for name, shape in SHAPES.items()}
PROGRESS = Progress(stage=2, precision="fp32", updates_done=3)
Cut = dict[str, list[tuple[int, int, int]]]
"""Of each parameter its pieces: start, stop, rank."""


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Cut, int]:
    """Any cut of the parameters over one to four ranks."""
    ranks = draw(st.integers(1, 4))
    found: Cut = {}
    for name, length in LENGTHS.items():
        owners = draw(st.permutations(range(ranks)))[: max(1, min(ranks, length))]
        inner = st.integers(1, max(1, length - 1))
        points = sorted(draw(st.sets(inner, max_size=len(owners) - 1))) if length > 1 else []
        ends = [*points, length]
        found[name] = [one for one in zip([0, *points], ends, owners, strict=False) if one[0] < one[1]]
    return found, ranks


def whole_cut(ranks: int = 1) -> tuple[Cut, int]:
    return {name: [(0, length, 0)] if length else [] for name, length in LENGTHS.items()}, ranks


def layout(cut: Cut, rank: int, *, value: float = 0.0, stepped: bool = False, muon: bool = False) -> Layout:
    """One rank's pieces side by side in one tensor; of all the same value, or with ``stepped`` each entry its own."""
    mine = [(name, start, stop) for name, parts in cut.items() for start, stop, owner in parts if owner == rank]
    flat = torch.nn.Parameter(torch.full((sum(stop - start for _, start, stop in mine) + 2,), value))
    optimiser: torch.optim.Optimizer = (
        Muon([flat], lr=0.1, weight_decay=0.0) if muon else torch.optim.AdamW([flat], lr=0.1)
    )
    pieces, at = [], 0
    for name, start, stop in mine:
        pieces.append(Piece(name, start, flat.detach()[at : at + stop - start], flat, at, optimiser))
        at += stop - start
    if stepped:
        for piece in pieces[:1]:
            piece.begin(3.0)
        for piece in pieces:
            for kind, tensor_N in piece.tensors().items():
                tensor_N.copy_(entries(kind, piece.name)[piece.start : piece.start + len(tensor_N)])
    return Layout(SHAPES, pieces, lambda: None)


def entries(kind: str, name: str) -> Tensor:
    """Numbers of which no two are alike."""
    draw = torch.Generator().manual_seed(len(kind) * 100 + list(SHAPES).index(name))
    return torch.rand(LENGTHS[name], generator=draw)


def is_right(found: Layout) -> bool:
    return all(
        piece.steps() == 3.0
        and piece.tensors().keys() == {"weight", "exp_avg", "exp_avg_sq"}
        and torch.equal(tensor_N, entries(kind, piece.name)[piece.start : piece.start + len(tensor_N)])
        for piece in found.pieces
        for kind, tensor_N in piece.tensors().items()
    )


def bits(found: Layout) -> list[Any]:
    return [
        (piece.name, piece.steps(), {kind: tensor_N.tolist() for kind, tensor_N in piece.tensors().items()})
        for piece in found.pieces
    ]


def save(folder: Path, cut: Cut, ranks: int) -> Checkpoint:
    """A checkpoint that so many ranks have written."""

    def one(side: Ranks) -> Checkpoint:
        files = engine_writers(layout(cut, side.rank, stepped=True), PROGRESS, side)
        store = Checkpoints(folder, ranks=side, say=lambda line: None)
        return store.save(step=3, stage="it", fingerprints={}, files=files)

    found = in_threads(ranks, one)[0]
    assert isinstance(found, Checkpoint), found
    return found


@settings(max_examples=60, deadline=None)
@given(saved=cuts(), wanted=cuts())
def test_any_ranks_take_what_any_ranks_have_written(
    tmp_path_factory: pytest.TempPathFactory, saved: tuple[Cut, int], wanted: tuple[Cut, int]
) -> None:
    checkpoint = save(tmp_path_factory.mktemp("saved"), *saved)

    def one(side: Ranks) -> bool:
        mine = layout(wanted[0], side.rank, value=9.0)
        assert restore_engine(checkpoint, mine, side) == PROGRESS
        return is_right(mine)

    assert in_threads(wanted[1], one) == [True] * wanted[1]


def test_control_an_entry_out_of_place_would_be_seen() -> None:
    found = layout(*whole_cut()[:1], rank=0, stepped=True)
    assert is_right(found)
    found.pieces[0].tensors()["exp_avg"].copy_(entries("exp_avg", "a.weight").roll(1))
    assert not is_right(found)


def test_a_replicated_engine_is_written_once(tmp_path: Path) -> None:
    progress = PROGRESS.model_copy(update={"stage": 0})
    sides = in_threads(2, lambda side: sorted(engine_writers(layout(whole_cut()[0], 0), progress, side)))
    assert sides == [["engine-rank00000.json", "engine-rank00000.safetensors"], []]


Record = dict[str, Any]


def changed(checkpoint: Checkpoint, *, name: str = "engine-rank00000", record: Callable[[Record], Any]) -> None:
    path = checkpoint.path / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    record(found)
    path.write_text(json.dumps(found), encoding="utf-8")


FAULTS: dict[str, tuple[Callable[[Record], Any], str]] = {
    "missing": (lambda r: r["pieces"].pop("b"), "b: is not in it"),
    "more": (lambda r: r["pieces"].update(f=r["pieces"]["b"]), "f: is in it, and not in this model"),
    "renamed": (lambda r: r["pieces"].update({"a.wieght": r["pieces"].pop("a.weight")}), "did you mean 'a.weight'"),
    "shape": (lambda r: r["pieces"]["c"].update(shape=[4, 2]), r"c: of shape \(4, 2\), wanted \(2, 2, 2\)"),
    "gap": (lambda r: r["pieces"]["b"].update(start=1), "b: entry 0 is missing"),
    "short": (lambda r: r["pieces"]["b"].update(length=4), "b: has 4 entries, wanted 5"),
    "long": (lambda r: r["pieces"]["b"].update(length=2**40), "b: has 1,099,511,627,776 entries, wanted 5"),
    "other moments": (
        lambda r: r["pieces"]["b"].update(moments=["momentum"], steps=None),
        "b: the optimiser kept momentum, this one keeps exp_avg, exp_avg_sq",
    ),
    "no count": (lambda r: r["pieces"]["b"].update(steps=None), "b: moments and a count of steps do not go"),
    "two counts": (lambda r: r["pieces"]["b"].update(steps=2.0), "b: stepped 2 times and a.weight 3 times"),
    "no moments": (lambda r: r["pieces"]["b"].update(moments=[], steps=None), "b: stepped 0 times and a.weight 3"),
    "word": (lambda r: r["pieces"]["b"].update(steps="3"), "wanted a number"),
    "unknown": (lambda r: r.update(pickle="x"), "no setting of this name"),
    "format": (lambda r: r.update(format="minillm engine 2"), "format: got 'minillm engine 2'"),
}


def refused(checkpoint: Checkpoint, message: str, **kind: Any) -> None:
    """The checkpoint is refused with this message, and changes nothing, whether or not there are moments yet."""
    for stepped in (False, True):
        mine = layout(whole_cut()[0], 0, value=9.0, stepped=stepped, **kind)
        before = bits(mine)
        with pytest.raises(CheckpointError, match=message):
            restore_engine(checkpoint, mine, alone())
        assert bits(mine) == before


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """By one rank, and right."""
    found = save(tmp_path / "it", *whole_cut())
    restore_engine(found, layout(whole_cut()[0], 0), alone())
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_record_that_does_not_fit_is_refused_before_anything_is_changed(fault: str, checkpoint: Checkpoint) -> None:
    change, message = FAULTS[fault]
    changed(checkpoint, record=change)
    refused(checkpoint, message)


@pytest.mark.parametrize("fault", ["gone", "dtype", "length", "cut", "no file"])
def test_tensors_that_do_not_fit_are_refused_before_anything_is_changed(fault: str, checkpoint: Checkpoint) -> None:
    path = checkpoint.path / "engine-rank00000.safetensors"
    found = load_file(path)
    message = {
        "gone": "has no tensor 'exp_avg/d'", "dtype": "weight/b: got .*BF16", "length": "weight/b: got .*4",
        "cut": "cannot be read as safetensors", "no file": "cannot be read as safetensors",
    }[fault]  # fmt: skip
    match fault:
        case "gone":
            del found["exp_avg/d"]
        case "dtype":
            found["weight/b"] = found["weight/b"].bfloat16()
        case "length":
            found["weight/b"] = found["weight/b"][:4].clone()
    save_file(found, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    if fault == "no file":
        path.unlink()
    refused(checkpoint, message)


def test_another_optimiser_is_refused(checkpoint: Checkpoint) -> None:
    refused(checkpoint, "a.weight: the optimiser kept exp_avg, exp_avg_sq, this one keeps momentum", muon=True)


def test_files_of_two_engines_are_refused(tmp_path: Path) -> None:
    cut = {name: [(0, length, int(name == "b"))] if length else [] for name, length in LENGTHS.items()}
    checkpoint = save(tmp_path / "it", cut, 2)
    changed(checkpoint, name="engine-rank00001", record=lambda r: r["progress"].update(updates_done=4))
    refused(checkpoint, "are of different engines")


def test_a_piece_that_two_ranks_have_is_refused(tmp_path: Path) -> None:
    cut = {name: [(0, length, int(name == "b"))] if length else [] for name, length in LENGTHS.items()}
    checkpoint = save(tmp_path / "it", cut, 2)
    changed(checkpoint, name="engine-rank00001", record=lambda r: r["pieces"].update(d={
        "shape": [], "start": 0, "length": 1, "moments": [], "steps": None,
    }))  # fmt: skip
    refused(checkpoint, "d: entry 0 is there twice")


def test_a_checkpoint_without_an_engine_is_refused(checkpoint: Checkpoint) -> None:
    without = checkpoint.manifest.model_copy(update={"files": {}})
    refused(Checkpoint(checkpoint.path, without), "has no file of an engine's state")
    assert (checkpoint.path / MANIFEST).is_file()


def test_what_one_rank_finds_wrong_stops_all(tmp_path: Path) -> None:
    """The second rank's file lacks a tensor that the first does not read."""
    cut = {name: [(0, length, int(name == "b"))] if length else [] for name, length in LENGTHS.items()}
    checkpoint = save(tmp_path / "it", cut, 2)
    path = checkpoint.path / "engine-rank00001.safetensors"
    save_file({name: t for name, t in load_file(path).items() if name != "exp_avg/b"}, path)
    layouts = [layout(cut, rank, value=9.0) for rank in range(2)]
    before = [bits(mine) for mine in layouts]
    told = in_threads(2, lambda side: restore_engine(checkpoint, layouts[side.rank], side))
    assert all(isinstance(error, CheckpointError) and "exp_avg/b" in str(error) for error in told)
    assert [bits(mine) for mine in layouts] == before


def test_muon_s_momentum_is_kept_without_a_count(tmp_path: Path) -> None:
    mine = layout(whole_cut()[0], 0, muon=True)
    mine.pieces[0].begin(None)
    for piece in mine.pieces:
        piece.tensors()["momentum"].fill_(0.5)
    store = Checkpoints(tmp_path / "it", ranks=alone(), say=print)
    saved = store.save(step=1, stage="it", fingerprints={}, files=engine_writers(mine, PROGRESS, alone()))
    again = layout(whole_cut()[0], 0, value=9.0, muon=True)
    restore_engine(saved, again, alone())
    assert bits(again) == bits(mine) and "momentum" in again.pieces[0].tensors()


class Engine:
    """As much of DeepSpeed's as is looked at first."""

    def __init__(self, optimiser: Any) -> None:
        self.optimizer, self.module = optimiser, torch.nn.Linear(2, 2)


def test_insides_that_are_not_known_are_an_error_that_says_so() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match=r"DeepSpeed 0\..*the engine's optimiser is SGD"):
        layout_of(Engine(torch.optim.SGD([weight], lr=0.1)))
    with pytest.raises(CheckpointError, match=r"DeepSpeed 0\..*has no attribute 'bit16_groups'"):
        layout_of(Engine(object.__new__(DeepSpeedZeroOptimizer)))


def test_state_that_would_be_lost_is_an_error() -> None:
    it = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(it.parameters(), amsgrad=True)
    it(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    engine = Engine(optimiser)
    engine.module = it
    with pytest.raises(CheckpointError, match="AdamW keeps exp_avg, exp_avg_sq, max_exp_avg_sq, step"):
        engine_writers(layout_of(engine), PROGRESS, alone())


def test_a_parameter_outside_the_flat_tensor_of_its_group_is_an_error() -> None:
    from minillm.engine_state import _offset

    flat = torch.zeros(8)
    assert [_offset(flat[start : start + 2], flat) for start in range(7)] == list(range(7))
    for other in (torch.zeros(2), flat[::2], torch.zeros(10)[:2]):
        with pytest.raises(CheckpointError, match="no part of the flat tensor"):
            _offset(other, flat)

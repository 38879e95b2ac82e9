"""The fused loss keeps nothing of the size of whole logits: its tensors, its cuts and the process as the system sees
it."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from minillm.bench.memory import extra_peak
from minillm.kept import Kept
from minillm.sampling import pack_support
from minillm.scoring import (
    STATISTICS,
    WORKING_BYTES,
    HeadWeights,
    Piece,
    TeacherView,
    Tile,
    Workspace,
    cut_for,
    tensors_of_a_piece,
    token_statistics,
)
from minillm.token_loss import Task, token_loss


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations made, those of their inputs left out, and that are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._seen.setdefault(tensor.untyped_storage(), None)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                size = storage.nbytes()
                self._seen[storage] = weakref.ref(storage, lambda _, size=size: self._freed(size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


TILE, PIECE, MANY_V, NARROW_H = 32, 8, 4096, 2


def at_the_peak(
    wanted: Sequence[str], *, dtype: torch.dtype = torch.float32, whole: bool = False, gradient: bool = True,
    kept: int = 16, coupled: bool = False,
) -> tuple[float, int]:  # fmt: skip
    """Memory beyond both models' tiles in tensors of a piece's size, as counted and as foreseen.

    ``whole``: with all that a head and a task may have. Heads are frozen, and so narrow that the rest is nothing
    beside a piece.
    """
    noise = torch.Generator().manual_seed(0)
    tokens = 2 * TILE + PIECE

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=noise).to(dtype)

    def head() -> HeadWeights:
        more = {"bias_V": random(MANY_V), "scale": 0.5, "softcap": 3.0} if whole else {"bias_V": None}
        return HeadWeights(weight_VH=random(MANY_V, NARROW_H), **more)

    support_NV = torch.ones(tokens, MANY_V, dtype=torch.bool)
    ids_NK = torch.arange(kept).repeat(tokens, 1)
    cached = Kept(ids_NK=ids_NK, logp_NJ=torch.zeros(tokens, kept + 1).log_softmax(-1))
    task = Task(
        taken_N=torch.zeros(tokens, dtype=torch.long), wanted=wanted, tile=TILE, piece=PIECE,
        teacher=TeacherView(head=head(), hidden_NH=random(tokens, NARROW_H)), temperature=0.7 if whole else 1.0,
        support_NC=pack_support(support_NV) if whole else None, kept=cached,
    )  # fmt: skip
    hidden_NH, own = random(tokens, NARROW_H).requires_grad_(gradient), head()
    with Live() as live:
        if gradient:
            token_loss(
                hidden_NH, head=own, task=task, loss=lambda n, _: torch.stack([*n.values()]).sum(), coupled=coupled
            )
        else:
            token_statistics(hidden_NH, head=own, **{field.name: getattr(task, field.name) for field in fields(task)})
    row = MANY_V * dtype.itemsize
    found = (live.peak - 2 * TILE * row) / (PIECE * MANY_V * max(4, dtype.itemsize))
    return found, tensors_of_a_piece(own, task)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "wanted", [("logq",), ("logq", "cached_kl"), ("logq", "reverse_kl"), ("logq", "entropy"), ("jsd",), STATISTICS]
)
def test_as_many_tensors_of_a_piece_live_at_once_as_memory_is_set_aside_for(
    wanted: tuple[str, ...], dtype: torch.dtype, whole: bool
) -> None:
    """And a tile of each model. What a support needs is counted in bytes of bool, so in part."""
    for gradient in (False, True):
        found, foreseen = at_the_peak(wanted, dtype=dtype, whole=whole, gradient=gradient)
        assert foreseen - 0.6 < found < foreseen + 0.1


@pytest.mark.parametrize("kept", [512, 1024, 2048, MANY_V])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_many_kept_ids_are_counted_too(dtype: torch.dtype, kept: int) -> None:
    """Their numbers are int64, so a share of a tensor stays in doubt."""
    few, _ = at_the_peak(("logq", "cached_kl"), dtype=dtype)
    found, foreseen = at_the_peak(("logq", "cached_kl"), dtype=dtype, kept=kept)
    assert foreseen - 1.0 < found < foreseen + 0.2
    assert found - few > 4 * kept / MANY_V  # control: ids cost something


@pytest.mark.parametrize("wanted", [("logq",), ("logq", "logp", "forward_kl"), STATISTICS])
def test_a_coupled_loss_keeps_no_more(wanted: tuple[str, ...]) -> None:
    """Beside some numbers a token: both of its passes go tile by tile."""
    found, foreseen = at_the_peak(wanted, coupled=True)
    assert foreseen - 0.6 < found < foreseen + 0.15


def test_the_loss_of_minillm_needs_five_tensors_of_a_piece() -> None:
    assert at_the_peak(("logq", "reverse_kl"))[1] == 5


def test_one_more_copy_of_a_piece_or_of_a_tile_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the counts above."""
    kept: list[Tensor] = []
    by_formula, pieces = Piece.by_formula, Tile.pieces

    def with_a_piece(self: Piece) -> dict[str, Tensor]:
        kept[:] = [self.student_nV.clone()]
        return by_formula(self)

    def with_a_tile(self: Tile, tokens: int) -> Any:
        kept[:] = [self.student_nV.clone()]
        return pieces(self, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Piece, "by_formula", with_a_piece)
        found, foreseen = at_the_peak(STATISTICS, dtype=torch.bfloat16, whole=True)
        assert found >= foreseen + 1
    monkeypatch.setattr(Tile, "pieces", with_a_tile)
    found, foreseen = at_the_peak(("logq", "reverse_kl"))
    assert found >= foreseen + TILE / PIECE


@pytest.mark.parametrize("threads", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [300, 4096, 151_936, 262_144])
def test_what_a_pass_keeps_stays_within_its_memory(
    vocabulary: int, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    head = HeadWeights(weight_VH=torch.empty(vocabulary, 1, dtype=dtype), bias_V=None)
    for teacher in (None, TeacherView(head=head, hidden_NH=torch.empty(1, 1, dtype=dtype))):
        task = Task(taken_N=torch.empty(0), wanted=STATISTICS, teacher=teacher)
        cut = cut_for(head, task)
        tile = cut.tile * vocabulary * dtype.itemsize * (1 if teacher is None else 2)
        pieces = tensors_of_a_piece(head, task) * cut.piece * vocabulary * max(4, dtype.itemsize)
        assert WORKING_BYTES["cpu"] * 0.9 < tile + pieces <= WORKING_BYTES["cpu"]
        assert 1 <= cut.piece <= cut.tile and cut.tile >= 16


def resident(tokens: int, keep: bool) -> int:
    """In a fresh process: memory of a loss at a large vocabulary, with a workspace that keeps its storage or not."""
    torch.set_num_threads(1)
    if not keep:
        take = Workspace.take

        def forgetful(self: Workspace, name: str, like_nV: Tensor) -> Tensor:
            self._kept.clear()
            return take(self, name, like_nV)

        Workspace.take = forgetful  # type: ignore[method-assign]
    vocabulary, width = 151_936, 8
    head = HeadWeights(weight_VH=torch.zeros(vocabulary, width).requires_grad_(), bias_V=None)
    teacher = TeacherView(
        head=HeadWeights(weight_VH=torch.zeros(vocabulary, width), bias_V=None), hidden_NH=torch.zeros(tokens, width)
    )
    taken_N = torch.zeros(tokens, dtype=torch.long)
    task = Task(taken_N=taken_N, wanted=("logq", "reverse_kl"), teacher=teacher, tile=16, piece=1)
    kept: list[Tensor] = []  # what a caller keeps of each piece is where holes in the heap come from

    def loss(numbers: Mapping[str, Tensor], _: slice) -> Tensor:
        kept.extend(number.detach().clone() for number in numbers.values())
        return numbers["reverse_kl"].sum()

    hidden_NH = torch.zeros(tokens, width)
    return extra_peak(lambda: token_loss(hidden_NH, head=head, task=task, loss=loss), device=torch.device("cpu"))


TRIES = 10
"""Whether the heap is left with holes is the allocator's luck, about every other time."""


def test_memory_does_not_grow_with_the_number_of_pieces() -> None:
    """The system's view, which counts holes in the heap too. The control asks for each tensor anew."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        few, many = pool.starmap(resident, [(32, True), (128, True)], chunksize=1)
        assert many - few < 8 * 2**20
        forgetful = (pool.apply(resident, (128, False)) for _ in range(TRIES))
        assert any(memory - few > 8 * 2**20 for memory in forgetful)

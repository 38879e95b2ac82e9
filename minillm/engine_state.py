"""Where DeepSpeed keeps what an engine learns: the one place that knows its insides.

ZeRO lays the parameters of a group end to end (each cut into shares first, at stage 3), gives every rank a stretch of
that, and steps the stretch's 32-bit copy as one tensor. Which entries of which parameter stand where in it is read off
the storage that parameters and stretch share, not from DeepSpeed's own tables: at stages 1 and 2 those of moments miss
every group but the first, and those of weights are of another order under ``round_robin_gradients``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillm import collectives
from minillm.errors import CheckpointError
from minillm.muon import Muon
from minillm.optimisers import MuonWithAdamW

WEIGHT = "weight"
MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
"""What an optimiser keeps of each entry that it steps."""
COUNTED = (torch.optim.AdamW,)
"""Optimisers that also count their steps, under ``COUNT``."""
COUNT = "step"


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A stretch of one flattened parameter that this rank's optimiser steps."""

    name: str
    start: int
    """Its first entry in the flattened parameter."""
    weight_N: Tensor
    """Its entries in 32 bits, as the optimiser has them: a view."""
    stepped: Tensor
    """The tensor that the optimiser steps: the parameter at stage 0, above it a flat one with pieces of several."""
    at: int
    """Where the piece begins in ``stepped``, flattened."""
    optimiser: torch.optim.Optimizer
    """Whose state is of ``stepped``."""

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimiser keeps of each entry once it has made a step."""
        return MOMENTS[type(self.optimiser)]

    @property
    def counted(self) -> bool:
        """Whether the optimiser counts its steps."""
        return isinstance(self.optimiser, COUNTED)

    def tensors(self) -> dict[str, Tensor]:
        """Views of the weights and, once there was a step, of each moment: all [N]."""
        state = self._state()
        last = self.at + self.weight_N.numel()
        return {
            WEIGHT: self.weight_N,
            **{key: state[key].view(-1)[self.at : last] for key in self.moments if state},
        }

    def steps(self) -> float | None:
        """How many steps the optimiser has counted, if it counts and has made one."""
        state = self._state()
        return float(state[COUNT]) if self.counted and state else None

    def begin(self, steps: float | None) -> None:
        """Moments of 0 and a count of steps, as after a step; they are of all of ``stepped``."""
        state: dict[str, Tensor] = {key: torch.zeros_like(self.stepped) for key in self.moments}
        if self.counted:
            state[COUNT] = torch.tensor(steps)  # torch keeps it so, on the CPU, unless it is told to step in one kernel
        self.optimiser.state[self.stepped] = state

    def forget(self) -> None:
        """No moments, as before the first step."""
        self.optimiser.state.pop(self.stepped, None)

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.optimiser.state.get(self.stepped, {})
        wanted = {*self.moments, *([COUNT] if self.counted else [])}
        if state and state.keys() != wanted:
            raise _unexpected(f"{type(self.optimiser).__name__} keeps {', '.join(sorted(state))}")
        return state


@dataclass(frozen=True, slots=True)
class Layout:
    """What an engine trains, and which of it is this rank's."""

    shapes: dict[str, tuple[int, ...]]
    """Every trained parameter, in whole."""
    pieces: list[Piece]
    """This rank's; at stage 0 all of them on each."""
    refresh: Callable[[], None]
    """Makes what the forward computes with anew from the pieces; to be called on all ranks."""
    replicated: bool = False
    """Whether every rank has all of them, as at stage 0."""


def layout_of(engine: Any) -> Layout:
    """The layout of a DeepSpeed engine; ``CheckpointError`` where its insides are not as they are known here."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimiser = engine.optimizer
    names = {id(p): name for name, p in engine.module.named_parameters() if p.requires_grad}
    shapes = {
        name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters() if p.requires_grad
    }
    kind = type(optimiser)
    try:
        if kind in (torch.optim.AdamW, MuonWithAdamW):
            return Layout(shapes, list(_replicated(optimiser, names)), lambda: None, replicated=True)
        if kind is BF16_Optimizer:
            lists = optimiser.bf16_groups, optimiser.bf16_groups_flat, optimiser.fp32_groups_flat_partition
            return Layout(shapes, list(_partitioned(optimiser, lists, names)), optimiser.update_lp_params)
        if kind is DeepSpeedZeroOptimizer:
            lists = optimiser.bit16_groups, optimiser.bit16_groups_flat, optimiser.single_partition_of_fp32_groups
            return Layout(shapes, list(_partitioned(optimiser, lists, names)), optimiser.update_lp_params)
        if kind is DeepSpeedZeroOptimizer_Stage3:
            return Layout(shapes, list(_sharded(optimiser, names)), lambda: _refresh_shards(optimiser))
    except AttributeError as error:
        raise _unexpected(str(error)) from error
    raise _unexpected(f"the engine's optimiser is {kind.__name__}")


def whole_weights(layout: Layout, *, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every trained parameter in whole and in 32 bits, as the optimiser has it, on every rank, one after the other: a
    rank may have no room for all. To be read before the next is asked for, and not written. All ranks must take all of
    them."""
    for name, shape in layout.shapes.items():
        pieces = [piece for piece in layout.pieces if piece.name == name]
        if len(pieces) == 1 and pieces[0].weight_N.numel() == math.prod(shape) and pieces[0].weight_N.device == device:
            own_N = pieces[0].weight_N
            if layout.replicated or dist.get_world_size() == 1:
                yield name, own_N.view(shape)
                continue
        whole_N = torch.zeros(math.prod(shape), dtype=torch.float32, device=device)
        for piece in pieces:
            whole_N[piece.start : piece.start + piece.weight_N.numel()] = piece.weight_N
        if dist.get_world_size() > 1 and not layout.replicated:
            # Of an entry one rank has the value and the others have 0, so this rounds nothing.
            with collectives.counted("all_reduce", whole_N):
                dist.all_reduce(whole_N)
        yield name, whole_N.view(shape)


def _replicated(optimiser: Any, names: dict[int, str]) -> Iterator[Piece]:
    """Stage 0: every rank steps every parameter."""
    for part in optimiser.parts if isinstance(optimiser, MuonWithAdamW) else (optimiser,):
        for parameter in (p for group in part.param_groups for p in group["params"]):
            _require(parameter.is_contiguous(), f"{names[id(parameter)]} is not laid out in one piece")
            if parameter.numel():
                yield Piece(names[id(parameter)], 0, parameter.detach().view(-1), parameter, 0, part)


def _partitioned(
    optimiser: Any, lists: tuple[list[list[Tensor]], list[Tensor], list[Tensor]], names: dict[int, str]
) -> Iterator[Piece]:
    """Stages 1 and 2: of each group, whole parameters end to end, and of that an equal stretch for each rank."""
    for parameters, flat, mine, group in zip(*lists, optimiser.real_dp_process_group, strict=True):
        _require_all_ranks(group)
        first = dist.get_rank(group) * mine.numel()
        _require(mine.numel() * dist.get_world_size(group) == flat.numel(), "ranks have stretches of several lengths")
        for parameter in parameters:
            offset = _offset(parameter.data, flat)
            begin, end = max(offset, first), min(offset + parameter.numel(), first + mine.numel())
            if begin < end:
                weight_N = mine.detach()[begin - first : end - first]
                yield Piece(names[id(parameter)], begin - offset, weight_N, mine, begin - first, optimiser.optimizer)


def _sharded(optimiser: Any, names: dict[int, str]) -> Iterator[Piece]:
    """Stage 3: every parameter cut into equal shares, one for each rank; of each group, this rank's end to end."""
    for parameters, flat, mine, group in zip(
        optimiser.fp16_groups, optimiser.fp16_partitioned_groups_flat, optimiser.fp32_partitioned_groups_flat,
        optimiser.sub_group_process_groups, strict=True,
    ):  # fmt: skip
        _require_all_ranks(group)
        _require(mine.numel() == flat.numel(), "the optimiser steps something else than the shards")
        for parameter in parameters:
            share = parameter.partition_numel()
            start = dist.get_rank(group) * share
            length = min(share, parameter.ds_numel - start)  # the last shares are filled up
            if length > 0:
                offset = _offset(parameter.ds_tensor.data, flat)
                weight_N = mine.detach()[offset : offset + length]
                yield Piece(names[id(parameter)], start, weight_N, mine, offset, optimiser.optimizer)


def _refresh_shards(optimiser: Any) -> None:
    """Shards from their 32-bit copies, and those parameters anew that stay gathered between forwards."""
    optimiser.checkpoint_event_prologue()
    for flat, mine in zip(optimiser.fp16_partitioned_groups_flat, optimiser.fp32_partitioned_groups_flat, strict=True):
        flat.data.copy_(mine.data)
    optimiser.checkpoint_event_epilogue()


def _offset(part: Tensor, flat: Tensor) -> int:
    """Where a view begins in the flat tensor that it is a view of."""
    offset = int(part.storage_offset()) - int(flat.storage_offset())
    same = part.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    _require(
        same and part.is_contiguous() and 0 <= offset <= flat.numel() - part.numel(),
        "a parameter is no part of the flat tensor of its group",
    )
    return offset


def _require_all_ranks(group: Any) -> None:
    _require(dist.get_world_size(group) == dist.get_world_size(), "a group of parameters is shared by some ranks only")


def _require(found: bool, otherwise: str) -> None:
    if not found:
        raise _unexpected(otherwise)


def _unexpected(found: str) -> CheckpointError:
    import deepspeed

    return CheckpointError(
        f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}: {found}, which checkpoints do not know\n"
        "  use the versions in constraints.txt and the engine files of ds_configs, or save nothing: checkpoints=null"
    )

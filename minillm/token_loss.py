"""A loss on final hidden states, fused with its own gradient: heads, softmax, divergences and their derivatives in one
pass over tiles of tokens.

Legend: N tokens, n tokens of a tile or of a piece of it, V real vocabulary ids, H hidden width, C packed bytes of V.

Logits of a tile exist once; what softmax makes of them, piece by piece (see ``scoring``). Each piece gives its numbers
per token; the objective makes a loss of them; the derivative of that loss by each number (of size [n]) is pulled back,
by formulas written out below, through the softmax, to take the place of the piece's logits; and those of a tile through
the head into gradients of hidden states and head. So nothing of size [N, V] is kept, no logits are computed twice, and
the backward pass only multiplies by the number that comes from above (the idea of fused linear losses, Hsu et al. 2024,
"Liger Kernel"; here for a loss that is any function of the numbers of each token).

A loss that couples tokens (of two responses that are compared, say) is no sum over pieces. It is differentiated by the
numbers of all N tokens, which a pass without gradient gives; the loss that has just this gradient *is* a sum over
tokens: each number times its derivative, which is a constant by then. So there is one way back through the softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.scoring import HeadWeights, Piece, Task, Tile, Workspace, answers, cut_for, empty_numbers, tiles

__all__ = ["Task", "TileLoss", "token_loss"]

TileLoss = Callable[[Mapping[str, Tensor], slice], Tensor]
"""From the numbers of a piece's tokens, each [n], and their place among all N, to the piece's share of the loss. It
must be a sum over tokens, or how tokens are cut into tiles and pieces would change it; unless it is ``coupled``, and
given all N at once."""


BLOCK_BYTES = 16 * 2**20
"""Size of a block of the head's gradient in 16 bits, before it is added to that in 32."""


def token_loss(
    hidden_NH: Tensor, *, head: HeadWeights, task: Task, loss: TileLoss, coupled: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of ``loss`` over pieces, a scalar with gradient to hidden states and head; and the numbers [N], without.

    The numbers are those of ``scoring.token_statistics``. With N = 0 the loss of an empty piece comes out, and its
    gradient is 0. Only the first derivative exists. A ``coupled`` loss is any function of the numbers of all tokens,
    and called once, with all of them; the heads are multiplied out a second time for it.
    """
    if coupled:
        return _coupled_loss(hidden_NH, head=head, task=task, loss=loss)
    out: dict[str, Tensor] = {}
    value: Tensor = _TokenLoss.apply(hidden_NH, head.weight_VH, head.bias_V, head, task, loss, out)  # type: ignore[no-untyped-call]
    return value, out


def _coupled_loss(
    hidden_NH: Tensor, *, head: HeadWeights, task: Task, loss: TileLoss
) -> tuple[Tensor, dict[str, Tensor]]:
    numbers = answers(hidden_NH, head=head, task=task)
    value, slopes = _differentiate(loss, numbers, slice(0, len(hidden_NH)))

    def to_first_order(of: Mapping[str, Tensor], here: slice) -> Tensor:
        shares = [(slope_N[here] * of[name]).sum() for name, slope_N in slopes.items()]
        return sum(shares, value.new_zeros(()))

    same, _ = token_loss(hidden_NH, head=head, task=task, loss=to_first_order)
    return value + (same - same.detach()), numbers  # the loss's own value, with the other's gradient


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 (autograd takes arguments by position)
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: HeadWeights,
        task: Task,
        loss: TileLoss,
        out: dict[str, Tensor],
    ) -> Tensor:
        own = HeadWeights(weight_VH=weight_VH, bias_V=bias_V, scale=head.scale, softcap=head.softcap)
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        grads = _Gradients(
            hidden_NH=torch.zeros_like(hidden_NH) if ctx.needs_input_grad[0] else None,
            weight_VH=torch.zeros_like(weight_VH, dtype=wide) if ctx.needs_input_grad[1] else None,
            bias_V=torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and ctx.needs_input_grad[2] else None,
        )
        cut = cut_for(own, task)
        space = Workspace(min(cut.piece, len(hidden_NH)), own)
        out.update(empty_numbers(hidden_NH, task, space))
        total = hidden_NH.new_zeros((), dtype=wide)
        for tile in tiles(hidden_NH, head=own, teacher=task.teacher, tokens=cut.tile):
            for part in tile.pieces(cut.piece):
                turn = _Turn(part, head=own, task=task, space=space)
                value, by_number = _differentiate(loss, turn.values, part.here)
                total += value
                for name in task.wanted:
                    out[name][part.here] = turn.values[name]
                grads.take(turn.pulled_back(by_number), part=part)
            grads.add(tile, hidden_nH=hidden_NH[tile.here], head=own)
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        grads: _Gradients | None = ctx.grads
        assert grads is not None, "a second backward pass: the first one used the gradients up"
        ctx.grads = None
        hidden, weight, bias = (  # in place: that of a head is as large as the head
            None if grad is None else grad.mul_(from_above).to(kept)
            for grad, kept in zip((grads.hidden_NH, grads.weight_VH, grads.bias_V), grads.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None, None, None


class _Gradients:
    """Gradients of the loss by hidden states and head, filled tile by tile; those of the head in 32 bits."""

    def __init__(self, *, hidden_NH: Tensor | None, weight_VH: Tensor | None, bias_V: Tensor | None) -> None:
        self.hidden_NH, self.weight_VH, self.bias_V = hidden_NH, weight_VH, bias_V
        self.dtypes: tuple[torch.dtype, ...] = ()

    def take(self, slope_nV: Tensor | None, *, part: Tile) -> None:
        """Takes in the derivatives of one piece's loss by its linear outputs, and puts them where those were."""
        if slope_nV is None:
            part.student_nV.zero_()
            return
        part.student_nV.copy_(slope_nV)
        if self.bias_V is not None:
            self.bias_V.addmv_(slope_nV.T, slope_nV.new_ones(len(slope_nV)))

    def add(self, tile: Tile, *, hidden_nH: Tensor, head: HeadWeights) -> None:
        """Multiplies a tile out whose pieces have all been taken in."""
        self.dtypes = (hidden_nH.dtype, head.weight_VH.dtype, head.weight_VH.dtype)
        slope_nV = tile.student_nV
        if self.hidden_NH is not None:
            torch.mm(slope_nV, head.weight_VH, out=self.hidden_NH[tile.here])
        if self.weight_VH is not None:
            if self.weight_VH.dtype == slope_nV.dtype:
                self.weight_VH.addmm_(slope_nV.T, hidden_nH)
            else:  # block by block: the product has the size of the head
                rows = max(1, BLOCK_BYTES // (hidden_nH.shape[1] * hidden_nH.element_size()))
                for block, slope_Vn in zip(
                    torch.split(self.weight_VH, rows), torch.split(slope_nV.T, rows), strict=True
                ):
                    block.add_(slope_Vn @ hidden_nH)


def _differentiate(loss: TileLoss, values: Mapping[str, Tensor], here: slice) -> tuple[Tensor, dict[str, Tensor]]:
    """The piece's loss, and its derivative [n] by each number that it depends on."""
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        value = loss(leaves, here)
        if not value.requires_grad:
            return value.detach(), {}
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    slopes = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    return value.detach(), slopes


class _Turn:
    """A piece's numbers, and the way back from derivatives by them to derivatives by its linear outputs."""

    def __init__(self, part: Tile, *, head: HeadWeights, task: Task, space: Workspace) -> None:
        self._head, self._temperature = head, task.temperature
        self._piece = Piece(part, head=head, task=task, space=space)
        self._graph: tuple[Tensor, dict[str, Tensor]] | None = None
        self.values = self._piece.by_formula() if self._piece.is_finite else self._by_autograd(task.wanted)

    def _by_autograd(self, wanted: Sequence[str]) -> dict[str, Tensor]:
        with torch.enable_grad():
            leaf_nV = self._piece.student_nV.clone().requires_grad_()
            values = self._piece.by_definition(leaf_nV)
        values = {name: values[name] for name in wanted}
        self._graph = (leaf_nV, values)
        return {name: value.detach() for name, value in values.items()}

    def pulled_back(self, slopes: Mapping[str, Tensor]) -> Tensor | None:
        """Derivative of the piece's loss by the head's linear outputs, [n, V]; ``None`` where it depends on none."""
        slopes = {name: slope for name, slope in slopes.items() if name != "logp"}
        if not slopes or not self._piece.taken_n1.numel():
            return None
        slope_nV = self._pulled_by_autograd(slopes) if self._graph is not None else self._pulled_by_formula(slopes)
        if self._head.softcap is not None:
            capped_nV = torch.div(self._piece.student_nV, self._head.softcap, out=self._piece.scratch())
            slope_nV.mul_(capped_nV.square_().neg_().add_(1.0))
        return slope_nV if self._head.scale == 1.0 else slope_nV.mul_(self._head.scale)

    def _pulled_by_autograd(self, slopes: Mapping[str, Tensor]) -> Tensor:
        assert self._graph is not None
        leaf_nV, values = self._graph
        (slope_nV,) = torch.autograd.grad([values[name] for name in slopes], leaf_nV, list(slopes.values()))
        return slope_nV

    def _pulled_by_formula(self, slopes: Mapping[str, Tensor]) -> Tensor:
        """q (F - E_q F) with F the slopes' sum of each number's f, and what is not of that form."""
        piece = self._piece
        inner_nV: Tensor | None = None
        outer_nV: Tensor | None = None
        for name, slope_n in slopes.items():
            if name == "logq":
                continue
            f_nV, extra_nV = (piece.logq_nV.neg_(), None) if name == "entropy" else piece.derivatives[name]
            if f_nV is not None:
                inner_nV = _plus(inner_nV, f_nV.mul_(slope_n[:, None]))
            if extra_nV is not None:
                outer_nV = _plus(outer_nV, extra_nV.mul_(slope_n[:, None]))
        mean_n = torch.zeros_like(piece.q_nV[:, 0]) if inner_nV is None else piece.expected(piece.q_nV, inner_nV)
        if "logq" in slopes:
            mean_n = mean_n + slopes["logq"]
        mean_n1 = mean_n[:, None]
        slope_nV = piece.q_nV.mul_(-mean_n1 if inner_nV is None else inner_nV.sub_(mean_n1))
        if outer_nV is not None:
            slope_nV += outer_nV
        if "logq" in slopes:
            slope_nV.scatter_add_(1, piece.taken_n1, slopes["logq"][:, None])
        return slope_nV if self._temperature == 1.0 else slope_nV.div_(self._temperature)


def _plus(so_far: Tensor | None, more: Tensor) -> Tensor:
    return more if so_far is None else so_far.add_(more)

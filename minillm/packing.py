"""Rows of different lengths laid end to end in lines of one length, so that a forward computes almost no padding.

Most transformers models take such lines as they are: where positions start again at 0 a new sequence begins, and no
token attends across the border. Others (OPT) need a mask that says so. The place of every token is kept, so what a
forward gives comes back row by row.

Legend: B rows, L their padded length, R lines, W the length of a line (the longest row's), H hidden width, N tokens.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What a forward reads, and where each token of the rows went."""

    ids_RW: Tensor
    position_RW: Tensor
    """Counted from 0 within each row; 0 at every place that is left over, so that each of these stands alone."""
    place_BL: Tensor
    """Index into the lines, flattened, of each real token; -1 where there is none."""

    def mask_R1WW(self) -> Tensor:
        """True where a token (third axis) may attend to another: itself, and those before it in its own row."""
        row_RW = (self.position_RW == 0).cumsum(dim=1)
        same_RWW = row_RW[:, :, None] == row_RW[:, None, :]
        return same_RWW.tril()[:, None]

    def of_rows(self, hidden_RWH: Tensor, wanted_BL: Tensor) -> Tensor:
        """States [N, H] of the wanted tokens, row by row; every wanted token must be a real one."""
        return hidden_RWH.flatten(0, 1).index_select(0, self.place_BL[wanted_BL])


def pack(ids_BL: Tensor, mask_BL: Tensor) -> Packed:
    """The real tokens of each row side by side in as few lines as are found, none longer than the longest row.

    Padding may be on either side. Rows of 5, 2 and 3 tokens give two lines of 5: the first row, and the other two. At
    least one line, one token long, even without any row.
    """
    length_B = mask_BL.sum(dim=1)
    lengths = length_B.tolist()
    width = max([1, *lengths])
    starts, lines = first_places(lengths, width=width)
    start_B1 = torch.tensor(starts, dtype=torch.int64, device=ids_BL.device).unsqueeze(1)
    position_BL = mask_BL.long().cumsum(dim=1) - 1
    place_BL = torch.where(mask_BL, start_B1 + position_BL, -1)
    place_N = place_BL[mask_BL]
    ids_F = ids_BL.new_zeros(lines * width)
    position_F = torch.zeros_like(ids_F)
    ids_F[place_N] = ids_BL[mask_BL]
    position_F[place_N] = position_BL[mask_BL]
    return Packed(ids_RW=ids_F.view(lines, width), position_RW=position_F.view(lines, width), place_BL=place_BL)


def first_places(lengths: Sequence[int], *, width: int) -> tuple[list[int], int]:
    """Where each row begins in the flattened lines, and how many lines there are (at least 1).

    Best fit, longest rows first (at most 11/9 of the fewest lines possible, and one more): each row goes where it
    leaves the least room. No row is longer than ``width``.
    """
    starts = [0] * len(lengths)
    room: list[tuple[int, int]] = []  # (free places, line), sorted
    lines = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        need = lengths[row]
        assert need <= width, f"a row of {need} tokens in lines of {width}"
        at = bisect.bisect_left(room, (need, -1))
        if at < len(room):
            free, line = room.pop(at)
        else:
            free, line = width, lines
            lines += 1
        starts[row] = line * width + width - free
        bisect.insort(room, (free - need, line))
    return starts, max(lines, 1)

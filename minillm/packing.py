"""Rows of different lengths laid end to end in lines of one length, so that a forward computes almost no padding.

Most transformers models take such lines as they are: where positions start again at 0 a new sequence begins, and no
token attends across the border. Others (OPT) need a mask that says so. The place of every token is kept, so what a
forward gives comes back row by row.

Legend: B rows, L their padded length, R lines, W the length of a line, H hidden width, N tokens. A *place* is one
position of a line: what a forward computes, whether a token lies there or not.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WIDER = 1.5
"""How much longer than the longest row a line may be."""
WIDTHS = 8
"""How many widths beyond the longest row's are tried."""
SURE_WIDTH = 512
"""Lines grow beyond the longest row up to here only, and never beyond the model's positions: a few architectures
(GPT-Neo, the first GPT) keep a causal mask of just as many tokens."""
ATTENTION_WIDTHS = 6
"""Attention costs as much as the rest of a layer in lines of this many hidden widths, counted in multiplications."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """What decides how wide a line may be for a model."""

    hidden: int
    """Its hidden width: the narrower it is, the more of its work is attention, which grows with the line."""
    positions: int | None = None
    """The longest sequence it has positions for; None where there is no limit."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Where each row begins in the flattened lines."""

    starts: list[int]
    count: int
    width: int

    @property
    def places(self) -> int:
        """What a forward over them computes."""
        return self.count * self.width


def pack(ids_BL: Tensor, mask_BL: Tensor, *, reads: Reads) -> Packed:
    """The real tokens of each row side by side in lines, as ``lay_out`` says.

    Padding may be on either side. Rows of 5, 2 and 3 tokens give two lines of 5: the first row, and the other two. At
    least one line, one token long, even without any row.
    """
    lines = lay_out(mask_BL.sum(dim=1).tolist(), reads=reads)
    start_B1 = torch.tensor(lines.starts, dtype=torch.int64, device=ids_BL.device).unsqueeze(1)
    position_BL = mask_BL.long().cumsum(dim=1) - 1
    place_BL = torch.where(mask_BL, start_B1 + position_BL, -1)
    place_N = place_BL[mask_BL]
    ids_F = ids_BL.new_zeros(lines.places)
    position_F = torch.zeros_like(ids_F)
    ids_F[place_N] = ids_BL[mask_BL]
    position_F[place_N] = position_BL[mask_BL]
    shape = (lines.count, lines.width)
    return Packed(ids_RW=ids_F.view(shape), position_RW=position_F.view(shape), place_BL=place_BL)


def lay_out(lengths: Sequence[int], *, reads: Reads) -> Lines:
    """Rows of these lengths in lines of the width that costs least: the longest row's, or up to ``WIDER`` times that.

    Wider lines leave fewer places over, since more rows may share one, and cost more attention at each place, which
    matters the more the narrower the model is. Never
    more places than at the longest row's width.
    """
    longest = max([1, *lengths])
    widest = max(longest, min(int(WIDER * longest), SURE_WIDTH, reads.positions or SURE_WIDTH))
    widths = sorted({longest + (widest - longest) * step // WIDTHS for step in range(WIDTHS + 1)})
    found = []
    for width in widths:
        starts, count = first_places(lengths, width=width)
        found.append(Lines(starts=starts, count=count, width=width))
    return min(found, key=lambda lines: lines.places * (ATTENTION_WIDTHS * reads.hidden + lines.width))


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

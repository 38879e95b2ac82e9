"""Reading while writing: the page that a decode loop fills, and how far each model has read the rows on it.

Legend: B rows, P prompt positions, T response positions, L = P + longest allowed response, R rows of one reading (some
may be finished), N rows that were unfinished at the last look, S newly read positions, H hidden width, V real ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.types import PromptBatch, Stop

_SHED_SHARE = 4
"""Rows that need no more reading leave a cache once they are 1/4 of it: each compaction copies the whole cache."""


class Reader(Protocol):
    """A model as the decode loop sees it. The cache is its own affair: it is handed back as it was returned."""

    @property
    def device(self) -> torch.device: ...

    @property
    def lockstep(self) -> bool:
        """True when every rank must make the same calls, as with sharded weights."""

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Hidden states [B, S, H] of S more tokens and the longer cache.

        ``mask_BL`` (bool) covers past and new positions; position ids are its running count, less one.
        """

    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states [B, L, H] of whole rows, 0 off the mask, with no cache to go on from."""

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] over real ids, before temperature, fp32 (float64 if the hidden states are)."""

    def select_rows(self, cache: Any, index: Tensor) -> Any:
        """The cache with only these rows, in this order. The old cache is not used again."""


class Piece(NamedTuple):
    """A value for each of some rows, from response position ``start`` on."""

    rows_R: Tensor
    start: int
    value_RSW: Tensor


class Asked(NamedTuple):
    """The next-token logits of the rows of a reading that were unfinished at its last look, in ascending order."""

    rows_N: Tensor
    logits_NV: Tensor


@dataclass(slots=True, eq=False)
class Page:
    """Prompts and what has been written after them. Positions are absolute: response token t is at P + t."""

    prompt: int
    ids_BL: Tensor
    attend_BL: Tensor
    """True on prompt tokens and on sampled tokens."""
    alive_B: Tensor
    ended_B: Tensor
    """True where the last token was an EOS."""
    length_B: Tensor
    drew_BT: Tensor
    logq_BT: Tensor
    broken_B: Tensor
    """True where a token had to be drawn from logits that are no numbers: told at the end, since other ranks wait."""
    looks: int = 0
    """Looks so far at which rows have ended; between two of them more rows may be written to than are unfinished."""

    @classmethod
    def open(cls, prompts: PromptBatch, *, longest: int, pad_id: int, device: torch.device) -> Page:
        ids_BP, mask_BP = prompts.ids_BP.to(device), prompts.mask_BP.to(device)
        rows = len(prompts.uid_B)
        return cls(
            prompt=ids_BP.shape[1],
            ids_BL=torch.cat([ids_BP.long(), ids_BP.new_full((rows, longest), pad_id, dtype=torch.int64)], dim=1),
            attend_BL=torch.cat([mask_BP.bool(), mask_BP.new_zeros((rows, longest), dtype=torch.bool)], dim=1),
            alive_B=torch.ones(rows, dtype=torch.bool, device=device),
            ended_B=torch.zeros(rows, dtype=torch.bool, device=device),
            length_B=torch.zeros(rows, dtype=torch.int64, device=device),
            drew_BT=torch.zeros(rows, longest, dtype=torch.bool, device=device),
            logq_BT=torch.zeros(rows, longest, dtype=torch.float64, device=device),
            broken_B=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    @property
    def device(self) -> torch.device:
        return self.ids_BL.device

    def look(self) -> bool:
        """Whether any row is unfinished; readings then look too, each when it is next asked."""
        self.looks += 1
        return bool(self.alive_B.any())

    def write(
        self, rows_N: Tensor, t: int, *, ids_N: Tensor, drawable_N: Tensor, logq_N: Tensor, eos_E: Tensor
    ) -> None:
        """Adds response token ``t`` to the unfinished of these rows; an EOS is written like any other token, and ends
        its row."""
        alive_N = self.alive_B[rows_N]
        self.broken_B[rows_N] |= alive_N & ~drawable_N
        ended_N = torch.isin(ids_N, eos_E)
        at = self.prompt + t
        self.ids_BL[rows_N, at] = torch.where(alive_N, ids_N, self.ids_BL[rows_N, at])
        self.attend_BL[rows_N, at] = alive_N
        self.logq_BT[rows_N, t] = torch.where(alive_N, logq_N, 0.0)
        self.length_B[rows_N] += alive_N
        self.ended_B[rows_N] |= alive_N & ended_N
        self.alive_B[rows_N] = alive_N & ~ended_N

    def needed_R(self, rows_R: Tensor) -> Tensor:
        """How many positions of each row must be read: nothing follows a finished row's last token, so all but that."""
        return self.prompt + self.length_B[rows_R] - (~self.alive_B[rows_R]).long()

    def mask_BT(self) -> Tensor:
        """True on sampled tokens, from lengths; as wide as the longest response, at least 1."""
        width = max([1, *self.length_B.tolist()])
        return torch.arange(width, device=self.device) < self.length_B[:, None]

    def past(self, rows_N: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Ids [N, P + t] of these rows before response token ``t``, and where they are no padding."""
        return self.ids_BL[rows_N, : self.prompt + t], self.attend_BL[rows_N, : self.prompt + t]

    def stops(self) -> tuple[Stop, ...]:
        """Why each row ended: EOS if its last token is one, even where the limit was reached with it."""
        rows = zip(self.ended_B.tolist(), self.length_B.tolist(), strict=True)
        return tuple(Stop.LENGTH if not ended else Stop.EMPTY if length == 1 else Stop.EOS for ended, length in rows)


@dataclass(slots=True, eq=False, kw_only=True)
class Reading:
    """One reader's progress over some rows of the page: the rows in its cache, and up to where it has read them."""

    reader: Reader
    page: Page
    rows_R: Tensor
    keep: bool
    """Whether the hidden states from which response tokens are predicted are wanted afterwards."""
    drop: bool
    heads_T: list[bool] = field(default_factory=list)
    """Where the coin of these rows falls on this reader, if it is the teacher's."""
    read: int = 0
    forwards: int = 0
    cache: Any = None
    pieces: list[Piece] = field(default_factory=list)
    zero_11H: Tensor | None = None
    zero_1V: Tensor | None = None
    looks: int = 0
    live_N: Tensor | None = None
    """Which of ``rows_R`` were unfinished at the last look; a new look is taken after one of the page's."""

    def next_logits(self, stop: int) -> Asked | None:
        """Logits of the token at position ``stop`` for rows that were unfinished at the last look; None without one, in
        lockstep after a dummy."""
        if self.live_N is None or self.looks < self.page.looks:
            self._shed(least_share=_SHED_SHARE)
            self.live_N = self.page.alive_B[self.rows_R].nonzero().squeeze(1)
            self.looks = self.page.looks
        if not self.live_N.numel():
            if self.reader.lockstep:
                self.idle_logits()
            return None
        last_RH = self._advance(stop)
        return Asked(self.rows_R[self.live_N], self._logits(last_RH[self.live_N.to(last_RH.device)]))

    def finish(self) -> None:
        """Reads what is still unread of any row, in one forward. In lockstep it always costs one."""
        # Coins are the same on all ranks, so all ranks read whole rows here or none does.
        whole = not any(self.heads_T)
        if bool((self.page.needed_R(self.rows_R) > self.read).any()):
            self._shed(least_share=self.rows_R.numel())
            self._advance(int(self.page.needed_R(self.rows_R).max()), whole=whole)
        elif self.reader.lockstep:
            self._idle(whole=whole)

    def zero(self) -> Tensor:
        """A hidden state of zeros [1, 1, H]."""
        if self.zero_11H is None:  # no row told the width; in lockstep a dummy has, unless no rank had a row
            self._idle()
        assert self.zero_11H is not None
        return self.zero_11H

    def zero_logits(self) -> Tensor:
        """Logits of zeros [1, V], found as ``zero`` is."""
        if self.zero_1V is None:
            self.idle_logits()
        assert self.zero_1V is not None
        return self.zero_1V

    def idle_logits(self) -> None:
        """The calls of ``next_logits`` on a rank that has no row for them."""
        self._logits(self._idle()[:, 0])

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        logits_NV = self.reader.logits(hidden_NH).to(self.page.device)
        if self.zero_1V is None:
            self.zero_1V = torch.zeros_like(logits_NV[:1])
        return logits_NV

    def _idle(self, *, whole: bool = False) -> Tensor:
        """The call of ``_advance`` on a rank that has no row for it."""
        ids_11 = torch.zeros(1, 1, dtype=torch.int64, device=self.reader.device)
        if whole:
            return self._whole(ids_11, ids_11 == 0)
        hidden_11H, _ = self.reader.extend(ids_11, ids_11 == 0, None)
        return self._counted(hidden_11H)

    def _advance(self, stop: int, *, whole: bool = False) -> Tensor:
        """Reads positions ``read`` .. ``stop`` - 1 of the present rows in one forward; the last one's states [R, H].

        ``whole``: nothing was read before them and nothing will be after them.
        """
        assert stop > self.read, (stop, self.read)
        ids_RS = self.page.ids_BL[self.rows_R, self.read : stop].to(self.reader.device)
        mask_RL = self.page.attend_BL[self.rows_R, :stop].to(self.reader.device)
        hidden_RSH = self._whole(ids_RS, mask_RL) if whole else self._extend(ids_RS, mask_RL)
        if self.keep:
            # The state at P - 1 predicts the first response token. A copy, or the prompt's states would stay in memory.
            first = max(self.read, self.page.prompt - 1)
            kept_RSH = hidden_RSH[:, first - self.read :].to(self.page.device, copy=first > self.read)
            self.pieces.append(Piece(self.rows_R, first - (self.page.prompt - 1), kept_RSH))
        self.read = stop
        return hidden_RSH[:, -1]

    def _extend(self, ids_RS: Tensor, mask_RL: Tensor) -> Tensor:
        hidden_RSH, self.cache = self.reader.extend(ids_RS, mask_RL, self.cache)
        return self._counted(hidden_RSH)

    def _whole(self, ids_RL: Tensor, mask_RL: Tensor) -> Tensor:
        return self._counted(self.reader.read(ids_RL, mask_RL))

    def _counted(self, hidden_RSH: Tensor) -> Tensor:
        self.forwards += 1
        if self.zero_11H is None:
            self.zero_11H = hidden_RSH.new_zeros(1, 1, hidden_RSH.shape[2]).to(self.page.device)
        return hidden_RSH

    def _shed(self, *, least_share: int) -> None:
        """Takes rows that have been read to their end out of the cache, if at least 1 in ``least_share`` are such."""
        if not self.drop:
            return
        index_R = (self.page.needed_R(self.rows_R) > self.read).nonzero().squeeze(1)
        spare = self.rows_R.numel() - index_R.numel()
        if spare and spare * least_share >= self.rows_R.numel():
            self.rows_R = self.rows_R[index_R]
            if self.cache is not None:
                self.cache = self.reader.select_rows(self.cache, index_R.to(self.reader.device))

"""The decode loop: responses drawn from a student, or from a student mixed with its teacher, one keyed draw a token.

*Mixing* (design D4). A draw from a p + (1 - a) q is a coin and a draw: heads, from the teacher p, tails, from the
student q. The rows of a coin group share the coin of a position, so the teacher runs only at a group's heads, over all
tokens since its last read in one cached forward, and once more at the end: heads + 1 forwards a group. Its hidden
states at every position are there when the rollout ends; no scoring pass is needed.

*Lockstep.* A reader whose weights are sharded over ranks works only if all ranks make the same calls. They do, because
what is called follows from facts that all ranks share: the coins (keyed by group and position, not by row) and the
number of steps (``anyone`` answers the same everywhere). Per step that calls one of them: ``anyone``; student
``extend``, ``logits``; then, for each coin group that has heads, in order, teacher ``extend``, ``logits``. After
the last step, for each group: teacher ``extend``, or ``read`` where the group's coins never fell on heads, as without
mixing. A rank that has no row for a call makes it with a dummy of one row and one token, which counts as a forward.
``select_rows`` is local and free.

Legend: B rows, P prompt positions, T response positions, L = P + longest allowed response, R rows of one reading (some
may be finished), N unfinished rows, S newly read positions, H hidden width, V real ids, G coin groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from minillm.errors import ShapeMismatch
from minillm.sampling import (
    coin_group,
    coin_keys,
    draw,
    log_probs_of,
    pack_support,
    restrict,
    row_keys,
    support_mask,
    uniforms,
)
from minillm.types import Decoding, DrawKey, PromptBatch, Purpose, Rollout, Stop

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


class _Piece(NamedTuple):
    """A value for each of some rows, from response position ``start`` on."""

    rows_R: Tensor
    start: int
    value_RSW: Tensor


class _Asked(NamedTuple):
    """The next-token logits of the unfinished rows of a reading, in ascending order of row."""

    rows_N: Tensor
    logits_NV: Tensor


@dataclass(slots=True, eq=False)
class _Page:
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

    @classmethod
    def open(cls, prompts: PromptBatch, *, longest: int, pad_id: int, device: torch.device) -> _Page:
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
        )

    @property
    def device(self) -> torch.device:
        return self.ids_BL.device

    def write(self, rows_N: Tensor, t: int, *, ids_N: Tensor, logq_N: Tensor, eos_E: Tensor) -> None:
        """Adds response token ``t`` to these rows; an EOS is written like any other token, and ends its row."""
        ended_N = torch.isin(ids_N, eos_E)
        self.ids_BL[rows_N, self.prompt + t] = ids_N
        self.attend_BL[rows_N, self.prompt + t] = True
        self.logq_BT[rows_N, t] = logq_N
        self.length_B[rows_N] = t + 1
        self.ended_B[rows_N] = ended_N
        self.alive_B[rows_N] = ~ended_N

    def needed_R(self, rows_R: Tensor) -> Tensor:
        """How many positions of each row must be read: nothing follows a finished row's last token, so all but that."""
        return self.prompt + self.length_B[rows_R] - (~self.alive_B[rows_R]).long()

    def mask_BT(self) -> Tensor:
        """True on sampled tokens, from lengths; as wide as the longest response, at least 1."""
        width = max([1, *self.length_B.tolist()])
        return torch.arange(width, device=self.device) < self.length_B[:, None]

    def stops(self) -> tuple[Stop, ...]:
        """Why each row ended: EOS if its last token is one, even where the limit was reached with it."""
        rows = zip(self.ended_B.tolist(), self.length_B.tolist(), strict=True)
        return tuple(Stop.LENGTH if not ended else Stop.EMPTY if length == 1 else Stop.EOS for ended, length in rows)


@dataclass(slots=True, eq=False, kw_only=True)
class _Reading:
    """One reader's progress over some rows of the page: the rows in its cache, and up to where it has read them."""

    reader: Reader
    page: _Page
    rows_R: Tensor
    keep: bool
    """Whether the hidden states from which response tokens are predicted are wanted afterwards."""
    drop: bool
    heads_T: list[bool] = field(default_factory=list)
    """Where the coin of these rows falls on this reader, if it is the teacher's."""
    read: int = 0
    forwards: int = 0
    cache: Any = None
    pieces: list[_Piece] = field(default_factory=list)
    zero_11H: Tensor | None = None
    zero_1V: Tensor | None = None

    def next_logits(self, stop: int) -> _Asked | None:
        """Logits of the token at position ``stop`` for unfinished rows; None without one, in lockstep after a dummy."""
        if not bool(self.page.alive_B[self.rows_R].any()):
            if self.reader.lockstep:
                self.idle_logits()
            return None
        last_RH = self._advance(stop)
        live_R = self.page.alive_B[self.rows_R]
        return _Asked(self.rows_R[live_R], self._logits(last_RH[live_R.to(last_RH.device)]))

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
        self._shed(least_share=_SHED_SHARE)
        assert stop > self.read, (stop, self.read)
        ids_RS = self.page.ids_BL[self.rows_R, self.read : stop].to(self.reader.device)
        mask_RL = self.page.attend_BL[self.rows_R, :stop].to(self.reader.device)
        hidden_RSH = self._whole(ids_RS, mask_RL) if whole else self._extend(ids_RS, mask_RL)
        if self.keep:
            # The state at P - 1 predicts the first response token. A copy, or the prompt's states would stay in memory.
            first = max(self.read, self.page.prompt - 1)
            kept_RSH = hidden_RSH[:, first - self.read :].to(self.page.device, copy=first > self.read)
            self.pieces.append(_Piece(self.rows_R, first - (self.page.prompt - 1), kept_RSH))
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


@torch.no_grad()
def roll_out(
    prompts: PromptBatch,
    *,
    student: Reader,
    decoding: Decoding,
    key: DrawKey,
    eos_ids: tuple[int, ...],
    pad_id: int,
    teacher: Reader | None = None,
    teacher_mix: float = 0.0,
    coin_groups: int = 1,
    keep_hidden: bool = False,
    drop_finished: bool = True,
    anyone: Callable[[bool], bool] = bool,
    policy_step: int = 0,
) -> Rollout:
    """Responses to ``prompts`` drawn from (1 - teacher_mix) student + teacher_mix teacher, on the student's device.

    Both distributions are tempered; the teacher's is restricted to the ids that top-k and top-p keep of the student's
    and renormalised there. A token depends on models, prompt and key, never on the batch around it (up to rounding).
    A row ends at its first sampled id of ``eos_ids``, which is kept; ids of a prompt end nothing.

    With a teacher ``teacher_hidden_BTH`` is complete, from at most heads + 1 forwards a coin group; at ``teacher_mix``
    0 from one forward after sampling, and the ids are those of a rollout without a teacher. ``anyone`` tells whether
    any rank has unfinished rows: it is asked before each token for which a reader in lockstep is called, and all ranks
    must hear the same answer. T is the longest response of this rank, at least 1; B may be 0. Off the mask
    ``support_BTC`` keeps every id. Raises ``NonFinite`` where logits are NaN, ``ShapeMismatch`` where the vocabularies
    differ.
    """
    assert teacher is not None or teacher_mix == 0, "mixing needs a teacher"
    assert 0 <= teacher_mix <= 1 and decoding.temperature > 0, (teacher_mix, decoding.temperature)
    assert key.purpose is not Purpose.COIN, "a token must not share its random number with a coin"
    page = _Page.open(prompts, longest=decoding.max_new_tokens, pad_id=pad_id, device=student.device)
    every_B = page.alive_B.nonzero().squeeze(1)
    own = _Reading(reader=student, page=page, rows_R=every_B, keep=keep_hidden, drop=drop_finished)
    guides: list[_Reading] = []
    if teacher is not None:
        heads_GT = _toss(key, teacher_mix=teacher_mix, coin_groups=coin_groups, positions=decoding.max_new_tokens)
        guides = _open_guides(teacher, page=page, uids=prompts.uid_B, heads_GT=heads_GT, drop=drop_finished)
    keys_B = row_keys(key, prompts.uid_B, prompts.sample_B, device=page.device)
    uniform_BT = uniforms(keys_B[:, None], torch.arange(decoding.max_new_tokens, device=page.device))
    eos_E = torch.tensor(eos_ids, dtype=torch.int64, device=page.device)
    support = _write_responses(
        page, own=own, guides=guides, uniform_BT=uniform_BT, decoding=decoding, eos_E=eos_E, anyone=anyone
    )
    for guide in guides:
        guide.finish()
    _, width = (mask_BT := page.mask_BT()).shape
    return Rollout(
        prompts=prompts,
        response_BT=page.ids_BL[:, page.prompt : page.prompt + width].clone(),
        mask_BT=mask_BT,
        stop_B=page.stops(),
        teacher_drew_BT=page.drew_BT[:, :width].clone(),
        logq_BT=page.logq_BT[:, :width].to(own.zero_logits().dtype, copy=True),
        student_hidden_BTH=_merge_hidden([own], mask_BT) if keep_hidden else None,
        teacher_hidden_BTH=_merge_hidden(guides, mask_BT) if guides else None,
        support_BTC=_lay_out_support(support, mask_BT=mask_BT, any_1V=own.zero_logits(), decoding=decoding),
        policy_step=policy_step,
        teacher_forwards=sum(guide.forwards for guide in guides),
    )


def _toss(key: DrawKey, *, teacher_mix: float, coin_groups: int, positions: int) -> list[list[bool]]:
    """Whether each group has heads at each position, [G][T]: known before sampling, and the same on all ranks.

    Without mixing there is nothing to toss: one group that never has heads, so that it is read once, at the end.
    """
    if teacher_mix == 0:
        return [[False] * positions]
    coin_G1 = coin_keys(key, range(coin_groups))[:, None]
    heads_GT: list[list[bool]] = (uniforms(coin_G1, torch.arange(positions)) < teacher_mix).tolist()
    return heads_GT


def _open_guides(
    teacher: Reader, *, page: _Page, uids: tuple[str, ...], heads_GT: list[list[bool]], drop: bool
) -> list[_Reading]:
    """The teacher's readings, one for each coin group, whether or not this rank has rows of it."""
    group_B = torch.tensor([coin_group(uid, len(heads_GT)) for uid in uids], dtype=torch.int64, device=page.device)
    rows_G = [(group_B == group).nonzero().squeeze(1) for group in range(len(heads_GT))]
    return [
        _Reading(reader=teacher, page=page, rows_R=rows_R, heads_T=heads_T, keep=True, drop=drop)
        for rows_R, heads_T in zip(rows_G, heads_GT, strict=True)
    ]


def _write_responses(
    page: _Page,
    *,
    own: _Reading,
    guides: list[_Reading],
    uniform_BT: Tensor,
    decoding: Decoding,
    eos_E: Tensor,
    anyone: Callable[[bool], bool],
) -> list[_Piece]:
    """Fills the page token by token until no rank has unfinished rows; the packed support of each state, if any."""
    support: list[_Piece] = []
    for t in range(decoding.max_new_tokens):
        alive = bool(page.alive_B.any())
        # Whether another rank waits here is a matter of readers and coins: the same answer everywhere.
        met = own.reader.lockstep or any(guide.reader.lockstep and guide.heads_T[t] for guide in guides)
        if met and not anyone(alive):
            assert not alive, "anyone() denied this rank's unfinished rows"
            break
        if not met and not alive:
            continue
        asked = own.next_logits(page.prompt + t)
        answers = [guide.next_logits(page.prompt + t) for guide in guides if guide.heads_T[t]]
        if asked is None:
            continue
        taught = [answer for answer in answers if answer is not None]
        student_NV, chosen_NV, support_NV = _mix(asked, taught, decoding=decoding)
        ids_N = draw(chosen_NV, uniform_BT[asked.rows_N, t])
        for answer in taught:
            page.drew_BT[answer.rows_N, t] = True
        page.write(asked.rows_N, t, ids_N=ids_N, logq_N=log_probs_of(student_NV, ids_N), eos_E=eos_E)
        if support_NV is not None:
            support.append(_Piece(asked.rows_N, t, pack_support(support_NV)[:, None]))
    page.alive_B.fill_(False)  # those that reached the limit are finished too
    return support


def _mix(asked: _Asked, taught: list[_Asked], *, decoding: Decoding) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student's tempered, truncated logits; those to draw from, the teacher's at its rows; the student's support."""
    tempered_NV = asked.logits_NV / decoding.temperature
    support_NV = support_mask(tempered_NV, top_k=decoding.top_k, top_p=decoding.top_p)
    student_NV = restrict(tempered_NV, support_NV)
    chosen_NV = student_NV
    for rows_M, logits_MV in taught:
        if logits_MV.shape[1] != student_NV.shape[1]:
            raise ShapeMismatch("teacher's logits", tuple(logits_MV.shape), (len(rows_M), student_NV.shape[1]))
        at_M = torch.searchsorted(asked.rows_N, rows_M)  # every unfinished row of the group is among the student's
        support_MV = None if support_NV is None else support_NV[at_M]
        teacher_MV = restrict(logits_MV / decoding.temperature, support_MV)
        chosen_NV = chosen_NV.index_copy(0, at_M, teacher_MV.to(chosen_NV.dtype))
    return student_NV, chosen_NV, support_NV


def _lay_out(pieces: list[_Piece], *, mask_BT: Tensor, blank_11W: Tensor) -> Tensor:
    """Pieces side by side as one [B, T, W]; ``blank_11W`` off the mask and where there is no piece."""
    rows, width = mask_BT.shape
    whole_BTW = blank_11W.expand(rows, width, -1).clone()
    for rows_R, start, value_RSW in pieces:
        stop = min(width, start + value_RSW.shape[1])
        whole_BTW[rows_R, start:stop] = value_RSW[:, : stop - start]
    return torch.where(mask_BT[:, :, None], whole_BTW, blank_11W)


def _merge_hidden(readings: list[_Reading], mask_BT: Tensor) -> Tensor:
    """The kept hidden states [B, T, H] of all rows, 0 off the mask; a group without a row here adds nothing."""
    held = [reading for reading in readings if reading.pieces] or readings[:1]
    pieces = [piece for reading in held for piece in reading.pieces]
    return _lay_out(pieces, mask_BT=mask_BT, blank_11W=held[0].zero())


def _lay_out_support(support: list[_Piece], *, mask_BT: Tensor, any_1V: Tensor, decoding: Decoding) -> Tensor | None:
    """Packed support [B, T, C]; None where these settings keep all of this many ids."""
    if support_mask(any_1V, top_k=decoding.top_k, top_p=decoding.top_p) is None:
        return None
    all_11C = pack_support(torch.ones_like(any_1V, dtype=torch.bool))[None]
    return _lay_out(support, mask_BT=mask_BT, blank_11W=all_11C)

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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.errors import NonFinite, ShapeMismatch
from minillm.reading import Asked, Page, Piece, Reader, Reading
from minillm.repetition import Held, held_back, penalised
from minillm.sampling import (
    coin_group,
    coin_keys,
    draw_unchecked,
    log_probs_of,
    pack_support,
    restrict,
    row_keys,
    support_mask,
    uniforms,
)
from minillm.types import Decoding, DrawKey, PromptBatch, Purpose, Rollout

_LOOK_EVERY = {"cuda": 8}
"""Tokens between two looks at which rows have ended. A look waits for the device, which costs nothing on a CPU (1)."""
_NOTHING = Held()


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
    look_every: int = 0,
    anyone: Callable[[bool], bool] = bool,
    policy_step: int = 0,
) -> Rollout:
    """Responses to ``prompts`` drawn from (1 - teacher_mix) student + teacher_mix teacher, on the student's device.

    Logits of both models are penalised for repetition, then tempered; the teacher's are restricted to the ids that
    n-gram ban, top-k and top-p keep of the student's, and renormalised there: in this order, which is that of
    transformers' ``generate`` (``repetition`` names two differences). A ban that would leave no id is lifted. A token
    depends on models, prompt and key, never on the batch around it (up to rounding). A row ends at its first sampled
    id of ``eos_ids``, which is kept; ids of a prompt end nothing.

    With a teacher ``teacher_hidden_BTH`` is complete, from at most heads + 1 forwards a coin group; at ``teacher_mix``
    0 from one forward after sampling, and the ids are those of a rollout without a teacher. ``anyone`` tells whether
    any rank has unfinished rows: it is asked before each token for which a reader in lockstep is called, and all ranks
    must hear the same answer. ``look_every`` tokens lie between two looks at which rows have ended (0: 8 on a GPU,
    where a look waits for the device, else 1); it changes no token. T is the longest response of this rank, at least
    1; B may be 0. Off the mask ``support_BTC`` keeps every id. Raises ``NonFinite``, after all
    calls, where logits are NaN; ``ShapeMismatch`` where the vocabularies differ.
    """
    assert teacher is not None or teacher_mix == 0, "mixing needs a teacher"
    assert 0 <= teacher_mix <= 1 and decoding.temperature > 0, (teacher_mix, decoding.temperature)
    assert key.purpose is not Purpose.COIN, "a token must not share its random number with a coin"
    page = Page.open(prompts, longest=decoding.max_new_tokens, pad_id=pad_id, device=student.device)
    every_B = page.alive_B.nonzero().squeeze(1)
    own = Reading(reader=student, page=page, rows_R=every_B, keep=keep_hidden, drop=drop_finished)
    guides: list[Reading] = []
    if teacher is not None:
        heads_GT = toss(key, teacher_mix=teacher_mix, coin_groups=coin_groups, positions=decoding.max_new_tokens)
        guides = _open_guides(teacher, page=page, uids=prompts.uid_B, heads_GT=heads_GT, drop=drop_finished)
    keys_B = row_keys(key, prompts.uid_B, prompts.sample_B, device=page.device)
    uniform_BT = uniforms(keys_B[:, None], torch.arange(decoding.max_new_tokens, device=page.device))
    eos_E = torch.tensor(eos_ids, dtype=torch.int64, device=page.device)
    support = _write_responses(
        page, own=own, guides=guides, uniform_BT=uniform_BT, decoding=decoding, eos_E=eos_E, anyone=anyone,
        look_every=look_every or _LOOK_EVERY.get(page.device.type, 1),
    )  # fmt: skip
    for guide in guides:
        guide.finish()
    _require_drawn(page)
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
        repetition_penalty=decoding.repetition_penalty,
    )


def toss(key: DrawKey, *, teacher_mix: float, coin_groups: int, positions: int) -> list[list[bool]]:
    """Whether each group has heads at each position, [G][T]: known before sampling, and the same on all ranks.

    Without mixing there is nothing to toss: one group that never has heads, so that it is read once, at the end.
    """
    if teacher_mix == 0:
        return [[False] * positions]
    coin_G1 = coin_keys(key, range(coin_groups))[:, None]
    heads_GT: list[list[bool]] = (uniforms(coin_G1, torch.arange(positions)) < teacher_mix).tolist()
    return heads_GT


def rows_of_groups(uids: Sequence[str], coin_groups: int, *, device: torch.device | str = "cpu") -> list[Tensor]:
    """The rows of each coin group, in ascending order; some groups may have none."""
    group_B = torch.tensor([coin_group(uid, coin_groups) for uid in uids], dtype=torch.int64, device=device)
    return [(group_B == group).nonzero().squeeze(1) for group in range(coin_groups)]


def _open_guides(
    teacher: Reader, *, page: Page, uids: tuple[str, ...], heads_GT: list[list[bool]], drop: bool
) -> list[Reading]:
    """The teacher's readings, one for each coin group, whether or not this rank has rows of it."""
    rows_G = rows_of_groups(uids, len(heads_GT), device=page.device)
    return [
        Reading(reader=teacher, page=page, rows_R=rows_R, heads_T=heads_T, keep=True, drop=drop)
        for rows_R, heads_T in zip(rows_G, heads_GT, strict=True)
    ]


def _write_responses(
    page: Page,
    *,
    own: Reading,
    guides: list[Reading],
    uniform_BT: Tensor,
    decoding: Decoding,
    eos_E: Tensor,
    anyone: Callable[[bool], bool],
    look_every: int,
) -> list[Piece]:
    """Fills the page token by token until no rank has unfinished rows; the packed support of each state, if any."""
    support: list[Piece] = []
    alive = True
    for t in range(decoding.max_new_tokens):
        if alive and t % look_every == 0:
            alive = page.look()
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
        held = _NOTHING
        if decoding.looks_back:
            held = held_back(
                *page.past(asked.rows_N, t), vocabulary=asked.logits_NV.shape[1], eos_E=eos_E,
                ngram=decoding.no_repeat_ngram_size, penalty=decoding.repetition_penalty,
            )  # fmt: skip
        student_NV, chosen_NV, support_NV = _mix(asked, taught, decoding=decoding, held=held)
        ids_N, logq_N, drawable_N = draw_unchecked(chosen_NV, uniform_BT[asked.rows_N, t])
        if taught:  # at heads the id was not drawn from the student
            logq_N = log_probs_of(student_NV, ids_N)
        for answer in taught:
            page.drew_BT[answer.rows_N, t] = page.alive_B[answer.rows_N]
        page.write(asked.rows_N, t, ids_N=ids_N, drawable_N=drawable_N, logq_N=logq_N, eos_E=eos_E)
        if support_NV is not None:
            support.append(Piece(asked.rows_N, t, pack_support(support_NV)[:, None]))
    page.alive_B.fill_(False)  # those that reached the limit are finished too
    return support


def _require_drawn(page: Page) -> None:
    """Raise ``NonFinite`` where a token had to be drawn from logits that are no numbers."""
    if bool(page.broken_B.any()):
        raise NonFinite(
            f"logits of {int(page.broken_B.sum())} of {len(page.broken_B)} rows held NaN or +inf; wanted numbers or "
            "-inf.\n"
            "  no token can be drawn from them; look for an overflow (fp16?) or a diverged model"
        )


def _mix(
    asked: Asked, taught: list[Asked], *, decoding: Decoding, held: Held = _NOTHING
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Student's tempered, truncated logits; those to draw from, the teacher's at its rows; the student's support.

    ``held`` is what the rows' past holds back, of both models.
    """
    tempered_NV = penalised(asked.logits_NV, held.seen_NV, decoding.repetition_penalty) / decoding.temperature
    support_NV = support_mask(tempered_NV, top_k=decoding.top_k, top_p=decoding.top_p, banned_BV=held.banned_NV)
    student_NV = restrict(tempered_NV, support_NV)
    chosen_NV = student_NV
    for rows_M, logits_MV in taught:
        if logits_MV.shape[1] != student_NV.shape[1]:
            raise ShapeMismatch("teacher's logits", tuple(logits_MV.shape), (len(rows_M), student_NV.shape[1]))
        at_M = torch.searchsorted(asked.rows_N, rows_M)  # every unfinished row of the group is among the student's
        support_MV = None if support_NV is None else support_NV[at_M]
        seen_MV = None if held.seen_NV is None else held.seen_NV[at_M]
        teacher_MV = penalised(logits_MV, seen_MV, decoding.repetition_penalty) / decoding.temperature
        teacher_MV = restrict(teacher_MV, support_MV)
        chosen_NV = chosen_NV.index_copy(0, at_M, teacher_MV.to(chosen_NV.dtype))
    return student_NV, chosen_NV, support_NV


def _lay_out(pieces: list[Piece], *, mask_BT: Tensor, blank_11W: Tensor) -> Tensor:
    """Pieces side by side as one [B, T, W]; ``blank_11W`` off the mask and where there is no piece."""
    rows, width = mask_BT.shape
    whole_BTW = blank_11W.expand(rows, width, -1).clone()
    for rows_R, start, value_RSW in pieces:
        stop = min(width, start + value_RSW.shape[1])
        if stop <= start:  # read between the last token and the look that found it to be the last
            continue
        whole_BTW[rows_R, start:stop] = value_RSW[:, : stop - start]
    return torch.where(mask_BT[:, :, None], whole_BTW, blank_11W)


def _merge_hidden(readings: list[Reading], mask_BT: Tensor) -> Tensor:
    """The kept hidden states [B, T, H] of all rows, 0 off the mask; a group without a row here adds nothing."""
    held = [reading for reading in readings if reading.pieces] or readings[:1]
    pieces = [piece for reading in held for piece in reading.pieces]
    return _lay_out(pieces, mask_BT=mask_BT, blank_11W=held[0].zero())


def _lay_out_support(support: list[Piece], *, mask_BT: Tensor, any_1V: Tensor, decoding: Decoding) -> Tensor | None:
    """Packed support [B, T, C]; None where these settings keep all of this many ids."""
    keeps_all = support_mask(any_1V, top_k=decoding.top_k, top_p=decoding.top_p) is None
    if keeps_all and decoding.no_repeat_ngram_size == 0:
        return None
    all_11C = pack_support(torch.ones_like(any_1V, dtype=torch.bool))[None]
    return _lay_out(support, mask_BT=mask_BT, blank_11W=all_11C)

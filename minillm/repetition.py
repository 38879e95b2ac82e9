"""Repetition: ids that may not or should not come again, and which tokens of a response repeat what it said before.

Legend: N rows that are being written, L positions of prompt and response so far, W windows of n ids, V vocabulary ids,
B responses, T response positions.

``held_back`` follows transformers' ``RepetitionPenaltyLogitsProcessor`` and ``NoRepeatNGramLogitsProcessor``, and
``decode`` keeps the order of its ``generate``: penalty, n-gram ban, temperature, top-k, top-p. Two differences, both
on purpose. Padding is never part of a row: transformers compares pads too. And an EOS is never banned: with a chat
template the prompt itself holds "." before an EOS, and a response could then never end after a full stop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minillm.types import require_shape


class Held(NamedTuple):
    """What a row's past says about its next id; None where that is not asked."""

    seen_NV: Tensor | None = None
    """Ids that stand in the row: the repetition penalty acts on their logits."""
    banned_NV: Tensor | None = None
    """Ids that would complete an n-gram that stands in the row."""


def held_back(ids_NL: Tensor, real_NL: Tensor, *, vocabulary: int, ngram: int, penalty: float, eos_E: Tensor) -> Held:
    """What the past of rows that end at the last position says; of what is off (``ngram`` 0, ``penalty`` 1), nothing.

    ``real_NL`` is True on prompt and response, which must be one run up to the last position; of a row where they are
    not (one that has ended) the answer means nothing.
    """
    return Held(
        seen_NV=_marked(ids_NL, real_NL, vocabulary=vocabulary) if penalty != 1.0 else None,
        banned_NV=banned_ids(ids_NL, real_NL, vocabulary=vocabulary, ngram=ngram, eos_E=eos_E) if ngram > 0 else None,
    )


def banned_ids(ids_NL: Tensor, real_NL: Tensor, *, vocabulary: int, ngram: int, eos_E: Tensor) -> Tensor:
    """Ids that would complete an n-gram of ``ngram`` ids that stands in the row already, bool [N, V]; never an EOS."""
    rows, width = ids_NL.shape
    windows = width - ngram + 1
    if windows < 1:
        return torch.zeros(rows, vocabulary, dtype=torch.bool, device=ids_NL.device)
    # A row is one run, so a window is all real if its first id is, and then so are the last ids, which are fewer.
    same_NW = real_NL[:, :windows].clone()
    for place in range(ngram - 1):
        same_NW &= ids_NL[:, place : place + windows] == ids_NL[:, width - ngram + 1 + place, None]
    return _marked(ids_NL[:, ngram - 1 :], same_NW, vocabulary=vocabulary, never_E=eos_E)


def penalised(logits_NV: Tensor, seen_NV: Tensor | None, penalty: float) -> Tensor:
    """Logits before temperature, those of seen ids divided by ``penalty`` where positive and multiplied where negative
    (Keskar et al. 2019); the same tensor for None."""
    if seen_NV is None:
        return logits_NV
    return torch.where(seen_NV, torch.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty), logits_NV)


@torch.no_grad()
def repetition_rewards(response_BT: Tensor, mask_BT: Tensor, *, ngram: int) -> Tensor:
    """Where a token completes an n-gram that stands earlier in the same response, bool [B, T]; False off the mask.

    Only response tokens count, n-grams may overlap. The mask is that of a rollout: the first tokens of each row. A
    response repeats an n-gram, in the sense of ``text_measures.repetition_3``, where a row has any.
    """
    require_shape("mask of the responses", mask_BT, tuple(response_BT.shape))
    assert ngram >= 1, ngram
    rows, width = response_BT.shape
    id_BT = torch.where(mask_BT, response_BT, 0)
    # Equal numbers for equal n-grams: an n-gram is the one that is shorter by its last id, and that id.
    number_BT = id_BT
    for _ in range(ngram - 1):
        shorter_BT = torch.nn.functional.pad(number_BT, (1, 0))[:, :width]
        pair_BT = shorter_BT * (id_BT.amax() + 1 if id_BT.numel() else 1) + id_BT
        number_BT = torch.unique(pair_BT, return_inverse=True)[1].reshape(rows, width)
    at_T = torch.arange(width, device=mask_BT.device)
    number_BT = torch.where(mask_BT & (at_T >= ngram - 1), number_BT, -1 - at_T)  # no n-gram ends here: like no other
    # Of equal numbers a stable sort puts the earliest first; each of the others follows one that is equal.
    sorted_BT, order_BT = number_BT.sort(dim=1, stable=True)
    again_BT = torch.zeros_like(mask_BT)
    again_BT[:, 1:] = sorted_BT[:, 1:] == sorted_BT[:, :-1]
    return torch.zeros_like(mask_BT).scatter_(1, order_BT, again_BT)


def _marked(ids_NX: Tensor, wanted_NX: Tensor, *, vocabulary: int, never_E: Tensor | None = None) -> Tensor:
    """True at each wanted id of a row, [N, V]; never at some ids."""
    # A column to spare takes what is not wanted, and ids beyond the vocabulary.
    column_NX = torch.where(wanted_NX, ids_NX.clamp(max=vocabulary), vocabulary)
    found_NV = torch.zeros(len(ids_NX), vocabulary + 1, dtype=torch.bool, device=ids_NX.device)
    found_NV.scatter_(1, column_NX, True)
    if never_E is not None:
        found_NV.index_fill_(1, never_E.clamp(max=vocabulary), False)
    return found_NV[:, :vocabulary]

"""Two table models whose mixture can be listed, and whole rollouts of very many rollout indices at once.

Legend: V ids, T response positions, N rollout indices, R rows (each a rollout index and a uid).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import decode, sampling
from minillm.decode import roll_out
from minillm.types import Decoding, DrawKey, PromptBatch, Purpose, Rollout
from tests.readers import TableReader

V, T, EOS = 4, 3, 0
STUDENT, TEACHER = TableReader(vocabulary=V, depth=T, seed=0), TableReader(vocabulary=V, depth=T, seed=1)
KEY = DrawKey(seed=5, stage="minillm", purpose=Purpose.TOKEN, rollout=0)

Response = tuple[int, ...]
Drew = tuple[bool, ...]
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def enumerate_responses(share_of_teacher: Sequence[float]) -> dict[Response, float]:
    """Probability of each response, ended by EOS or as long as ``share_of_teacher``, which says how much of the teacher
    there is in the mixture at each position."""
    q_XV, p_XV = (reader.table_XV.softmax(-1) for reader in (STUDENT, TEACHER))
    cells: dict[Response, float] = {}
    open_prefixes: list[tuple[Response, int, float]] = [((), 0, 1.0)]
    while open_prefixes:
        prefix, node, mass = open_prefixes.pop()
        teachers = share_of_teacher[len(prefix)]
        for v, share in enumerate(((1 - teachers) * q_XV[node] + teachers * p_XV[node]).tolist()):
            response = (*prefix, v)
            if v == EOS or len(response) == len(share_of_teacher):
                cells[response] = mass * share
            else:
                open_prefixes.append((response, node * V + v + 1, mass * share))
    assert math.isclose(sum(cells.values()), 1.0)
    return cells


def p_value(found: Sequence[Hashable], chance_of: Mapping[Any, float]) -> float:
    """Of Pearson's chi-square; cells with fewer than 5 expected are put together. What cannot be is a ``KeyError``."""
    total, count = len(found), Counter(found)
    assert math.isclose(sum(chance_of.values()), 1.0)
    if strange := count.keys() - chance_of.keys():
        raise KeyError(strange)
    large = [cell for cell, chance in chance_of.items() if chance * total >= 5]
    pairs = [(count[cell], chance_of[cell] * total) for cell in large]
    rest = total - sum(want for _, want in pairs)
    if rest > 1e-6 * total:
        pairs.append((total - sum(got for got, _ in pairs), rest))
    statistic = sum((got - want) ** 2 / want for got, want in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Keys of rows that are each in a rollout of a known index, as ``roll_out`` would make them for that rollout."""

    row_R: Tensor
    coin_R: Tensor
    """The key of the row's coin group in its rollout."""


def keys_of(rollouts: range, uids: Sequence[str], *, coin_groups: int = 1) -> Keys:
    """Of every uid in every rollout, [N x uids], under each rollout's own key.

    Hashed as ``row_keys`` and ``coin_keys`` do it, to which a test holds it equal, but into one tensor: one for each of
    200,000 rollouts would take longer than all that is drawn with them.
    """
    groups = [str(sampling.coin_group(uid, coin_groups)) for uid in uids]
    rows = [_hash(KEY.purpose, n, uid) for n in rollouts for uid in uids]
    coins = [_hash(Purpose.COIN, n, group) for n in rollouts for group in groups]
    return Keys(row_R=torch.tensor(rows), coin_R=torch.tensor(coins))


def _hash(purpose: Purpose, rollout: int, name: str) -> int:
    return sampling._hash64(str(KEY.seed), KEY.stage, purpose.value, str(rollout), name, "0")


@contextmanager
def _a_rollout_for_each_row(keys: Keys) -> Iterator[None]:
    """``roll_out`` with row and coin keys of these, and one reading of the teacher for all rows whose coins fall alike.

    Replaced: where keys come from, and which rows are in one coin group (a reading for each of 200,000 rows would take
    minutes; rows with the same heads at all positions are, to the loop, a coin group). As it is: everything that comes
    of the keys, that is uniform numbers, coins, the loop, mixing, caches, draws and ends.
    """
    plain = decode._open_guides

    def together(teacher: Any, *, heads_GT: list[list[bool]], uids: tuple[str, ...], **more: Any) -> Any:
        patterns = sorted({tuple(heads_T) for heads_T in heads_GT})
        place = {heads_T: number for number, heads_T in enumerate(patterns)}
        group = {uid: place[tuple(heads_T)] for uid, heads_T in zip(uids, heads_GT, strict=True)}
        patch.setattr(decode, "coin_group", lambda uid, groups: group[uid])
        return plain(teacher, heads_GT=[list(heads_T) for heads_T in patterns], uids=uids, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "row_keys", lambda *_, **__: keys.row_R)
        patch.setattr(decode, "coin_keys", lambda *_: keys.coin_R)
        patch.setattr(decode, "_open_guides", together)
        yield


def roll_keyed(keys: Keys, alpha: float, *, longest: int = T, draw: Draw = sampling.draw_unchecked) -> Rollout:
    """One whole rollout of the library's loop in which every row has the keys of a rollout index of its own."""
    rows = len(keys.row_R)
    with pytest.MonkeyPatch.context() as patch, _a_rollout_for_each_row(keys):
        patch.setattr(decode, "draw_unchecked", draw)
        return roll([str(row) for row in range(rows)], alpha, coin_groups=rows, longest=longest)


def roll(
    uids: Sequence[str], alpha: float, *, coin_groups: int, longest: int = T, rollout: int = 0, **decoding: Any
) -> Rollout:
    """These rows as one call of ``roll_out``, nothing replaced."""
    prompt_B1 = torch.ones(len(uids), 1, dtype=torch.int64)
    return roll_out(
        PromptBatch(uid_B=tuple(uids), sample_B=(0,) * len(uids), ids_BP=prompt_B1, mask_BP=prompt_B1 > 0),
        student=STUDENT,
        teacher=TEACHER if alpha else None,
        teacher_mix=alpha,
        coin_groups=coin_groups,
        decoding=Decoding(max_new_tokens=longest, **decoding),
        key=replace(KEY, rollout=rollout),
        eos_ids=(EOS,),
        pad_id=EOS,
    )


def responses(rollout: Rollout) -> list[Response]:
    """Each row's tokens, its EOS included."""
    return [tuple(ids[:n]) for ids, n in _with_lengths(rollout, rollout.response_BT)]


def drew(rollout: Rollout) -> list[Drew]:
    """Whether the teacher drew each of a row's tokens."""
    return [tuple(heads[:n]) for heads, n in _with_lengths(rollout, rollout.teacher_drew_BT)]


def _with_lengths(rollout: Rollout, value_BT: Tensor) -> Iterator[tuple[list[Any], int]]:
    return zip(value_BT.tolist(), rollout.length_B.tolist(), strict=True)


def off_by_one(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Broken: the last id whose cumulated mass does not exceed, instead of the first that does."""
    ids_B, log_prob_B, drawable_B = sampling.draw_unchecked(logits_BV, uniform_B)
    return (ids_B - 1).clamp(min=0), log_prob_B, drawable_B

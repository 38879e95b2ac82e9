"""How often the teacher must run in a rollout, from the coins and the lengths of the responses alone."""

from __future__ import annotations

import torch

from minillm.sampling import coin_group, coin_keys, uniforms
from minillm.types import DrawKey, Rollout


def heads_of(key: DrawKey, *, mix: float, groups: int, longest: int) -> list[list[int]]:
    """Where each group's coin falls on the teacher, by the keyed numbers."""
    coin_G1 = coin_keys(key, range(groups))[:, None]
    heads_GT = uniforms(coin_G1, torch.arange(longest)) < mix
    return [heads_T.nonzero()[:, 0].tolist() for heads_T in heads_GT]


def lives(rollout: Rollout, groups: int) -> list[int]:
    """How many tokens the longest row of each group has; 0 for a group without rows."""
    life = [0] * groups
    for uid, length in zip(rollout.prompts.uid_B, rollout.length_B.tolist(), strict=True):
        life[coin_group(uid, groups)] = max(life[coin_group(uid, groups)], length)
    return life


def wanted(heads: list[int], life: int) -> int:
    """Forwards of one group: at each head while a row of it lives, and for what is unread at the end.

    Nothing follows a row's last token, so a head at the last token of the longest row leaves nothing unread.
    """
    drawn = [t for t in heads if t < life]
    return len(drawn) + (life > 0 and (not drawn or drawn[-1] < life - 1))

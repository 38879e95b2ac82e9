"""Random numbers that are functions of a key, draws from them, and the ids that truncation keeps.

Legend: B rows, T positions, V ids, G coin groups.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import torch
from torch import Tensor

from minillm import decode, order, sampling
from minillm.selftest.check import Check, Found, device, differing, log
from minillm.types import DrawKey, Purpose

KEY = DrawKey(seed=5, stage="selftest", purpose=Purpose.TOKEN, rollout=2)
UIDS = [f"row-{n}" for n in range(64)]
DRAWS = 4096
CRITICAL = {7: 24.322, 14: 36.123}
"""A right sampler's chi-square exceeds it once in 1,000 keys, by degrees of freedom; the keys here are fixed."""


def chi_square(count: Tensor, chance: Tensor) -> Found:
    """Pearson's statistic of how often each outcome came, and the most that it may be."""
    want = chance.double().cpu() * count.sum().cpu()
    statistic = ((count.double().cpu() - want).square() / want).sum()
    return Found(float(statistic), CRITICAL[len(want) - 1])


def by_definition(uid: str, sample: int, position: int) -> float:
    """The number of a row at a position, by integers of Python: BLAKE2b of the key, then splitmix64."""
    mask, digest = (1 << 64) - 1, hashlib.blake2b(digest_size=8)
    for part in (str(KEY.seed), KEY.stage, KEY.purpose.value, str(KEY.rollout), uid, str(sample)):
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    state = (int.from_bytes(digest.digest(), "little") + (position + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def keyed_numbers() -> Found:
    """The same number for a row alone, among others and in another order, and on any machine."""
    samples, at = [n % 3 for n in range(len(UIDS))], device()
    want_BT = torch.tensor(
        [[by_definition(uid, s, t) for t in range(5)] for uid, s in zip(UIDS, samples, strict=True)],
        dtype=torch.float64,
    )
    keys_B = sampling.row_keys(KEY, UIDS, samples, device=at)
    whole_BT = sampling.uniforms(keys_B[:, None], torch.arange(5, device=at)).cpu()
    back_B = sampling.uniforms(sampling.row_keys(KEY, UIDS[::-1], samples[::-1], device=at), 4).cpu()
    alone = sampling.uniforms(sampling.row_keys(KEY, UIDS[7:8], samples[7:8], device=at), 3).cpu()
    wrong = differing(whole_BT, want_BT) + differing(back_B.flip(0), want_BT[:, 4]) + differing(alone, want_BT[7:8, 3])
    return Found(wrong, 0.0)


def keyed_draws() -> Found:
    """A few thousand keyed draws follow the softmax that they are drawn from."""
    logits_V = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, 1.5, -2.0], dtype=torch.float64, device=device())
    keys_B = sampling.row_keys(KEY, [str(n) for n in range(DRAWS)], [0] * DRAWS, device=device())
    ids_B = sampling.draw(logits_V.expand(DRAWS, -1), sampling.uniforms(keys_B, 0))
    return chi_square(torch.bincount(ids_B, minlength=8), logits_V.softmax(0))


def coins() -> Found:
    """Over a few thousand coin groups the coin falls on the teacher as often as asked, at each position by itself."""
    alpha = 0.3
    heads_GT = torch.tensor(decode.toss(KEY, teacher_mix=alpha, coin_groups=DRAWS, positions=3))
    pattern_G = heads_GT.long() @ torch.tensor([4, 2, 1])
    chance = [math.prod(alpha if h else 1 - alpha for h in fall) for fall in itertools.product((0, 1), repeat=3)]
    return chi_square(torch.bincount(pattern_G, minlength=8), torch.tensor(chance, dtype=torch.float64))


def forbidden_ids() -> Found:
    """An id at -inf never comes out, not even at the ends of the range of numbers."""
    logits_V = torch.tensor([-math.inf, 1.0, -math.inf, 0.0, -math.inf], dtype=torch.float64, device=device())
    uniform_B = torch.cat(
        [torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53], dtype=torch.float64)]
    )
    ids_B = sampling.draw(logits_V.expand(len(uniform_B), -1), uniform_B.to(device()))
    return Found(float(logits_V[ids_B].isinf().sum()) + float(len(set(ids_B.tolist())) != 2), 0.0)


def truncation() -> Found:
    """Top-k, then top-p of what is left; of equals the smaller id; packed to bits and back."""
    logits_1V = log(0.1, 0.5, 0.15, 0.25).to(device())
    even_1V = torch.zeros_like(logits_1V)
    cases = (
        (logits_1V, {"top_k": 3, "top_p": 1.0}, [False, True, True, True]),
        (logits_1V, {"top_k": 0, "top_p": 0.7}, [False, True, False, True]),
        (logits_1V, {"top_k": 3, "top_p": 0.8}, [False, True, False, True]),  # of the mass of three
        (logits_1V, {"top_k": 1, "top_p": 0.01}, [False, True, False, False]),
        (even_1V, {"top_k": 2, "top_p": 1.0}, [True, True, False, False]),
    )
    wrong = 0.0
    for given_1V, settings, want in cases:
        kept_1V = sampling.support_mask(given_1V, top_k=int(settings["top_k"]), top_p=settings["top_p"])
        assert kept_1V is not None
        back_1V = sampling.unpack_support(sampling.pack_support(kept_1V), kept_1V.shape[1])
        wrong += differing(kept_1V.cpu(), torch.tensor([want])) + differing(back_1V, kept_1V)
    wrong += sampling.support_mask(logits_1V, top_k=0, top_p=1.0) is not None
    return Found(wrong, 0.0)


def shares() -> Found:
    """Laid side by side, the rows of any number of ranks are all rows, each once, and shares differ by one at most."""
    lengths = [7 * n % 11 for n in range(10)]
    wrong = 0
    for ranks in (1, 2, 3, 7, 12):
        parts = [order.share(range(10), lengths=lengths, rank=rank, ranks=ranks) for rank in range(ranks)]
        wrong += sorted(row for part in parts for row in part) != list(range(10))
        wrong += max(map(len, parts)) - min(map(len, parts)) > 1
    for epoch in range(3):
        wrong += sorted(order.permutation(10, seed=1, epoch=epoch)) != list(range(10))
    return Found(float(wrong), 0.0)


CHECKS = (
    Check(name="sampling: keyed numbers, whatever the batch", run=keyed_numbers),
    Check(name="sampling: keyed draws, chi-square", run=keyed_draws),
    Check(name="sampling: coins, chi-square", run=coins),
    Check(name="sampling: forbidden ids are never drawn", run=forbidden_ids),
    Check(name="sampling: top-k and top-p", run=truncation),
    Check(name="sampling: rows over ranks", run=shares),
)

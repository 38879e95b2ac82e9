"""Random numbers that are functions of a key, and draws from a softmax that use exactly one of them.

A token is drawn by inverse CDF from one uniform number which is a pure function of (seed, stage, purpose, rollout, row
uid, sample index, position). So a row's randomness depends neither on its batch mates, nor on the number of ranks, nor
on finished rows being dropped, nor on a restart (design D3).

Legend: B rows (any number), V vocabulary ids, C bytes of packed vocabulary (V / 8, rounded up).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minillm.errors import NonFinite
from minillm.types import DrawKey, Purpose, require_shape

# splitmix64 (Steele, Lea and Flood, 2014): the increment of its counter and the two multipliers of its finaliser.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_BITS = 64
_MANTISSA = 53
_BYTE = 8

INDEPENDENT = 16
"""Coin groups for each row where coins are to be independent: about one row in 16 then shares its coin with another."""


def row_keys(key: DrawKey, uids: Sequence[str], samples: Sequence[int], *, device: torch.device | str) -> Tensor:
    """One 64-bit key a row [B], as int64: BLAKE2b of everything that names the row's random numbers but the position.

    The parts are length-prefixed before they are joined, so no two different names share an encoding.
    """
    parts = (str(key.seed), key.stage, key.purpose.value, str(key.rollout))
    keys = [_hash64(*parts, uid, str(sample)) for uid, sample in zip(uids, samples, strict=True)]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def coin_keys(key: DrawKey, groups: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """One key a coin group [G]: as ``row_keys`` with purpose ``COIN``, and the group's number where the uid would be.

    The rows of a group share it on every rank. The purpose keeps it apart from the key of a row whose uid is a number.
    """
    coin = replace(key, purpose=Purpose.COIN)
    return row_keys(coin, [str(group) for group in groups], [0] * len(groups), device=device)


def coin_group(uid: str, coin_groups: int) -> int:
    """Which of ``coin_groups`` groups a row is in: a function of its uid alone, so all samples of a prompt agree."""
    assert coin_groups >= 1, coin_groups
    return _hash64("coin group", uid) % coin_groups


def uniforms(keys_B: Tensor, position: int | Tensor) -> Tensor:
    """Float64 multiples of 2^-53 in [0, 1): number ``position`` of the splitmix64 stream that starts at each key.

    ``position`` is counted from 0; a tensor of positions is broadcast against the keys.
    """
    at = torch.as_tensor(position, dtype=torch.int64, device=keys_B.device)
    state = keys_B + (at + 1) * _INCREMENT  # int64 wraps modulo 2^64, which is what the generator wants
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, _BITS - _MANTISSA).double() * 2.0**-_MANTISSA


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Ids [B] drawn from softmax(logits) by inverse CDF, in float64: the first whose cumulated mass exceeds u x total.

    ``-inf`` forbids an id; an id without mass never comes out, whatever the rounding. A NaN or ``+inf`` raises
    ``NonFinite``; a row in which every id is forbidden is a mistake of ours and fails an assertion.
    """
    ids_B, _, drawable_B = draw_unchecked(logits_BV, uniform_B)
    if not bool(drawable_B.all()):
        _complain(logits_BV)
    return ids_B


def draw_unchecked(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``draw`` without waiting for the device, and what one softmax gives besides: the ids [B], their log-probabilities
    [B] (float64), and whether each row could be drawn from at all [B]."""
    require_shape("uniform numbers", uniform_B, tuple(logits_BV.shape[:1]))
    wide_BV = logits_BV.double()
    shifted_BV = wide_BV - wide_BV.amax(dim=1, keepdim=True)
    mass_BV = shifted_BV.exp()
    # A parallel prefix sum may round upwards at an id without mass, so such ids are taken out after summing. The
    # largest of the rest is the total: u <= 1 - 2^-53 makes u x total smaller than it, so some id always exceeds.
    cdf_BV = torch.where(mass_BV > 0, mass_BV.cumsum(dim=1), 0.0)
    total_B = cdf_BV.amax(dim=1)
    target_B1 = (uniform_B.double() * total_B)[:, None]
    ids_B = (cdf_BV > target_B1).to(torch.uint8).argmax(dim=1)  # argmax returns the first of equals
    log_prob_B = shifted_BV.gather(1, ids_B[:, None]).squeeze(1) - total_B.log()
    return ids_B, log_prob_B, total_B > 0  # false where it is NaN


def log_probs_of(logits_BV: Tensor, ids_B: Tensor) -> Tensor:
    """Log-probability [B] of each row's id under softmax(logits), computed and returned in float64."""
    wide_BV = logits_BV.double()
    return wide_BV.gather(1, ids_B[:, None]).squeeze(1) - wide_BV.logsumexp(dim=1)


def support_mask(logits_BV: Tensor, *, top_k: int, top_p: float, banned_BV: Tensor | None = None) -> Tensor | None:
    """True where truncated sampling keeps an id [B, V]; None where these settings keep all ids.

    ``logits_BV`` are the student's, after temperature. Banned ids go first; where no id would be left, none is banned.
    The k likeliest of the rest are kept, of equals the smaller id; of those the smallest prefix, likeliest first, that
    holds the share ``top_p`` of *their* mass, and at least one. An id at ``-inf`` is never kept.
    """
    vocabulary = logits_BV.shape[1]
    if banned_BV is not None:
        allowed_BV = ~banned_BV & (logits_BV > -torch.inf)
        logits_BV = logits_BV.masked_fill(banned_BV & allowed_BV.any(dim=1, keepdim=True), -torch.inf)
    if not 0 < top_k < vocabulary and top_p >= 1:
        return None if banned_BV is None else logits_BV > -torch.inf
    sorted_BV, order_BV = logits_BV.double().sort(dim=1, descending=True, stable=True)
    kept_BV = sorted_BV > -torch.inf
    if 0 < top_k < vocabulary:
        kept_BV[:, top_k:] = False
    if top_p < 1:
        mass_BV = torch.where(kept_BV, (sorted_BV - sorted_BV[:, :1]).exp(), 0.0)
        reached_BV = mass_BV.cumsum(dim=1)
        before_BV = torch.cat([torch.zeros_like(reached_BV[:, :1]), reached_BV[:, :-1]], dim=1)
        kept_BV &= before_BV < top_p * reached_BV[:, -1:]
    return torch.zeros_like(kept_BV).scatter_(1, order_BV, kept_BV)


def restrict(logits: Tensor, support: Tensor | None) -> Tensor:
    """``logits`` with ``-inf`` off the support, so that their softmax is renormalised on it; unchanged for None."""
    return logits if support is None else logits.masked_fill(~support, -torch.inf)


def pack_support(support: Tensor) -> Tensor:
    """Booleans [..., V] as bits [..., C] of uint8, id i in bit i % 8 of byte i // 8; the last byte is filled with 0."""
    vocabulary = support.shape[-1]
    bits = torch.nn.functional.pad(support.to(torch.uint8), (0, -vocabulary % _BYTE))
    value_8 = torch.tensor([1 << bit for bit in range(_BYTE)], dtype=torch.uint8, device=support.device)
    by_byte = bits.reshape(*support.shape[:-1], bits.shape[-1] // _BYTE, _BYTE)
    return (by_byte * value_8).sum(dim=-1, dtype=torch.uint8)


def unpack_support(packed: Tensor, vocabulary: int) -> Tensor:
    """The booleans [..., V] of ``pack_support``'s bytes [..., C]; ``ShapeMismatch`` if C is not V / 8 rounded up."""
    require_shape("packed support", packed, (*packed.shape[:-1], -(-vocabulary // _BYTE)))
    bit_8 = torch.arange(_BYTE, dtype=torch.uint8, device=packed.device)
    bits = (packed[..., None] >> bit_8) & 1
    return bits.flatten(-2)[..., :vocabulary].bool()


def _hash64(*parts: str) -> int:
    """BLAKE2b of length-prefixed parts as a signed 64-bit integer, the same on every machine."""
    digest = hashlib.blake2b(digest_size=_BITS // _BYTE)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")  # JSON may hold lone surrogates
        digest.update(len(encoded).to_bytes(_BITS // _BYTE, "little") + encoded)
    return int.from_bytes(digest.digest(), "little", signed=True)


def _shift_right(value: Tensor, by: int) -> Tensor:
    """Logical shift: torch's ``>>`` copies the sign bit of an int64, so the copies are masked away."""
    return (value >> by) & ((1 << (_BITS - by)) - 1)


def _complain(logits_BV: Tensor) -> None:
    broken_B = (logits_BV.isnan() | (logits_BV == torch.inf)).any(dim=1)
    if bool(broken_B.any()):
        raise NonFinite(
            f"logits of {int(broken_B.sum())} of {logits_BV.shape[0]} rows hold NaN or +inf; wanted numbers or -inf.\n"
            "  no token can be drawn from them; look for an overflow (fp16?) or a diverged model"
        )
    raise AssertionError("a row of logits forbids every id")

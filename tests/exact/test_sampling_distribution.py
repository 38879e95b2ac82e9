"""Responses are distributed as the enumerated mixture (1 - a) student + a teacher, EOS included.

200,000 rollouts, each under a rollout index of its own, since rows of one rollout share coins and are not independent:
drawn by the loop itself, with keys replaced as ``mixture.roll_keyed`` says, and held equal to calls in which nothing
is. Then one rollout of many rows with nothing replaced, in which every row has a coin group of its own. Planted errors
must fail the same check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minillm import decode, sampling
from minillm.types import DrawKey, Rollout
from tests.exact.mixture import (
    KEY,
    Draw,
    Keys,
    T,
    drew,
    enumerate_responses,
    keys_of,
    off_by_one,
    p_value,
    responses,
    roll,
    roll_keyed,
)

ROLLOUTS = 200_000
CALLS = 150
ROWS = 1_600
TOLD = 1e-3
"""A right sampler falls below it for one seed in 1,000; seeds are fixed. Planted errors must fall below ``SURE``."""
SURE = 1e-6


def p_of(rollout: Rollout, alpha: float) -> float:
    """P-value of the chi-square of all responses of a rollout against the enumerated mixture."""
    return p_value(responses(rollout), enumerate_responses([alpha] * T))


@pytest.fixture(scope="module")
def keys() -> Keys:
    return keys_of(range(ROLLOUTS), ["row"])


def first(keys: Keys, rows: int) -> Keys:
    return Keys(row_R=keys.row_R[:rows], coin_R=keys.coin_R[:rows])


def test_the_keys_are_those_that_the_library_makes() -> None:
    """Of rows and of their groups' coins, in every rollout."""
    uids, rollouts = list(map(str, range(6))), range(98, 103)
    groups = [sampling.coin_group(uid, 2) for uid in uids]
    made = keys_of(rollouts, uids, coin_groups=2)
    own = [replace(KEY, rollout=n) for n in rollouts]
    assert torch.equal(made.row_R, torch.cat([sampling.row_keys(key, uids, [0] * 6, device="cpu") for key in own]))
    assert torch.equal(made.coin_R, torch.cat([sampling.coin_keys(key, groups) for key in own]))
    assert len(set(made.row_R.tolist())) == 30 and len(set(made.coin_R.tolist())) == 10


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_200000_rollouts_follow_the_enumerated_mixture(keys: Keys, alpha: float) -> None:
    rollout = roll_keyed(keys, alpha)
    assert len(rollout.stop_B) == ROLLOUTS
    assert p_of(rollout, alpha) > TOLD


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_each_of_them_is_the_rollout_that_a_call_of_its_own_makes(keys: Keys, alpha: float) -> None:
    """What ``roll_keyed`` replaces changes nothing: the same tokens, and the same coins, as with nothing replaced."""
    one = roll_keyed(first(keys, CALLS), alpha)
    calls = [roll(["row"], alpha, coin_groups=1, rollout=n) for n in range(CALLS)]
    assert responses(one) == [found for call in calls for found in responses(call)]
    assert drew(one) == [found for call in calls for found in drew(call)]
    assert len(set(drew(one))) > (3 if alpha == 0.2 else 2)
    later = roll(["row"], alpha, coin_groups=1, rollout=CALLS)  # control: another index is another rollout
    assert responses(later) + responses(one)[1:] != responses(one)


@pytest.mark.parametrize(("drawn", "asked"), [(0.02, 0.0), (0.18, 0.2), (0.22, 0.2), (0.98, 1.0)])
def test_a_share_of_the_teacher_that_is_off_by_two_hundredths_fails(keys: Keys, drawn: float, asked: float) -> None:
    """Negative control: 200,000 responses tell it."""
    assert p_of(roll_keyed(keys, drawn), asked) < SURE


def one_number(keys_B: Tensor, position: Tensor) -> Tensor:
    """Broken: one number for all positions of a row."""
    return sampling.uniforms(keys_B, torch.zeros_like(position))


def test_planted_errors_fail(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: each is a mistake that could be made in the loop or in the functions that it draws with.

    A tenth of the rollouts tells all of them.
    """
    some = first(keys, ROLLOUTS // 10)
    coin_reused = Keys(row_R=some.row_R, coin_R=some.row_R)
    assert p_of(roll_keyed(coin_reused, 0.2), 0.2) < SURE
    for alpha in (0.0, 0.2, 1.0):
        assert p_of(roll_keyed(some, alpha, draw=off_by_one), alpha) < SURE
    monkeypatch.setattr(decode, "uniforms", one_number)
    assert p_of(roll_keyed(some, 0.2), 0.2) < SURE


def uid_of_group(groups: int) -> dict[int, str]:
    """One uid for each coin group, of almost all groups."""
    return {sampling.coin_group(str(n), groups): str(n) for n in range(3 * groups)}


def roll_apart(alpha: float, *, rows: int = ROWS) -> Rollout:
    """One rollout, one coin group a row, nothing replaced."""
    groups = rows * 5 // 4
    uids = list(uid_of_group(groups).values())[:rows]
    assert len(uids) == rows
    return roll(uids, alpha, coin_groups=groups)


@pytest.mark.parametrize(("alpha", "rows"), [(0.0, 20_000), (0.2, ROWS), (1.0, ROWS)])
def test_rows_of_one_rollout_in_groups_of_their_own_follow_the_enumerated_mixture(alpha: float, rows: int) -> None:
    assert p_of(roll_apart(alpha, rows=rows), alpha) > TOLD


@pytest.mark.parametrize(
    ("name", "broken"), [("draw_unchecked", off_by_one), ("uniforms", one_number)], ids=["off-by-one", "one-number"]
)
def test_planted_errors_in_that_rollout_fail(
    name: str, broken: Draw | Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, name, broken)
    assert p_of(roll_apart(0.2), 0.2) < SURE


def test_a_coin_that_is_the_rows_own_number_fails_in_that_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = uid_of_group(ROWS * 5 // 4)
    plain = sampling.row_keys

    def of_rows(key: DrawKey, groups: range) -> Tensor:
        return plain(key, [uid.get(group, "") for group in groups], [0] * len(groups), device="cpu")

    monkeypatch.setattr(decode, "coin_keys", of_rows)
    assert p_of(roll_apart(0.2), 0.2) < SURE

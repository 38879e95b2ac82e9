"""What the rows of one rollout have in common: the coins of their group, and nothing else.

Three rows in each of 20,000 rollout indices: two in one coin group, one in another. What any two of them do is held
against the enumeration: given the coins, rows are independent draws; rows of two groups are independent altogether.
``mixture.roll_keyed`` says what is replaced to draw so many rollouts at once.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from minillm import sampling
from minillm.decode import roll_out
from minillm.types import Decoding
from tests.exact.mixture import (
    KEY,
    STUDENT,
    TEACHER,
    Drew,
    Keys,
    Response,
    T,
    drew,
    enumerate_responses,
    keys_of,
    p_value,
    responses,
    roll,
    roll_keyed,
)
from tests.readers import batch_of

ALPHA, GROUPS, LONGEST = 0.3, 2, 2
UIDS = ["a", "c", "b"]
"""The first two are in one coin group, the third is in the other."""
ROLLOUTS, CALLS, MANY = 20_000, 60, 400
TOLD, SURE = 1e-3, 1e-12

Said = tuple[Drew, Response]


def test_the_rows_are_in_the_groups_that_are_meant() -> None:
    groups = [sampling.coin_group(uid, GROUPS) for uid in UIDS]
    assert groups[0] == groups[1] != groups[2]


@pytest.fixture(scope="module")
def keys() -> Keys:
    return keys_of(range(ROLLOUTS), UIDS, coin_groups=GROUPS)


def spoken(keys: Keys) -> list[tuple[Said, ...]]:
    """In each rollout, who drew what in each of the three rows."""
    rollout = roll_keyed(keys, ALPHA, longest=LONGEST)
    rows = iter(zip(drew(rollout), responses(rollout), strict=True))
    return list(zip(rows, rows, rows, strict=True))


@pytest.fixture(scope="module")
def said(keys: Keys) -> list[tuple[Said, ...]]:
    return spoken(keys)


def chance_of_coins(heads_T: Drew) -> float:
    return math.prod(ALPHA if heads else 1 - ALPHA for heads in heads_T)


def given_coins(heads_T: Drew) -> dict[Said, float]:
    """Probability of what a row says once its coins have fallen."""
    found = enumerate_responses([float(heads) for heads in heads_T])
    return {(heads_T[: len(response)], response): chance for response, chance in found.items()}


PATTERNS = list(itertools.product([False, True], repeat=LONGEST))


def both(one: dict[Said, float], other: dict[Said, float], *, times: float = 1.0) -> dict[tuple[Said, Said], float]:
    return {(a, b): times * one[a] * other[b] for a in one for b in other}


def mates() -> dict[tuple[Said, Said], float]:
    """Probability of what two rows of a group say together: independent given coins, which are the same for both."""
    total: dict[tuple[Said, Said], float] = {}
    for heads_T in PATTERNS:
        row = given_coins(heads_T)
        for pair, chance in both(row, row, times=chance_of_coins(heads_T)).items():
            total[pair] = total.get(pair, 0.0) + chance
    return total


def strangers() -> dict[tuple[Said, Said], float]:
    """The same of two rows with nothing in common."""
    row: dict[Said, float] = {}
    for heads_T in PATTERNS:
        for said, chance in given_coins(heads_T).items():
            row[said] = row.get(said, 0.0) + chance_of_coins(heads_T) * chance
    return both(row, row)


def pairs(said: list[tuple[Said, ...]], one: int, other: int) -> list[tuple[Said, Said]]:
    return [(rows[one], rows[other]) for rows in said]


def test_three_rows_of_a_rollout_are_what_a_call_of_its_own_makes(said: list[tuple[Said, ...]]) -> None:
    """What ``roll_keyed`` replaces changes nothing: coin groups and keys as with nothing replaced."""
    for n in range(CALLS):
        call = roll(UIDS, ALPHA, coin_groups=GROUPS, longest=LONGEST, rollout=n)
        assert tuple(zip(drew(call), responses(call), strict=True)) == said[n]


def test_rows_of_a_group_share_coins_and_are_independent_given_them(said: list[tuple[Said, ...]]) -> None:
    """Unequal coins of two rows of a group have no place in the enumeration: one such pair would be a ``KeyError``."""
    assert p_value(pairs(said, 0, 1), mates()) > TOLD


def test_rows_of_two_groups_are_independent(said: list[tuple[Said, ...]]) -> None:
    for row in (0, 1):
        assert p_value(pairs(said, row, 2), strangers()) > TOLD


def test_shared_coins_show(said: list[tuple[Said, ...]]) -> None:
    """Negative control of both: mates are no strangers, nor strangers mates; their texts alone tell."""
    words = [(a[1], b[1]) for a, b in pairs(said, 0, 1)]
    alone = enumerate_responses([ALPHA] * LONGEST)
    assert p_value(words, {(a, b): alone[a] * alone[b] for a in alone for b in alone}) < SURE
    with pytest.raises(KeyError):
        p_value(pairs(said, 0, 2), mates())


def test_one_uniform_number_for_all_rows_fails(keys: Keys) -> None:
    """Negative control: coins, and each row by itself, are as they should be, and only the pair gives it away."""
    by_rollout_N3 = keys.row_R.view(ROLLOUTS, len(UIDS))
    shared = replace(keys, row_R=by_rollout_N3[:, :1].expand_as(by_rollout_N3).flatten())
    broken = spoken(shared)
    each = {row: chance for (row, _), chance in _marginal(strangers()).items()}
    for row in range(len(UIDS)):
        assert p_value([rows[row] for rows in broken], each) > TOLD
    assert p_value(pairs(broken, 0, 1), mates()) < SURE
    assert p_value(pairs(broken, 0, 2), strangers()) < SURE


def _marginal(joint: dict[tuple[Said, Said], float]) -> dict[tuple[Said, None], float]:
    total: dict[tuple[Said, None], float] = {}
    for (one, _), chance in joint.items():
        total[one, None] = total.get((one, None), 0.0) + chance
    return total


def test_one_coin_for_all_groups_fails(keys: Keys) -> None:
    """Negative control: the group's number left out of its coin's key."""
    coin_N3 = keys.coin_R.view(ROLLOUTS, len(UIDS))
    shared = replace(keys, coin_R=coin_N3[:, :1].expand_as(coin_N3).flatten())
    assert p_value(pairs(spoken(shared), 0, 2), strangers()) < SURE


def test_a_coin_for_each_row_fails(keys: Keys) -> None:
    """Negative control: rows of a group that toss coins of their own."""
    coin_R = keys.row_R.flip(0)  # as many different keys as there are rows, none of them the row's own
    with pytest.raises(KeyError):
        p_value(pairs(spoken(replace(keys, coin_R=coin_R)), 0, 1), mates())


def test_rollouts_that_follow_each_other_are_independent(said: list[tuple[Said, ...]]) -> None:
    """The same row in two neighbouring rollouts; the control: two rollouts under one index."""
    neighbours = [(said[n][0], said[n + 1][0]) for n in range(0, ROLLOUTS, 2)]
    assert p_value(neighbours, strangers()) > TOLD
    same = [(said[n][0], said[n][0]) for n in range(0, ROLLOUTS, 2)]
    assert p_value(same, strangers()) < SURE


def test_many_rows_of_a_group_share_coins_but_not_their_tokens_numbers() -> None:
    """A single call of many rows, nothing replaced."""
    uids = [f"row-{n}" for n in range(MANY)]
    rollout = roll_out(
        batch_of([(1,)] * MANY, uids=uids),
        student=STUDENT,
        teacher=TEACHER,
        teacher_mix=0.5,
        coin_groups=3,
        decoding=Decoding(max_new_tokens=T),
        key=replace(KEY, rollout=1),
        eos_ids=(),  # no row ends early, so all coins show
        pad_id=0,
    )
    group_B = torch.tensor([sampling.coin_group(uid, 3) for uid in uids])
    patterns = [rollout.teacher_drew_BT[group_B == group] for group in range(3)]
    assert all(bool((pattern == pattern[0]).all()) for pattern in patterns)
    assert len({tuple(pattern[0].tolist()) for pattern in patterns}) > 1
    # Under one coin the first tokens of a group still spread over the teacher's or the student's distribution.
    for group, pattern in enumerate(patterns):
        readers = (TEACHER, STUDENT) if bool(pattern[0, 0]) else (STUDENT, TEACHER)
        first = rollout.response_BT[group_B == group, 0].tolist()
        own, other = (dict(enumerate(reader.table_XV[0].softmax(-1).tolist())) for reader in readers)
        assert p_value(first, own) > TOLD
        assert p_value(first, other) < SURE

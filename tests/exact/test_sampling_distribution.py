"""Responses are distributed as the enumerated mixture (1 - a) student + a teacher, EOS included.

Two ways: the drawing functions alone, 50,000 responses each under a rollout index of its own; and whole rollouts, in
which every row has a coin group of its own, so that rows are independent. Planted errors must fail the same check.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minillm import decode, sampling
from minillm.decode import roll_out
from minillm.types import Decoding, DrawKey, Purpose, Rollout
from tests.readers import TableReader, batch_of

V, T, EOS = 4, 3, 0
STUDENT, TEACHER = TableReader(vocabulary=V, depth=T, seed=0), TableReader(vocabulary=V, depth=T, seed=1)
KEY = DrawKey(seed=5, stage="minillm", purpose=Purpose.TOKEN, rollout=0)
ROLLOUTS = 50_000
ROWS = 1_600
TOLD = 1e-4
"""A right sampler falls below it for one seed in 10,000; seeds are fixed. Planted errors must fall below ``SURE``."""
SURE = 1e-12

Draw = Callable[[Tensor, Tensor], Tensor]


def enumerate_mixture(alpha: float) -> dict[tuple[int, ...], float]:
    """Probability of each response: ended by EOS, or T tokens long."""
    mixed_XV = (1 - alpha) * STUDENT.table_XV.softmax(-1) + alpha * TEACHER.table_XV.softmax(-1)
    cells: dict[tuple[int, ...], float] = {}
    open_prefixes: list[tuple[tuple[int, ...], int, float]] = [((), 0, 1.0)]
    while open_prefixes:
        prefix, node, mass = open_prefixes.pop()
        for v, share in enumerate(mixed_XV[node].tolist()):
            response = (*prefix, v)
            if v == EOS or len(response) == T:
                cells[response] = mass * share
            else:
                open_prefixes.append((response, node * V + v + 1, mass * share))
    return cells


def p_value(responses: list[tuple[int, ...]], alpha: float) -> float:
    """Of Pearson's chi-square against the enumeration; cells with fewer than 5 expected responses are put together."""
    cells, total = enumerate_mixture(alpha), len(responses)
    assert math.isclose(sum(cells.values()), 1.0)
    count = dict.fromkeys(cells, 0)
    for response in responses:
        count[response] += 1  # a response that cannot be is a KeyError
    large = [r for r in cells if cells[r] * total >= 5]
    pairs = [(count[r], cells[r] * total) for r in large]
    rest = total - sum(want for _, want in pairs)
    if rest > 1e-6 * total:
        pairs.append((total - sum(got for got, _ in pairs), rest))
    statistic = sum((got - want) ** 2 / want for got, want in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.fixture(scope="module")
def keys() -> tuple[Tensor, Tensor]:
    """Row key and coin key of one row in each of many rollouts."""
    each = [replace(KEY, rollout=n) for n in range(ROLLOUTS)]
    rows = torch.cat([sampling.row_keys(key, ["row"], [0], device="cpu") for key in each])
    return rows, torch.cat([sampling.coin_keys(key, [0]) for key in each])


def draw_directly(rows: Tensor, coins: Tensor, *, alpha: float, draw: Draw = sampling.draw) -> list[tuple[int, ...]]:
    """One response a key, by the drawing functions and nothing else."""
    node_B, alive_B = torch.zeros(len(rows), dtype=torch.long), torch.ones(len(rows), dtype=torch.bool)
    ids = []
    for t in range(T):
        heads_B1 = (sampling.uniforms(coins, t) < alpha)[:, None]
        logits_BV = torch.where(heads_B1, TEACHER.table_XV[node_B], STUDENT.table_XV[node_B])
        id_B = torch.where(alive_B, draw(logits_BV, sampling.uniforms(rows, t)), -1)
        ids.append(id_B)
        alive_B = alive_B & (id_B != EOS)
        node_B = torch.where(alive_B, node_B * V + id_B + 1, 0) if t + 1 < T else node_B
    return [tuple(v for v in row if v >= 0) for row in torch.stack(ids, dim=1).tolist()]


def off_by_one(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The last id whose cumulated mass does not exceed, instead of the first that does."""
    return (sampling.draw(logits_BV, uniform_B) - 1).clamp(min=0)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_drawn_responses_follow_the_enumerated_mixture(keys: tuple[Tensor, Tensor], alpha: float) -> None:
    assert p_value(draw_directly(*keys, alpha=alpha), alpha) > TOLD


def test_planted_errors_in_the_drawing_functions_fail(keys: tuple[Tensor, Tensor]) -> None:
    rows, coins = keys
    assert p_value(draw_directly(rows, coins, alpha=0.3), 0.2) < SURE  # another share of the teacher
    assert p_value(draw_directly(rows, rows, alpha=0.2), 0.2) < SURE  # the coin's number used for the token again
    assert p_value(draw_directly(rows, coins, alpha=0.2, draw=off_by_one), 0.2) < SURE
    assert p_value(draw_directly(rows, coins, alpha=0.2), 0.0) < SURE  # mixing where none was asked for


def uid_of_group(groups: int) -> dict[int, str]:
    """One uid for each coin group, of almost all groups."""
    return {sampling.coin_group(str(n), groups): str(n) for n in range(3 * groups)}


def _groups(rows: int) -> int:
    return rows * 5 // 4


def roll(alpha: float, *, rows: int = ROWS) -> list[tuple[int, ...]]:
    """Responses of whole rollouts, one coin group a row."""
    uids = list(uid_of_group(_groups(rows)).values())[:rows]
    assert len(uids) == rows
    rollout: Rollout = roll_out(
        batch_of([(1,)] * rows, uids=uids),
        student=STUDENT,
        teacher=TEACHER if alpha else None,
        teacher_mix=alpha,
        coin_groups=_groups(rows),
        decoding=Decoding(max_new_tokens=T),
        key=KEY,
        eos_ids=(EOS,),
        pad_id=EOS,
    )
    lengths = rollout.length_B.tolist()
    return [tuple(ids[:n]) for ids, n in zip(rollout.response_BT.tolist(), lengths, strict=True)]


def test_a_plain_rollout_follows_the_enumerated_student() -> None:
    assert p_value(roll(0.0, rows=20_000), 0.0) > TOLD


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_a_mixed_rollout_follows_the_enumerated_mixture(alpha: float) -> None:
    assert p_value(roll(alpha), alpha) > TOLD


def test_planted_errors_in_the_rollout_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks the loop itself, in the place where such a mistake would be made."""
    assert p_value(roll(0.4), 0.2) < SURE
    with monkeypatch.context() as patch:
        patch.setattr(decode, "draw", off_by_one)
        assert p_value(roll(0.2), 0.2) < SURE
    with monkeypatch.context() as patch:
        number = uid_of_group(_groups(ROWS))
        patch.setattr(
            decode,
            "coin_keys",
            lambda key, groups: sampling.row_keys(
                key, [number.get(g, "") for g in groups], [0] * len(groups), device="cpu"
            ),
        )
        assert p_value(roll(0.2), 0.2) < SURE
    with monkeypatch.context() as patch:  # one number for all positions of a row
        plain = sampling.uniforms
        patch.setattr(decode, "uniforms", lambda keys, at: plain(keys, torch.zeros_like(at)))
        assert p_value(roll(0.2), 0.2) < SURE


def test_rows_of_a_group_share_coins_but_not_their_tokens_numbers() -> None:
    """What one batch has in common: the coin of a position within a group, and nothing else."""
    uids = [f"row-{n}" for n in range(400)]
    rollout = roll_out(
        batch_of([(1,)] * 400, uids=uids),
        student=STUDENT,
        teacher=TEACHER,
        teacher_mix=0.5,
        coin_groups=3,
        decoding=Decoding(max_new_tokens=T),
        key=replace(KEY, rollout=1),
        eos_ids=(),  # no row ends early, so all coins show
        pad_id=EOS,
    )
    group_B = torch.tensor([sampling.coin_group(uid, 3) for uid in uids])
    patterns = [rollout.teacher_drew_BT[group_B == group] for group in range(3)]
    assert all(bool((pattern == pattern[0]).all()) for pattern in patterns)
    assert len({tuple(pattern[0].tolist()) for pattern in patterns}) > 1
    # Under one coin the first tokens of a group still spread over the teacher's or the student's distribution.
    for group, pattern in enumerate(patterns):
        table = TEACHER if bool(pattern[0, 0]) else STUDENT
        want = table.table_XV[0].softmax(-1)
        first = rollout.response_BT[group_B == group, 0]
        got = torch.bincount(first, minlength=V) / len(first)
        assert float((got - want).abs().max()) < 4 * math.sqrt(0.25 / len(first))
        other = (STUDENT if table is TEACHER else TEACHER).table_XV[0].softmax(-1)
        assert float((got - other).abs().max()) > float((got - want).abs().max())

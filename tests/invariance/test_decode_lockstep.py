"""Ranks whose readers hold sharded weights make the same calls, whatever rows they have.

Two threads stand for two ranks. Every call of a lockstep reader waits for the other rank's and compares its name, as a
collective would; a rank that calls alone, or calls something else, fails.
"""

from __future__ import annotations

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from minillm.decode import roll_out
from minillm.sampling import coin_group
from minillm.types import Decoding, DrawKey, Purpose, Rollout
from tests.readers import EOS, PAD, Recorder, TinyReader, batch_of, some_prompts

KEY = DrawKey(seed=4, stage="minillm", purpose=Purpose.TOKEN, rollout=18)
ROWS = 16
UIDS = [f"row-{n}" for n in range(ROWS)]
PROMPTS = some_prompts(ROWS, seed=5)
GROUPS = 3
PATIENCE = 20.0
STUDENT, TEACHER = TinyReader("llama", seed=1), TinyReader("llama", seed=2)


class Mismatch(AssertionError):
    """Two ranks made different calls at the same time."""


class Meeting:
    """Where two ranks exchange a word."""

    def __init__(self, patience: float) -> None:
        self.barrier = threading.Barrier(2, timeout=patience)
        self.words: list[object] = [None, None]

    def exchange(self, rank: int, word: object) -> list[object]:
        self.words[rank] = word
        self.barrier.wait()
        words = list(self.words)
        self.barrier.wait()
        return words


def run_rank(
    rank: int,
    rows: list[int],
    meeting: Meeting,
    *,
    mix: float,
    drop: bool,
    lockstep: tuple[bool, bool],
    student_waits: bool,
    look_every: int,
) -> tuple[Rollout, list[str]]:
    calls: list[str] = []

    def told(name: str) -> None:
        calls.append(name)
        if len(set(meeting.exchange(rank, name))) > 1:
            raise Mismatch(name)

    def anyone(alive: bool) -> bool:
        calls.append("anyone")
        return any(meeting.exchange(rank, alive))

    # Both readers are sharded here, and wait for the other rank (the student unless ``student_waits`` is off);
    # ``lockstep`` is what they tell the loop.
    rollout = roll_out(
        batch_of([PROMPTS[row] for row in rows], uids=[UIDS[row] for row in rows]),
        student=Recorder(STUDENT, told if student_waits else calls.append, name="student", lockstep=lockstep[0]),
        teacher=Recorder(TEACHER, told, name="teacher", lockstep=lockstep[1]),
        teacher_mix=mix,
        coin_groups=GROUPS,
        decoding=Decoding(max_new_tokens=8, top_k=12),
        key=KEY,
        eos_ids=(EOS, 5),
        pad_id=PAD,
        keep_hidden=True,
        drop_finished=drop,
        look_every=look_every,
        anyone=anyone,
    )
    return rollout, calls


def run_both(
    shares: tuple[list[int], list[int]],
    *,
    mix: float = 0.4,
    drop: bool = True,
    lockstep: tuple[bool, bool] = (True, True),
    student_waits: bool = True,
    patience: float = PATIENCE,
    look_every: int = 1,
) -> list[tuple[Rollout, list[str]]]:
    meeting = Meeting(patience)
    with ThreadPoolExecutor(max_workers=2) as pool:
        ranks = [
            pool.submit(
                run_rank,
                rank,
                rows,
                meeting,
                mix=mix,
                drop=drop,
                lockstep=lockstep,
                student_waits=student_waits,
                look_every=look_every,
            )
            for rank, rows in enumerate(shares)
        ]
        return [rank.result() for rank in ranks]


def one_group() -> list[int]:
    """Rows of a single coin group: the other groups have no row on the rank that holds these."""
    return [row for row in range(ROWS) if coin_group(UIDS[row], GROUPS) == coin_group(UIDS[0], GROUPS)]


SHORT = 10
"""A row that ends early."""
SHARES = {
    "alternating": (list(range(0, ROWS, 2)), list(range(1, ROWS, 2))),
    "one-row": ([row for row in range(ROWS) if row != SHORT], [SHORT]),
    "row-each": ([SHORT], [7]),
    "three-rows": ([11, 2], [SHORT]),
    "no-row": (list(range(ROWS)), []),
    "one-group": (one_group(), [row for row in range(ROWS) if row not in one_group()]),
    "nobody": ([], []),
}


@pytest.mark.parametrize("mix", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("share", SHARES)
def test_ranks_make_the_same_calls_and_draw_what_one_rank_would(share: str, drop: bool, mix: float) -> None:
    results = run_both(SHARES[share], mix=mix, drop=drop)
    assert results[0][1] == results[1][1]
    require_whole(results, share, mix=mix)


@pytest.mark.parametrize("mix", [0.0, 0.4])
@pytest.mark.parametrize("share", SHARES)
def test_ranks_that_look_seldom_make_the_same_calls_too(share: str, mix: float) -> None:
    results = run_both(SHARES[share], mix=mix, look_every=3)
    assert results[0][1] == results[1][1]
    for (one, _), (other, _) in zip(results, run_both(SHARES[share], mix=mix), strict=True):
        assert torch.equal(one.response_BT, other.response_BT) and one.stop_B == other.stop_B


@pytest.mark.parametrize("mix", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("share", SHARES)
def test_ranks_with_a_whole_student_each_meet_only_where_the_teacher_is_called(share: str, mix: float) -> None:
    results = run_both(SHARES[share], mix=mix, lockstep=(False, True), student_waits=False)
    shared = [[call for call in calls if not call.startswith("student")] for _, calls in results]
    assert shared[0] == shared[1]
    if mix == 0.0:
        assert shared[0] == ["teacher.read"]
    assert shared[0].count("anyone") <= shared[0].count("teacher.logits") + 1
    require_whole(results, share, mix=mix)


def require_whole(results: list[tuple[Rollout, list[str]]], share: str, *, mix: float) -> None:
    """Every row of every rank is what one rank with all of them draws and reads."""
    want = whole(mix)
    for (rollout, _), rows in zip(results, SHARES[share], strict=True):
        for at, row in enumerate(rows):
            assert same_row(rollout, at, want, row), row


def same_row(one: Rollout, at: int, other: Rollout, row: int) -> bool:
    """Whether ids, coins, ends, log-probs and both models' hidden states of two rows are the same, floats to 1e-9."""
    exact = [
        (rollout.response_BT[n][rollout.mask_BT[n]].tolist(), rollout.teacher_drew_BT[n][rollout.mask_BT[n]].tolist())
        for rollout, n in ((one, at), (other, row))
    ]
    if exact[0] != exact[1] or one.stop_B[at] != other.stop_B[row]:
        return False
    pairs = zip(_floats(one), _floats(other), strict=True)
    kept, same = one.mask_BT[at], other.mask_BT[row]
    return all(torch.allclose(mine[at][kept], its[row][same], rtol=0, atol=1e-9) for mine, its in pairs)


def _floats(rollout: Rollout) -> list[Tensor]:
    assert rollout.student_hidden_BTH is not None and rollout.teacher_hidden_BTH is not None
    return [rollout.logq_BT, rollout.student_hidden_BTH, rollout.teacher_hidden_BTH]


@functools.cache
def whole(mix: float) -> Rollout:
    return roll_out(
        batch_of(PROMPTS, uids=UIDS),
        student=STUDENT,
        teacher=TEACHER,
        teacher_mix=mix,
        coin_groups=GROUPS,
        decoding=Decoding(max_new_tokens=8, top_k=12),
        key=KEY,
        eos_ids=(EOS, 5),
        pad_id=PAD,
        keep_hidden=True,
    )


@pytest.mark.parametrize("mix", [0.0, 0.2])
def test_the_case_is_hard_enough(mix: float) -> None:
    """Rows end at different times, the ranks of a share differ in length, every group has rows, one has no heads."""
    length_B = whole(mix).length_B
    assert len(set(length_B.tolist())) > 3
    assert int(length_B[SHORT]) < int(length_B.max())
    assert {coin_group(uid, GROUPS) for uid in UIDS} == set(range(GROUPS))
    assert 0 < len(one_group()) < ROWS
    drew_BT = whole(0.2).teacher_drew_BT
    assert len({coin_group(UIDS[row], GROUPS) for row in range(ROWS) if drew_BT[row].any()}) == GROUPS - 1
    # Control of the comparison of rows: no row passes for another one.
    rollout = whole(mix)
    assert all(same_row(rollout, n, rollout, m) == (n == m) for n in range(ROWS) for m in range(ROWS))


@pytest.mark.parametrize("lockstep", [(False, True), (True, False)])
def test_a_reader_that_does_not_say_it_is_sharded_hangs_or_mismatches(lockstep: tuple[bool, bool]) -> None:
    """Negative control: what a sharded model that claims to be replicated would do."""
    with pytest.raises((Mismatch, threading.BrokenBarrierError)):
        run_both(SHARES["one-row"], lockstep=lockstep, patience=0.5)


def test_replicated_readers_make_no_dummy_calls() -> None:
    """The dummies are the price of sharding only."""
    calls: list[str] = []
    reader = Recorder(STUDENT, calls.append, name="student")
    roll_out(
        batch_of([PROMPTS[SHORT]], uids=[UIDS[SHORT]]),
        student=reader,
        decoding=Decoding(max_new_tokens=8, top_k=12),
        key=KEY,
        eos_ids=(EOS, 5),
        pad_id=PAD,
        anyone=lambda alive: True,
    )
    assert calls.count("student.extend") == int(whole(0.0).length_B[SHORT]) < 8

"""Which baselines leave the expected policy gradient alone: two rows and all their coins, enumerated (design D5).

Two rows of one rollout toss coins that decide, position by position, whether the teacher or the student draws. Rows
of one coin group share them. A baseline made of the *other* row is then no constant: under weights q/m it knows
something about who drew this row's token. Legend: R rows, K coin patterns, N responses, T positions.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from minillm.credit import peers, position_baseline
from minillm.errors import ShapeMismatch
from tests.exact.tabular import (
    Enumeration,
    assert_close,
    chance_given_coins,
    coin_patterns,
    credit,
    enumerate_pair,
    gradient,
    make_pair,
    sequence_kl,
    weights,
)

LENGTH = 2
SHARED, APART = (0, 0), (0, 1)
PROMPTS = {"position_mean": (0, 1), "leave_one_out": (0, 0)}


def allowed(kind: str, prompts: tuple[int, ...], *, groups: tuple[int, ...] | None = None) -> Tensor:
    """Rows that may serve, by the library; ``groups`` says which rows share coins, if the library is to be told."""
    prompt_R, row_R = torch.tensor(prompts), torch.arange(len(prompts))
    group_R = None if groups is None else torch.tensor(groups)
    return peers(
        kind,
        prompt_B=prompt_R,
        row_B=row_R,
        prompt_A=prompt_R,
        row_A=row_R,
        coin_group_B=group_R,
        coin_group_A=group_R,
    )


def baseline_bias(
    *,
    prompts: tuple[int, ...],
    groups: tuple[int, ...],
    allowed_RR: Tensor,
    importance: str,
    alpha: float,
    future: str = "expected",
) -> float:
    """|E[gradient with the baseline] - E[gradient without]| / |gradient of the KL|, over all coins and responses."""
    student, teacher = make_pair(vocab=3, length=LENGTH, prompts=2, seed=1)
    rows = [enumerate_pair(student, teacher, prompt=prompt) for prompt in prompts]
    heads_KT, chance_K = coin_patterns(LENGTH, alpha=alpha)
    weight_KNT = [[weights(importance, row, h.expand_as(row.mask_NT), alpha=alpha) for h in heads_KT] for row in rows]
    value_NT = [credit(row, future=future) for row in rows]
    share_KN = [chance_given_coins(row, heads_KT) for row in rows]
    surplus = [torch.zeros_like(row.reward_NT) for row in rows]  # sum of chance * w * b for each response
    choices = itertools.product(range(len(heads_KT)), repeat=len(set(groups)))
    for coins, picks in itertools.product(list(choices), list(every_pick(rows))):
        pattern = [coins[group] for group in groups]
        chance = float(chance_K[list(coins)].prod())
        for r, n in enumerate(picks):
            chance *= float(share_KN[r][pattern[r], n])
        if chance == 0.0:
            continue
        value_RT = torch.stack([value_NT[r][n] for r, n in enumerate(picks)])
        mask_RT = torch.stack([rows[r].mask_NT[n] for r, n in enumerate(picks)])
        baseline_RT = position_baseline(value_RT, mask_RT, allowed_RR)
        for r, n in enumerate(picks):
            surplus[r][n] += chance * weight_KNT[r][pattern[r]][n] * baseline_RT[r]
    lost = sum((torch.where(row.mask_NT, s, 0.0) * row.logq_NT).sum() for row, s in zip(rows, surplus, strict=True))
    wanted = sum(gradient(sequence_kl(row), student) for row in rows)
    assert isinstance(lost, Tensor) and isinstance(wanted, Tensor)
    assert max(float(s.abs().max()) for s in surplus) > 0.0, "the baseline was 0 throughout: nothing was tested"
    return float(gradient(lost, student).norm() / wanted.norm())


def every_pick(rows: list[Enumeration]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*[range(len(row.mask_NT)) for row in rows])


@pytest.mark.parametrize("kind", list(PROMPTS))
@pytest.mark.parametrize("groups", [SHARED, APART])
@pytest.mark.parametrize("importance", ["none", "per_step", "coin"])
def test_without_mixing_every_baseline_is_free(importance: str, groups: tuple[int, ...], kind: str) -> None:
    bias = baseline_bias(
        prompts=PROMPTS[kind],
        groups=groups,
        allowed_RR=allowed(kind, PROMPTS[kind]),
        importance=importance,
        alpha=0.0,
    )
    assert bias < 1e-12


@pytest.mark.parametrize("kind", list(PROMPTS))
@pytest.mark.parametrize("groups", [SHARED, APART])
@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_coin_weights_make_every_baseline_free(groups: tuple[int, ...], kind: str, future: str) -> None:
    """A token that the teacher drew is not the student's action: shared coins do no harm, no group need be named."""
    bias = baseline_bias(
        prompts=PROMPTS[kind],
        groups=groups,
        allowed_RR=allowed(kind, PROMPTS[kind]),
        importance="coin",
        alpha=0.2,
        future=future,
    )
    assert bias < 1e-12


@pytest.mark.parametrize("kind", list(PROMPTS))
def test_independent_coins_make_every_baseline_free(kind: str) -> None:
    bias = baseline_bias(
        prompts=PROMPTS[kind],
        groups=APART,
        allowed_RR=allowed(kind, PROMPTS[kind], groups=APART),
        importance="per_step",
        alpha=0.2,
    )
    assert bias < 1e-12


@pytest.mark.parametrize(
    ("kind", "future", "want"),
    [
        ("position_mean", "sampled", 0.010796),
        ("position_mean", "expected", 0.018437),
        ("leave_one_out", "sampled", 0.002096),
        ("leave_one_out", "expected", 0.003528),
    ],
)
def test_shared_coins_and_per_step_weights_bias_a_baseline(kind: str, future: str, want: float) -> None:
    """Recorded: why rows that share coins are left out (negative control of the tests around it)."""
    bias = baseline_bias(
        prompts=PROMPTS[kind],
        groups=SHARED,
        allowed_RR=allowed(kind, PROMPTS[kind]),
        importance="per_step",
        alpha=0.2,
        future=future,
    )
    assert bias == pytest.approx(want, abs=1e-6)


def test_rows_of_other_coin_groups_are_free_under_per_step_weights() -> None:
    """Three samples of a prompt, two sharing coins: told the groups, leave-one-out is exact; untold, it is not."""
    prompts, groups = (0, 0, 0), (0, 0, 1)
    told_RR = allowed("leave_one_out", prompts, groups=groups)
    assert told_RR.tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    setting = {"prompts": prompts, "groups": groups, "importance": "per_step", "alpha": 0.2}
    assert baseline_bias(allowed_RR=told_RR, **setting) < 1e-12  # type: ignore[arg-type]
    assert baseline_bias(allowed_RR=allowed("leave_one_out", prompts), **setting) > 1e-3  # type: ignore[arg-type]


@pytest.mark.parametrize("importance", ["per_step", "coin"])
def test_a_row_that_serves_itself_is_biased(importance: str) -> None:
    """Negative control: the plain batch mean, the row itself included."""
    everyone_RR = torch.ones(2, 2, dtype=torch.bool)
    bias = baseline_bias(prompts=(0, 0), groups=APART, allowed_RR=everyone_RR, importance=importance, alpha=0.2)
    assert bias > 1e-2


@pytest.mark.parametrize("kind", list(PROMPTS))
def test_no_weights_under_mixing_bias_any_baseline(kind: str) -> None:
    """Negative control: with ``importance: none`` the score's mean is not 0: even an independent baseline moves it."""
    bias = baseline_bias(
        prompts=PROMPTS[kind], groups=APART, allowed_RR=allowed(kind, PROMPTS[kind]), importance="none", alpha=0.2
    )
    assert bias > 1e-3


def slow_baseline(value_AT: Tensor, mask_AT: Tensor, allowed_BA: Tensor) -> Tensor:
    result_BT = torch.zeros(allowed_BA.shape[0], value_AT.shape[1], dtype=value_AT.dtype)
    for b in range(allowed_BA.shape[0]):
        for t in range(value_AT.shape[1]):
            seen = [float(value_AT[a, t]) for a in range(len(value_AT)) if allowed_BA[b, a] and mask_AT[a, t]]
            result_BT[b, t] = sum(seen) / len(seen) if seen else 0.0
    return result_BT


def random_rows(case: int) -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(case)
    value_AT = torch.randn(6, 5, generator=noise, dtype=torch.float64)
    mask_AT = torch.arange(5) < torch.randint(0, 6, (6, 1), generator=noise)
    return value_AT, mask_AT, torch.rand(4, 6, generator=noise) < 0.5


def test_position_baseline_is_the_plain_mean() -> None:
    for case in range(30):
        value_AT, mask_AT, allowed_BA = random_rows(case)
        value_AT = torch.where(mask_AT, value_AT, 1e6)  # what lies off the mask must not count
        assert_close(position_baseline(value_AT, mask_AT, allowed_BA), slow_baseline(value_AT, mask_AT, allowed_BA))


def test_a_mean_that_counts_ended_rows_is_noticed() -> None:
    """Negative control: dividing by the number of allowed rows instead of those still alive."""
    value_AT, mask_AT, allowed_BA = random_rows(0)
    value_AT = torch.where(mask_AT, value_AT, 0.0)
    allowed_BA[:] = True
    with pytest.raises(AssertionError):
        assert_close(value_AT.mean(0).expand(4, 5), slow_baseline(value_AT, mask_AT, allowed_BA))


def test_a_nan_off_the_mask_stays_there() -> None:
    value_AT, mask_AT, allowed_BA = random_rows(0)
    want_BT = position_baseline(torch.where(mask_AT, value_AT, 0.0), mask_AT, allowed_BA)
    assert torch.equal(position_baseline(torch.where(mask_AT, value_AT, torch.nan), mask_AT, allowed_BA), want_BT)


def test_with_no_row_left_the_baseline_is_zero() -> None:
    value_AT, mask_AT, _ = random_rows(1)
    nobody_BA = torch.zeros(4, 6, dtype=torch.bool)
    assert torch.equal(position_baseline(value_AT, mask_AT, nobody_BA), torch.zeros(4, 5, dtype=torch.float64))


def test_peers_are_what_their_names_say() -> None:
    prompt_B, row_B = torch.tensor([0, 0, 1]), torch.tensor([4, 5, 6])
    prompt_A, row_A = torch.tensor([1, 0, 0, 1, 2]), torch.tensor([7, 4, 5, 6, 8])
    where = {"prompt_B": prompt_B, "row_B": row_B, "prompt_A": prompt_A, "row_A": row_A}
    assert peers("position_mean", **where).int().tolist() == [[1, 0, 0, 1, 1], [1, 0, 0, 1, 1], [0, 1, 1, 0, 1]]
    assert peers("leave_one_out", **where).int().tolist() == [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_baseline_carries_no_gradient() -> None:
    value_AT, mask_AT, allowed_BA = random_rows(2)
    assert not position_baseline(value_AT.requires_grad_(), mask_AT, allowed_BA).requires_grad


def test_peers_of_another_number_of_rows_are_refused() -> None:
    value_AT, mask_AT, allowed_BA = random_rows(2)
    with pytest.raises(ShapeMismatch, match="rows that may serve"):
        position_baseline(value_AT[:5], mask_AT[:5], allowed_BA)

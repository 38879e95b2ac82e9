"""A student that is held to an anchor: the library's credit, averaged over every response and every fall of the coins,
is the gradient of KL(student || teacher) + weight KL(student || anchor) over whole responses.

Responses end at EOS, so their lengths vary. Nothing is sampled: where a test says equal it means 1e-12.

Legend: X beginnings, V ids, T response positions, N distinct responses, K coin patterns, D entries of the student's
table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import advantages, divergences
from minillm.config import RunConfig
from minillm.errors import UnsupportedCombination
from minillm.selftest.listed import (
    ALPHA,
    BEGINNINGS,
    IDS,
    LONGEST,
    Listed,
    finite_difference,
    listed,
    policy_loss_N,
    rough,
    scored_of,
    stage,
    tables,
    targets_of,
)
from minillm.shadow import moved_
from minillm.stage_config import MinillmStage
from minillm.types import AnchorScores, Scored

WEIGHT = 0.7
STUDENT, TEACHER = tables()
ANCHOR = rough(BEGINNINGS, IDS, seed=7)


def held(**settings: Any) -> MinillmStage:
    return stage(**{"anchor": {"weight": WEIGHT}, **settings})


def to_anchor(of: Listed) -> Listed:
    """The same responses with the anchor in the teacher's place."""
    other = listed(STUDENT, ANCHOR)
    return dataclasses.replace(of, logp_NTV=other.logp_NTV)


def wanted(of: Listed) -> Tensor:
    """The gradient of both KLs of whole responses, written out."""
    return of.gradient(of.sequence_kl() + WEIGHT * to_anchor(of).sequence_kl())


def scored(of: Listed, drew_NT: Tensor) -> Scored:
    anchored = to_anchor(of)
    kl_NT = torch.where(of.mask_NT, divergences.reverse_kl(of.logq_NTV, anchored.logp_NTV), 0.0)
    every_N = torch.arange(len(of.mask_NT))
    return dataclasses.replace(
        scored_of(of, every_N, drew_BT=drew_NT),
        anchor=AnchorScores(logp_BT=anchored.logp_NT.detach(), kl_BT=kl_NT.detach()),
    )


def loss_N(of: Listed, chosen: MinillmStage, drew_NT: Tensor) -> Tensor:
    """The loss of each response as the stage makes it."""
    targets = targets_of(scored(of, drew_NT), chosen)
    share_NT = 1.0 if targets.single_weight_BT is None else targets.single_weight_BT
    long_N = policy_loss_N(of, targets.advantage_BT, weight_NT=targets.importance_BT)
    return chosen.single_weight * (share_NT * of.kl_NT).sum(1) + chosen.long_weight * long_N


def made(of: Listed, chosen: MinillmStage) -> Tensor:
    """Its expected gradient over responses and coins."""
    found = torch.zeros(BEGINNINGS * IDS, dtype=torch.float64)
    for coins in itertools.product([False, True], repeat=LONGEST):
        heads_T = torch.tensor(coins)
        chance = math.prod(chosen.teacher_mix if heads else 1.0 - chosen.teacher_mix for heads in coins)
        if chance == 0.0:
            continue
        of_token_NT = torch.where(heads_T, of.logp_NT, of.logq_NT.detach()).exp()
        chance_N = chance * torch.where(of.mask_NT, of_token_NT, 1.0).prod(dim=1)
        drew_NT = heads_T & of.mask_NT
        found = found + of.expected_gradient(loss_N(of, chosen, drew_NT), chance_N=chance_N)
    return found


def off(got_D: Tensor, want_D: Tensor) -> float:
    return float((got_D - want_D).norm() / want_D.norm())


EXACT: list[dict[str, Any]] = [
    {"future": future, "single_weight": single, **mixed}
    for future in ("sampled", "expected")
    for single in (1.0, 0.0)
    for mixed in ({}, {"teacher_mix": ALPHA, "importance": "per_decision"})
]


def test_what_is_wanted_is_what_finite_differences_say() -> None:
    def both(student_XV: Tensor) -> Tensor:
        of = listed(student_XV, TEACHER)
        return of.sequence_kl() + WEIGHT * listed(student_XV, ANCHOR).sequence_kl()

    of = listed(STUDENT, TEACHER)
    torch.testing.assert_close(wanted(of), finite_difference(both, STUDENT), rtol=0, atol=1e-8)


def test_an_anchor_at_rate_1_is_no_other_objective_and_is_told_to_have_no_effect() -> None:
    for rate, idle in ((1.0, {"anchor.rate 1: it is the student that samples": ["anchor"]}), (0.99, {})):
        chosen = held(anchor={"weight": 0.7, "rate": rate})
        assert chosen.idle_settings(tempered=False) == idle
        assert bool(chosen.bias_reasons(truncated=False, tempered=False)) == (rate < 1)


@pytest.mark.parametrize("settings", EXACT, ids=str)
def test_the_credit_is_the_gradient_of_both_divergences(settings: dict[str, Any]) -> None:
    of, chosen = listed(STUDENT, TEACHER), held(**settings)
    torch.testing.assert_close(made(of, chosen), wanted(of), rtol=0, atol=1e-12)
    reasons = chosen.bias_reasons(truncated=False, tempered=False)
    assert reasons == ["anchor: another objective, with 0.7 KL(student || moving average of the student) added"]
    without = of.gradient(of.sequence_kl())
    assert off(without, wanted(of)) > 0.1, "a control: the anchor's gradient is no rounding"


@pytest.mark.parametrize(("importance", "least"), [("coin", 0.005), ("per_step", 0.005), ("truncated", 0.0005)])
def test_weights_that_are_not_exact_bend_it_and_say_so(importance: str, least: float) -> None:
    more = {"weight_cap": 1.1} if importance == "truncated" else {}
    of, chosen = listed(STUDENT, TEACHER), held(teacher_mix=ALPHA, importance=importance, **more)
    assert off(made(of, chosen), wanted(of)) > least
    assert len(chosen.bias_reasons(truncated=False, tempered=False) or []) > 1


@pytest.mark.parametrize("lost", ["_anchor_here", "_anchor_reward"])
@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_each_half_is_needed(lost: str, future: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token's own share, or without that of the tokens after it, it is another gradient."""
    of, chosen = listed(STUDENT, TEACHER), held(future=future)
    monkeypatch.setattr(advantages, lost, lambda scored, weight, **_: torch.zeros_like(scored.logq_BT))
    assert off(made(of, chosen), wanted(of)) > 0.02


def test_the_expectation_at_a_state_changes_no_gradient_and_takes_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    of, chosen = listed(STUDENT, TEACHER), held(future="expected", importance="none")
    none_NT = torch.zeros_like(of.mask_NT)

    def variance() -> float:
        loss = loss_N(of, chosen, none_NT)
        each_ND = torch.stack([of.gradient(one) for one in loss])
        return float(of.chance_N @ (each_ND - wanted(of)).square().sum(1))

    centred = variance()

    def uncentred(scored: Scored, weight: float) -> Tensor:
        assert scored.anchor is not None
        return weight * (scored.anchor.logp_BT - scored.logq_BT)

    monkeypatch.setattr(advantages, "_anchor_here", uncentred)
    torch.testing.assert_close(made(of, chosen), wanted(of), rtol=0, atol=1e-12)
    assert centred < variance()


def test_at_teacher_and_anchor_nothing_moves() -> None:
    of = listed(STUDENT, STUDENT)
    same = dataclasses.replace(
        scored_of(of, torch.arange(len(of.mask_NT))),
        anchor=AnchorScores(logp_BT=of.logp_NT.detach(), kl_BT=torch.zeros_like(of.kl_NT.detach())),
    )
    assert float(targets_of(same, held(future="sampled")).advantage_BT.abs().max()) < 1e-15


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_an_anchor_that_is_the_teacher_is_a_heavier_teacher(future: str) -> None:
    """KL(q || p) + w KL(q || p) = (1 + w) KL(q || p)."""
    of = listed(STUDENT, TEACHER)
    own = dataclasses.replace(
        scored_of(of, torch.arange(len(of.mask_NT))),
        anchor=AnchorScores(logp_BT=of.logp_NT.detach(), kl_BT=of.kl_NT.detach()),
    )
    chosen = held(future=future)
    advantage_NT = targets_of(own, chosen).advantage_BT
    loss = of.kl_NT.sum(1) + policy_loss_N(of, advantage_NT)
    want_D = (1 + WEIGHT) * of.gradient(of.sequence_kl())
    torch.testing.assert_close(of.expected_gradient(loss), want_D, rtol=0, atol=1e-12)


def test_advantages_carry_no_gradient() -> None:
    of = listed(STUDENT, TEACHER)
    targets = targets_of(scored(of, torch.zeros_like(of.mask_NT)), held())
    assert not targets.advantage_BT.requires_grad and not bool(targets.advantage_BT[~of.mask_NT].any())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"long_weight": 0.0}, "anchor of weight 0.7 with long_weight 0"),
        ({"estimator": "official"}, "set estimator: exact, or anchor: null"),
        ({"future": "sampled", "published": {"reward_clip": 3.0}}, "anchor with published.reward_clip"),
    ],
)
def test_what_would_not_be_that_gradient_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedCombination, match=words):
        held(**settings)


def test_an_anchor_with_adapters_is_refused() -> None:
    with pytest.raises(UnsupportedCombination, match="has an anchor with lora: an average of adapters"):
        RunConfig(
            name="run", student="students/gpt2", teacher="teachers/gpt2-xl",
            data={"train": "rows.jsonl", "max_prompt_tokens": 4}, decoding={"max_new_tokens": 4},
            stages=(held(),), lora={"rank": 2},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("rate", "steps", "want"), [(0.01, 100, 0.6339676587), (0.0, 7, 0.0), (1.0, 1, 1.0), (0.1, 3, 0.271)]
)
def test_the_average_follows_a_constant_target_in_closed_form(rate: float, steps: int, want: float) -> None:
    """After n steps it has come 1 - (1 - rate)^n of the way; at 0 it stays, at 1 it is the student."""
    shadow = torch.zeros(1, dtype=torch.float64)
    for _ in range(steps):
        moved_(shadow, torch.ones(1), rate=rate)
    assert float(shadow) == pytest.approx(want, abs=1e-9) == pytest.approx(1 - (1 - rate) ** steps, abs=1e-9)


def test_in_sixteen_bits_it_never_moves() -> None:
    """Why it is kept in 32: from 1.0 towards 1.25 by a hundredth."""
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        shadow = torch.ones(1, dtype=dtype)
        for _ in range(1000):
            moved_(shadow, torch.full((1,), 1.25, dtype=dtype), rate=0.01)
        ends[dtype] = float(shadow)
    assert ends[torch.float32] == pytest.approx(1.24999, abs=2e-5)
    assert ends[torch.bfloat16] == 1.0

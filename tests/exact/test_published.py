"""The published code's deviations: golden numbers, and a slow twin of its whole credit, written from its description.

Legend: B rows, T positions.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.advantages import RowNames, targets_of
from minillm.credit import whitened_with_padding
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.policy_loss import clipped_surrogate
from minillm.published import OFFICIAL, PublishedConfig
from minillm.selftest.listed import OneRank
from minillm.stage_base import OptimiserConfig
from minillm.stage_config import MinillmStage
from minillm.types import PromptBatch, Rollout, Scored, Stop
from tests.exact.tabular import assert_close

LONGEST = 8


def stage(**changes: Any) -> MinillmStage:
    plain = {"steps": 1, "prompts": 4, "optimiser": OptimiserConfig(lr=1e-3), "lm_batch": 2}
    return MinillmStage(**(plain | changes))


def scored(*, seed: int = 0, rows: int = 4) -> Scored:
    """Rows of one to six tokens with random log-probabilities that 16 bits do not hold."""
    noise = torch.Generator().manual_seed(seed)
    length_B = torch.randint(1, 7, (rows,), generator=noise)
    mask_BT = torch.arange(6) < length_B[:, None]
    logq_BT, logp_BT = (
        torch.where(mask_BT, -4 * torch.rand(rows, 6, generator=noise, dtype=torch.float64), 0.0) for _ in range(2)
    )
    ids_B1 = torch.ones(rows, 1, dtype=torch.long)
    rollout = Rollout(
        prompts=PromptBatch(
            uid_B=tuple(map(str, range(rows))), sample_B=(0,) * rows, ids_BP=ids_B1, mask_BP=ids_B1 > 0
        ),
        response_BT=mask_BT.long(), mask_BT=mask_BT, stop_B=(Stop.EOS,) * rows,
        teacher_drew_BT=torch.zeros_like(mask_BT), logq_BT=logq_BT, student_hidden_BTH=None, teacher_hidden_BTH=None,
        support_BTC=None, policy_step=0,
    )  # fmt: skip
    kl_BT = torch.where(mask_BT, torch.rand(rows, 6, generator=noise, dtype=torch.float64), 0.0)
    return Scored(rollout=rollout, logq_BT=logq_BT, logp_BT=logp_BT, reverse_kl_BT=kl_BT, entropy_BT=kl_BT)


def targets(chosen: MinillmStage, of: Scored, **more: Any) -> Any:
    row_B = torch.arange(len(of.logq_BT))
    names = RowNames(prompt_B=row_B, row_B=row_B, coin_group_B=row_B)
    return targets_of(of, chosen, names=names, ranks=OneRank(), longest=LONGEST, **more)  # type: ignore[arg-type]


def published_credit(of: Scored, *, alpha: float, reward_logp_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and weights, token by token, as minillm.md describes the published code."""

    def half(value: float) -> float:
        return float(torch.tensor(value).half())

    rows, width = of.logq_BT.shape
    value = [[0.0] * LONGEST for _ in range(rows)]
    weight_BT = torch.zeros_like(of.logq_BT)
    for b in range(rows):
        length = int(of.rollout.mask_BT[b].sum())
        reward = []
        for t in range(length):
            q, p = half(float(of.logq_BT[b, t])), half(float(of.logp_BT[b, t]))
            reward.append(max(-100.0, min(100.0, (half(float(reward_logp_BT[b, t])) - q) / 0.5)))
            weight_BT[b, t] = math.exp(q) / ((1 - alpha) * math.exp(q) + alpha * math.exp(p))
        later = 0.0
        for t in reversed(range(length)):
            later = reward[t] + 0.95 * later
            value[b][t] = later / (length - t)
    flat = torch.tensor(value, dtype=torch.float64)
    whitened = (flat - flat.mean()) / (flat.var(correction=0) + 1e-8).sqrt()
    return torch.where(of.rollout.mask_BT, whitened[:, :width], 0.0), weight_BT


@pytest.mark.parametrize("alpha", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_official_is_the_published_credit_term_by_term(seed: int, alpha: float) -> None:
    of = scored(seed=seed)
    other_BT = torch.where(of.rollout.mask_BT, of.logp_BT * 1.1, 0.0)
    found = targets(stage(estimator="official", teacher_mix=alpha), of, reward_logp_BT=other_BT)
    advantage_BT, weight_BT = published_credit(of, alpha=alpha, reward_logp_BT=other_BT)
    assert_close(found.advantage_BT, advantage_BT, atol=1e-10)
    assert_close(found.importance_BT, weight_BT, atol=1e-10)
    assert found.single_weight_BT is None


CREDIT_SWITCHES = ["present_twice", "count_divisor", "whiten_padding", "half_log_probs", "reward_clip"]


@pytest.mark.parametrize("name", CREDIT_SWITCHES)
def test_each_switch_by_itself_changes_the_credit(name: str) -> None:
    """Negative control of the twin: with one of them off the figures are others. (Whitening hides the scale.)"""
    of = scored()
    off = {"reward_clip": 1.0} if name == "reward_clip" else {name: False}
    changed = stage(estimator="official", teacher_mix=0.2, published=off)
    usual = targets(stage(estimator="official", teacher_mix=0.2), of)
    assert float((targets(changed, of).advantage_BT - usual.advantage_BT).abs().max()) > 1e-6


def test_golden_returns_over_a_count() -> None:
    """r = (1, 2, 3), gamma 0.95: 5.6075 / 3, 4.85 / 2, 3; the consistent divisor gives 1.9658, 2.4872, 3."""
    of = scored(rows=1)
    mask_BT = torch.arange(6)[None] < 3
    reward_BT = torch.where(mask_BT, torch.arange(1.0, 7.0, dtype=torch.float64), 0.0)
    import dataclasses

    rollout = dataclasses.replace(of.rollout, mask_BT=mask_BT, logq_BT=0 * reward_BT)
    of = dataclasses.replace(of, rollout=rollout, logq_BT=0 * reward_BT, logp_BT=reward_BT)
    shaped = {"future": "sampled", "baseline": "none", "gamma": 0.95, "length_norm": True, "teacher_mix": 0.0}
    both = {"present_twice": True, "count_divisor": True}
    got_BT = targets(stage(**shaped, published=both), of).advantage_BT
    assert_close(got_BT[:, :3], torch.tensor([[1.8691667, 2.425, 3.0]], dtype=torch.float64), atol=1e-6)
    got_BT = targets(stage(**shaped, published={"present_twice": True}), of).advantage_BT
    assert_close(got_BT[:, :3], torch.tensor([[1.965820, 2.487179, 3.0]], dtype=torch.float64), atol=1e-6)


def test_golden_whitening_over_padding() -> None:
    """(2, 2.5, 3) and five pads: (0.8597, 1.2643, 1.6689); and another limit on length gives other numbers."""
    value_BT = torch.tensor([[2.0, 2.5, 3.0]], dtype=torch.float64)
    mask_BT = torch.ones(1, 3, dtype=torch.bool)
    got_BT = whitened_with_padding(value_BT, mask_BT, longest=8)
    assert_close(got_BT, torch.tensor([[0.8597, 1.2643, 1.6689]], dtype=torch.float64), atol=5e-5)
    assert float((whitened_with_padding(value_BT, mask_BT, longest=16) - got_BT).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("ratio", "advantage", "dead"), [(0.16, 1.0, True), (0.17, 1.0, False), (2.26, -1.0, True), (2.24, -1.0, False)]
)
def test_the_weight_in_the_clip_deletes_gradient_before_any_update(ratio: float, advantage: float, dead: bool) -> None:
    """At alpha = epsilon = 0.2: where A > 0 and p/q < 1/6, or A < 0 and p/q > 2.25."""
    new_N = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    weight_N = torch.tensor([1.0 / (0.8 + 0.2 * ratio)], dtype=torch.float64)
    how: dict[str, Any] = {
        "advantage": torch.tensor([advantage], dtype=torch.float64), "importance": weight_N, "clip": 0.2,
        "max_log_ratio": 20.0,
    }  # fmt: skip
    for inside, want in ((True, dead), (False, False)):
        loss = clipped_surrogate(new_N, torch.zeros_like(new_N), **how, weight_in_clip=inside).loss.sum()
        (slope_N,) = torch.autograd.grad(loss, new_N)
        assert (float(slope_N) == 0.0) is want
        if not want:
            assert float(slope_N) == pytest.approx(-advantage * float(weight_N))


def test_official_fills_in_what_the_file_does_not_say() -> None:
    chosen = stage(
        estimator="official", gamma=1.0, published={"token_mean": False}, lm_coefficient=0.0, lm_teacher_share=0.0
    )
    assert (chosen.gamma, chosen.future, chosen.importance, chosen.inner_epochs) == (1.0, "sampled", "per_step", 4)
    assert chosen.published.whiten_padding and not chosen.published.token_mean and chosen.lm_coefficient == 0.0
    object_too = stage(estimator="official", published=PublishedConfig(token_mean=False))
    assert object_too.gamma == 0.95 and object_too.published == chosen.published
    again = MinillmStage(**chosen.model_dump())
    assert again == chosen and MinillmStage(**dict(chosen)) == chosen
    assert stage().published == PublishedConfig() and stage().published.named() == []
    assert set(OFFICIAL["published"]) <= set(PublishedConfig.model_fields)


def test_every_deviation_is_named_as_a_bias() -> None:
    reasons = stage(estimator="official", teacher_mix=0.0).bias_reasons(truncated=False, tempered=False)
    assert reasons is not None
    for name in OFFICIAL["published"]:
        assert f"published.{name}" in reasons, name
    assert {"discount 0.95", "length normalisation", "several updates on a rollout", "language-model anchor"} <= set(
        reasons
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"published": {"count_divisor": True}}, "nothing is divided"),
        ({"published": {"whiten_padding": True}, "whiten": "masked"}, "scaled twice"),
        ({"published": {"present_twice": True}, "single_weight": 0.0}, "is there already"),
        ({"lm_teacher_share": 0.5}, "there is no such loss"),
        ({"published": {"reward_clip": 1.0}}, "sampled rewards"),
    ],
)
def test_what_would_change_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedCombination, match=words):
        stage(**changes)
    with pytest.raises(ConfigError, match="did you mean"):
        stage(published={"token_meen": True})

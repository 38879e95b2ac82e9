"""What a stage says has no effect has none: with it and without it, what reaches the loss is the same to the last bit;
and what is not said to be idle is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.advantages import RowNames, targets_of
from minillm.policy_loss import clipped_surrogate
from minillm.selftest.listed import OneRank
from minillm.stage_config import MinillmStage
from tests.exact.test_credit_choices import LENGTH, Listed, both_rows, scored_rows, stage

PLAIN = {"future": "expected", "baseline": "position_mean"}
"""As by default."""
MIXED = {"teacher_mix": 0.2, "coin_groups": 2}
OFF: list[dict[str, Any]] = [{"long_weight": 0.0}, {"gamma": 0.0}]
"""What leaves no advantage."""
IDLE: list[tuple[dict[str, Any], dict[str, list[str]]]] = [
    ({"baseline": "ridge"}, {}),
    ({"long_weight": 0.0, "gamma": 0.5, "horizon": 2}, {"long_weight 0": ["gamma", "horizon"]}),
    ({"long_weight": 0.0, "baseline": "ridge"}, {"long_weight 0": ["baseline"]}),
    ({"long_weight": 0.0, "future": "expected"}, {}),  # as by default
    ({"gamma": 0.0, "baseline": "ridge"}, {"gamma 0: nothing is ahead": ["baseline"]}),
    ({"gamma": 0.0, "length_norm": True}, {"gamma 0: nothing is ahead": ["length_norm"]}),
    ({"gamma": 0.0, "whiten": "masked", "horizon": 3}, {"gamma 0: nothing is ahead": ["whiten", "horizon"]}),
    ({"gamma": 0.0, "published": {"reward_scale": 0.5}}, {"gamma 0: nothing is ahead": ["published.reward_scale"]}),
    ({"gamma": 0.0, "single_weight": 0.0, "horizon": 2}, {"gamma 0: the present token alone counts": ["horizon"]}),
    ({"length_norm": True, "published": {"count_divisor": True}}, {"gamma 1": ["published.count_divisor"]}),
    ({"importance": "per_step", "coin_groups": 3}, {"teacher_mix 0": ["importance", "coin_groups"]}),
    ({"published": {"weight_on_single": True}}, {"teacher_mix 0": ["published.weight_on_single"]}),
    ({"repetition_ngram": 2}, {"repetition_weight 0": ["repetition_ngram"]}),
    (
        {"future": "sampled", "published": {"untempered_reward": True}},
        {"decoding.temperature 1": ["published.untempered_reward"]},
    ),
    ({"lm_batch": 4}, {"lm_coefficient 0": ["lm_batch"]}),
    *(
        (changes | setting, {reason: list(names)})
        for changes, reason in (
            ({"long_weight": 0.0, **MIXED}, "long_weight 0"), ({"gamma": 0.0, **MIXED}, "gamma 0: nothing is ahead")
        )
        for setting, names in (
            ({"importance": "per_step"}, ["importance"]),
            ({"dual_clip": 1.5, "inner_epochs": 2}, ["dual_clip"]),
            ({"max_log_ratio": 0.5, "inner_epochs": 2}, ["max_log_ratio"]),
            ({"published": {"weight_in_clip": True}}, ["published.weight_in_clip"]),
        )
    ),
]  # fmt: skip
BUSY: list[dict[str, Any]] = [
    {"gamma": 0.5},
    {"gamma": 0.5, "horizon": 1},
    {"gamma": 0.0, "baseline": "none", "repetition_weight": 0.5, "repetition_ngram": 1},
    {"gamma": 0.0, "single_weight": 0.0, "baseline": "none"},
    {"gamma": 0.0, "published": {"present_twice": True, "reward_scale": 0.5}},
    {"gamma": 0.5, "length_norm": True, "published": {"count_divisor": True}},
    {**MIXED, "importance": "per_step"},
    {**MIXED, "importance": "per_decision", "long_weight": 0.0},
    {**MIXED, "published": {"weight_on_single": True}},
    *({**MIXED, **off, "published": {"weight_on_single": True}, "importance": "per_step"} for off in OFF),
    *({**MIXED, **off, "importance": "per_decision", "max_log_ratio": 0.1} for off in OFF),
    *({**off, "inner_epochs": 2, "inner_kl": 0.1, "max_log_ratio": 0.5} for off in OFF),
    {"inner_epochs": 2, "max_log_ratio": 0.5},
    {"inner_epochs": 2, "dual_clip": 1.5},
    {**MIXED, "published": {"weight_in_clip": True}},
]


def told(chosen: MinillmStage) -> list[str]:
    return [name for names in chosen.idle_settings(tempered=False).values() for name in names]


def by_default(chosen: MinillmStage, names: list[str]) -> MinillmStage:
    values = chosen.model_dump()
    for name in names:
        section, _, key = name.rpartition(".")
        fields = MinillmStage.model_fields
        if section:
            values[section].pop(key)
        else:
            values[name] = fields[name].get_default()
    return MinillmStage(**values)


def reaches_the_loss(chosen: MinillmStage) -> list[Tensor]:
    """Credit and weight of the single-step term, as they enter the loss, of two long rows; one repeats itself. Beside
    them the surrogate's loss and gradient for a student that has moved since, and how far, where that ends a step."""
    student, rows = both_rows((0, 1), length=LENGTH)
    listed = [Listed.of(row, student.logits(row.response_NT, prompt=p)) for p, row in enumerate(rows)]
    again = [n for n, ids in enumerate(rows[0].response_NT.tolist()) if rows[0].mask_NT[n].all() and ids[0] == ids[1]]
    longest = [again[0], int(rows[1].mask_NT.sum(1).argmax())]
    heads_RT = torch.tensor([[True, False, False], [False, False, True]]) & (chosen.teacher_mix > 0)
    scored = scored_rows(list(zip(listed, longest, strict=True)), heads_RT)
    names = RowNames(prompt_B=torch.tensor([0, 1]), row_B=torch.arange(2), coin_group_B=torch.tensor([0, 1]))
    targets = targets_of(scored, chosen, names=names, ranks=OneRank(), longest=LENGTH)  # type: ignore[arg-type]
    single_BT = torch.ones_like(targets.advantage_BT) if targets.single_weight_BT is None else targets.single_weight_BT
    moved_BT = 2.0 * torch.randn(scored.logq_BT.shape, generator=torch.Generator().manual_seed(7))
    logq_BT = (scored.logq_BT + moved_BT).requires_grad_()
    surrogate = clipped_surrogate(
        logq_BT, scored.logq_BT, advantage=targets.advantage_BT, importance=targets.importance_BT, clip=chosen.clip,
        max_log_ratio=chosen.max_log_ratio, dual_clip=chosen.dual_clip,
        weight_in_clip=chosen.published.weight_in_clip,
    )  # fmt: skip
    loss_BT = chosen.long_weight * surrogate.loss
    return [
        chosen.long_weight * targets.importance_BT * targets.advantage_BT,
        loss_BT.detach(),
        *torch.autograd.grad(loss_BT.sum(), logq_BT),
        *([] if chosen.inner_kl is None else [surrogate.drift]),
        torch.where(scored.rollout.mask_BT, chosen.single_weight * single_BT, 0.0),
    ]


@pytest.mark.parametrize(("changes", "idle"), IDLE)
def test_what_is_idle_is_told_and_changes_nothing(changes: dict[str, Any], idle: dict[str, list[str]]) -> None:
    chosen = stage(**PLAIN | changes)
    assert chosen.idle_settings(tempered=False) == idle
    without = by_default(chosen, told(chosen))
    assert told(without) == []
    for mine, plain in zip(reaches_the_loss(chosen), reaches_the_loss(without), strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("changes", BUSY)
def test_what_has_an_effect_is_not_told(changes: dict[str, Any]) -> None:
    chosen = stage(**PLAIN | changes)
    assert told(chosen) == []
    plain = by_default(chosen, [list(changes)[-1]])
    same = [torch.equal(a, b) for a, b in zip(reaches_the_loss(chosen), reaches_the_loss(plain), strict=True)]
    assert not all(same)


def test_a_clip_has_no_effect_at_one_update_a_rollout() -> None:
    assert stage(**PLAIN, clip=0.5).idle_settings(tempered=False) == {"one update on each rollout": ["clip"]}
    assert told(stage(**PLAIN, clip=0.5, inner_epochs=2)) == []


def test_a_choice_of_weights_to_keep_needs_validations() -> None:
    named = {"metric": "rouge_l", "mode": "max"}
    assert told(stage(**PLAIN, keep=named)) == ["keep"]
    assert told(stage(**PLAIN, keep=named, validate_every=1)) == []

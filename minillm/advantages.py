"""From a scored rollout to targets: the credit that a stage names, made from the rows of all ranks.

Legend: B this rank's rows, A all ranks' rows, T response positions, N kept tokens of this rank, D features.

Each choice by itself is a pure function of ``credit``, ``ridge`` or ``policy_loss``; which of them leave the expected
gradient untouched is enumerated in tests/exact and said for a whole stage by ``MinillmStage.bias_reasons``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from minillm import credit
from minillm.policy_loss import importance_weights, running_products
from minillm.ranks import Ranks
from minillm.repetition import repetition_rewards
from minillm.ridge import FOLDS, cross_fitted, projected
from minillm.sampling import coin_group
from minillm.stage_checks import BY_TOKEN, CHAINED
from minillm.stage_config import MinillmStage
from minillm.types import Rollout, Scored, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class RowNames:
    """Who this rank's rows are, in numbers that mean the same on all ranks."""

    prompt_B: Tensor
    row_B: Tensor
    coin_group_B: Tensor

    @classmethod
    def of(cls, rollout: Rollout, *, prompt: Sequence[int], row: Sequence[int], coin_groups: int) -> Self:
        """``prompt`` is the number of each row's prompt, ``row`` its own among the rows of all ranks."""
        groups = [coin_group(uid, coin_groups) for uid in rollout.prompts.uid_B]
        prompt_B, row_B, group_B = torch.tensor([prompt, row, groups], dtype=torch.long, device=rollout.mask_BT.device)
        return cls(prompt_B=prompt_B, row_B=row_B, coin_group_B=group_B)


@torch.no_grad()
def targets_of(
    scored: Scored,
    stage: MinillmStage,
    *,
    names: RowNames,
    ranks: Ranks,
    longest: int,
    reward_logp_BT: Tensor | None = None,
) -> Targets:
    """Advantages and weights of every token of this rank, all detached, 0 off the mask. Every rank must call it.

    ``longest`` is how long a response may be. ``reward_logp_BT`` stands in for the teacher's log-probabilities in
    rewards (``published.untempered_reward``).
    """
    if stage.published.half_log_probs:
        scored = _halved(scored)
        reward_logp_BT = None if reward_logp_BT is None else reward_logp_BT.half().to(reward_logp_BT.dtype)
    mask_BT = scored.rollout.mask_BT
    weight_BT = importance_weights(
        stage.importance,
        logq_BT=scored.logq_BT,
        logp_BT=scored.logp_BT,
        teacher_drew_BT=scored.rollout.teacher_drew_BT,
        teacher_mix=stage.teacher_mix,
        max_log_ratio=stage.max_log_ratio,
        cap=stage.weight_cap,
    )
    chained = stage.importance in CHAINED and stage.teacher_mix > 0
    before_BT = None
    advantage_BT = returns_of(scored, stage, carry_BT=weight_BT if chained else None, reward_logp_BT=reward_logp_BT)
    if chained:
        before_BT, weight_BT = running_products(weight_BT, mask_BT, max_log=stage.max_log_ratio)
    if stage.baseline == "grpo":
        advantage_BT = _group_scores(advantage_BT, mask_BT, names, ranks=ranks)
    elif stage.baseline == "ridge":
        advantage_BT = advantage_BT - _ridge(advantage_BT, scored, stage, names=names, ranks=ranks)
    elif stage.baseline != "none":
        advantage_BT = advantage_BT - _mean_of_peers(advantage_BT, mask_BT, stage, names=names, ranks=ranks)
    if stage.whiten == "masked":
        advantage_BT = credit.whitened(advantage_BT, mask_BT, total=ranks.sum)
    elif stage.published.whiten_padding:
        advantage_BT = credit.whitened_with_padding(advantage_BT, mask_BT, longest=longest, total=ranks.sum)
    if stage.published.weight_on_single:
        before_BT = torch.where(mask_BT, weight_BT, 0.0)
    return Targets(
        scored=scored,
        advantage_BT=torch.where(mask_BT, advantage_BT, 0.0),
        importance_BT=torch.where(mask_BT, weight_BT, 0.0),
        single_weight_BT=before_BT,
    )


def _halved(scored: Scored) -> Scored:
    """Log-probabilities of the sampled tokens as 16 bits hold them."""
    logq_BT, logp_BT = (value.half().to(value.dtype) for value in (scored.logq_BT, scored.logp_BT))
    return dataclasses.replace(scored, logq_BT=logq_BT, logp_BT=logp_BT)


def returns_of(
    scored: Scored, stage: MinillmStage, *, carry_BT: Tensor | None, reward_logp_BT: Tensor | None = None
) -> Tensor:
    """The return of each token, [B, T]: from the next token on, or from the present one where there is no single-step
    term that holds it.

    An anchor's share of a token counts from the present one on in any case, since the single-step term does not hold
    it. ``carry_BT`` are importance weights by which everything after a token counts. For ``grpo`` a row's whole reward.
    What repetition costs counts from the present token on in any case: the single-step term does not hold it.
    """
    mask_BT = scored.rollout.mask_BT
    own = stage.published
    sampled_BT = ((scored.logp_BT if reward_logp_BT is None else reward_logp_BT) - scored.logq_BT) / own.reward_scale
    if own.reward_clip is not None:
        sampled_BT = sampled_BT.clamp(-own.reward_clip, own.reward_clip)
    reward_BT = sampled_BT if stage.future == "sampled" else -scored.reverse_kl_BT / own.reward_scale
    if stage.anchor is not None:
        reward_BT = reward_BT + _anchor_reward(scored, stage.anchor.weight, sampled=stage.future == "sampled")
    cost_BT = None
    if stage.repetition_weight > 0.0:
        again_BT = repetition_rewards(scored.rollout.response_BT, mask_BT, ngram=stage.repetition_ngram)
        cost_BT = stage.repetition_weight * again_BT.to(reward_BT.dtype)
    if stage.baseline == "grpo":
        return credit.whole_return(reward_BT if cost_BT is None else reward_BT - cost_BT, mask_BT)
    if carry_BT is not None and stage.future == "sampled":
        reward_BT = reward_BT * carry_BT  # a reward is its token's own doing too; the KL at a state is not
    ahead_BT = stage.gamma * credit.future_return(
        reward_BT, mask_BT, gamma=stage.gamma, horizon=stage.horizon, carry_BT=carry_BT
    )
    step = 1.0 if own.count_divisor else stage.gamma
    count_BT = credit.future_return(torch.ones_like(reward_BT), mask_BT, gamma=step, horizon=stage.horizon)
    if stage.single_weight == 0.0 or own.present_twice:
        ahead_BT = sampled_BT + ahead_BT
        count_BT = 1.0 + step * count_BT
    return_BT = ahead_BT / count_BT.clamp(min=1.0) if stage.length_norm else ahead_BT
    if stage.anchor is not None:
        return_BT = return_BT + _anchor_here(scored, stage.anchor.weight)
    if cost_BT is None:
        return return_BT
    return return_BT - credit.return_to_go(
        cost_BT, mask_BT, gamma=stage.gamma, per_token=stage.length_norm, horizon=stage.horizon, carry_BT=carry_BT
    )


def _anchor_reward(scored: Scored, weight: float, *, sampled: bool) -> Tensor:
    """What a token's share of KL(student || anchor) takes from the return of those before it, [B, T]: of the token as
    it was drawn, or of its state."""
    anchor = scored.anchor
    assert anchor is not None, "a stage with an anchor asks it"
    return weight * (anchor.logp_BT - scored.logq_BT if sampled else -anchor.kl_BT)


def _anchor_here(scored: Scored, weight: float) -> Tensor:
    """A token's own share as it was drawn, less what the student expects of it at that state, [B, T]: the score of one
    choice among others. The expectation depends on the state alone, so that it is a baseline and changes no gradient.
    """
    anchor = scored.anchor
    assert anchor is not None, "a stage with an anchor asks it"
    return weight * (anchor.logp_BT - scored.logq_BT + anchor.kl_BT)


def _apart(stage: MinillmStage) -> bool:
    """Whether rows that share this row's coins may not serve it: with weights by token they know who drew it
    (design D5)."""
    return stage.teacher_mix > 0.0 and stage.importance in BY_TOKEN


def _mean_of_peers(value_BT: Tensor, mask_BT: Tensor, stage: MinillmStage, *, names: RowNames, ranks: Ranks) -> Tensor:
    """The mean, by position, of the rows of all ranks that may serve each of this rank's."""
    own_BK = torch.stack([names.prompt_B, names.row_B, names.coin_group_B], dim=1)
    all_AK, apart = ranks.gather_rows(own_BK), _apart(stage)
    allowed_BA = credit.peers(
        stage.baseline,
        prompt_B=own_BK[:, 0], row_B=own_BK[:, 1], coin_group_B=own_BK[:, 2] if apart else None,
        prompt_A=all_AK[:, 0], row_A=all_AK[:, 1], coin_group_A=all_AK[:, 2] if apart else None,
    )  # fmt: skip
    value_AT = ranks.gather_rows(value_BT)
    alive_AT = ranks.gather_rows(mask_BT.to(torch.uint8)).bool()
    return credit.position_baseline(value_AT, alive_AT, allowed_BA)[:, : value_BT.shape[1]]


def _group_scores(whole_BT: Tensor, mask_BT: Tensor, names: RowNames, *, ranks: Ranks) -> Tensor:
    """Each row's whole return among its siblings' on all ranks, at every kept token."""
    score_B = credit.group_scores(
        whole_BT[:, 0], prompt_B=names.prompt_B,
        value_A=ranks.gather_rows(whole_BT[:, :1])[:, 0], prompt_A=ranks.gather_rows(names.prompt_B[:, None])[:, 0],
    )  # fmt: skip
    return torch.where(mask_BT, score_B[:, None], 0.0)


def _ridge(value_BT: Tensor, scored: Scored, stage: MinillmStage, *, names: RowNames, ranks: Ranks) -> Tensor:
    """Returns predicted from the state before each token, by a fit on other prompts (on other coin groups)."""
    mask_BT = scored.rollout.mask_BT
    fold_B = (names.coin_group_B if _apart(stage) else names.prompt_B) % FOLDS
    fold_BT = fold_B[:, None].expand_as(mask_BT)
    predicted_BT = torch.zeros_like(value_BT)
    predicted_BT[mask_BT] = cross_fitted(state_features(scored), value_BT[mask_BT], fold_BT[mask_BT], total=ranks.sum)
    return predicted_BT


def state_features(scored: Scored) -> Tensor:
    """What is known of the state before each kept token, [N, D]: the student's hidden state, its entropy, the KL to the
    teacher, and how far the response has come. Nothing of the token itself or of what follows."""
    rollout = scored.rollout
    mask_BT = rollout.mask_BT
    assert rollout.student_hidden_BTH is not None, "a rollout for this keeps the student's states"
    at_N = torch.arange(mask_BT.shape[1], device=mask_BT.device, dtype=scored.logq_BT.dtype).expand_as(mask_BT)[mask_BT]
    numbers_N5 = torch.stack(
        [scored.entropy_BT[mask_BT], scored.reverse_kl_BT[mask_BT], at_N, at_N.square(), (1.0 + at_N).log()], dim=1
    )
    return torch.cat([projected(rollout.student_hidden_BTH[mask_BT].to(numbers_N5.dtype)), numbers_N5], dim=1)

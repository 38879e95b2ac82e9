"""sDPO on a table of responses, each step fitted exactly: T steps at beta are one step at beta / T.

The optimum of DPO's loss on soft labels sigma(r(w) - r(l)) is the reference tilted by the reward: ref exp(r / beta).

Legend: R responses of a table, B pairs of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from minillm.pairwise_loss import Compared, pair_logit, pairwise_loss

EXACT = 1e-12
BETA = 0.4
START_R = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
REWARD_R = torch.tensor([0.3, -0.5, 0.9, 0.1], dtype=torch.float64)
OTHER_R = torch.tensor([-0.2, 0.4, 0.0, 0.6], dtype=torch.float64)


def fitted(ref_R: Tensor, reward_R: Tensor, *, beta: float) -> Tensor:
    """Where descent on the objective ends, from the reference on: log-probabilities [R], by Newton's steps."""
    w_B, l_B = torch.tensor(list(itertools.combinations(range(len(ref_R)), 2))).T
    target_B = torch.sigmoid(reward_R[w_B] - reward_R[l_B])

    def loss(logits_R: Tensor) -> Tensor:
        m_R = logits_R.log_softmax(-1) - ref_R
        h_B = pair_logit("dpo", Compared(m_w_B=m_R[w_B], m_l_B=m_R[l_B]), alpha=0.5)
        return pairwise_loss(
            h_B, beta=beta, link="sigmoid", target="soft", noise=0.0, soft_target_B=target_B
        ).mean()  # fmt: skip

    logits_R = ref_R.clone()
    for _ in range(30):
        slope_R = torch.autograd.functional.jacobian(loss, logits_R)
        bend_RR = torch.autograd.functional.hessian(loss, logits_R)
        logits_R = logits_R - torch.linalg.pinv(bend_RR) @ slope_R
    return logits_R.log_softmax(-1)


def stepwise(rewards: Sequence[Tensor], *, beta: float) -> list[Tensor]:
    """Each step's reference and start are what the one before it ended with."""
    made = [START_R]
    for reward_R in rewards:
        made.append(fitted(made[-1], reward_R, beta=beta))
    return made


def test_a_step_tilts_its_reference_by_the_reward() -> None:
    wanted_R = (START_R + REWARD_R / BETA).log_softmax(-1)
    torch.testing.assert_close(fitted(START_R, REWARD_R, beta=BETA), wanted_R, rtol=0, atol=EXACT)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_steps_of_one_reward_are_one_step_on_a_longer_leash(steps: int) -> None:
    last_R = stepwise([REWARD_R] * steps, beta=BETA)[-1]
    torch.testing.assert_close(last_R, fitted(START_R, REWARD_R, beta=BETA / steps), rtol=0, atol=EXACT)
    # The control: one step at beta, as who compares the two by their beta would run it, ends elsewhere.
    assert (last_R - fitted(START_R, REWARD_R, beta=BETA)).abs().max() > 0.1


def test_steps_of_several_rewards_add_them_and_their_order_does_not_count() -> None:
    wanted_R = (START_R + (REWARD_R + OTHER_R) / BETA).log_softmax(-1)
    for rewards in ((REWARD_R, OTHER_R), (OTHER_R, REWARD_R)):
        torch.testing.assert_close(stepwise(rewards, beta=BETA)[-1], wanted_R, rtol=0, atol=EXACT)
    # The control: with the first reference kept in every step, the last reward alone is left.
    torch.testing.assert_close(
        fitted(START_R, OTHER_R, beta=BETA), (START_R + OTHER_R / BETA).log_softmax(-1), rtol=0, atol=EXACT
    )


def test_log_ratios_of_the_steps_add_up() -> None:
    made = stepwise([REWARD_R, OTHER_R, REWARD_R], beta=BETA)
    summed_R = torch.stack([after - before for before, after in itertools.pairwise(made)]).sum(0)
    torch.testing.assert_close(summed_R, made[-1] - START_R, rtol=0, atol=EXACT)

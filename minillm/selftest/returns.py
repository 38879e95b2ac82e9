"""Returns, whitening, and what padding may not change.

Legend: B rows, T response positions, H hidden width, V ids, N kept tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from minillm import credit, scoring, token_loss
from minillm.policy_loss import clipped_surrogate
from minillm.scoring import HeadWeights, Task, TeacherView
from minillm.selftest.check import ROUNDING, Check, Found, gap, rough, worst
from minillm.selftest.listed import stage, targets_of
from minillm.types import PromptBatch, Rollout, Stop

VISIBLE = 1e-6
"""Limit where a golden number is written with as many digits."""


def row(*values: float) -> Tensor:
    """One row in float64."""
    return torch.tensor([values], dtype=torch.float64)


def golden_returns() -> Found:
    """Rewards (1, 2, 3): from each token on (6, 5, 3), from the next one on (5, 3, 0), and per token."""
    reward_1T, kept_1T = row(1, 2, 3), row(1, 2, 3) > 0
    return Found(
        worst(
            gap(credit.return_to_go(reward_1T, kept_1T), row(6, 5, 3)),
            gap(credit.future_return(reward_1T, kept_1T), row(5, 3, 0)),
            gap(credit.return_to_go(reward_1T, kept_1T, per_token=True), row(2, 2.5, 3)),
            gap(credit.future_return(reward_1T, kept_1T, per_token=True), row(2.5, 3, 0)),
            gap(credit.future_return(reward_1T, kept_1T, horizon=1), row(2, 3, 0)),
            gap(credit.whole_return(reward_1T, kept_1T), row(6, 6, 6)),
        ),
        ROUNDING,
    )


def golden_discount() -> Found:
    """The same at discount .95, with the discounted number of tokens as the divisor of the second."""
    reward_1T, kept_1T = row(1, 2, 3), row(1, 2, 3) > 0
    plain_1T = credit.return_to_go(reward_1T, kept_1T, gamma=0.95)
    per_token_1T = credit.return_to_go(reward_1T, kept_1T, gamma=0.95, per_token=True)
    errors = gap(plain_1T, row(5.6075, 4.85, 3)), gap(per_token_1T, row(1.965820, 2.487179, 3))
    return Found(worst(*errors), VISIBLE)


def constant_reward() -> Found:
    """A constant reward of -1 is -1 per token wherever it stands, in float32 and over 1,024 tokens."""
    reward_1T = torch.full((1, 1024), -1.0)
    kept_1T, errors = reward_1T < 0, []
    for gamma in (0.9, 0.95, 1.0):
        errors.append(gap(credit.return_to_go(reward_1T, kept_1T, gamma=gamma, per_token=True), reward_1T))
        ahead_1T = credit.future_return(reward_1T, kept_1T, gamma=gamma, per_token=True)
        errors.append(gap(ahead_1T[:, :-1], reward_1T[:, :-1]))
    return Found(worst(*errors), 1e-6)


def whitening() -> Found:
    """(2, 2.5, 3) beside five pads: (-1.2247, 0, 1.2247); no positive factor counts, and one value gives 0."""
    value_1T, kept_1T = row(2, 2.5, 3, 0, 0, 0, 0, 0), torch.arange(8)[None] < 3
    root = math.sqrt(1.5)
    want_1T = row(-root, 0, root, 0, 0, 0, 0, 0)
    errors = [gap(credit.whitened(scale * value_1T, kept_1T), want_1T) for scale in (1.0, 3.0, 1e-6)]
    errors += [worst(credit.whitened(0.1 * torch.ones(1, 8), kept).abs()) for kept in (kept_1T, kept_1T & False)]
    errors.append(worst(credit.whitened(value_1T, torch.arange(8)[None] == 1).abs()))
    return Found(worst(*errors), 1e-9)


WIDTHS = (5, 4)
"""Hidden widths of student and teacher."""
ROWS, PLACES, VOCABULARY = 3, 4, 7


class OwnHead:
    """A student as scoring sees it."""

    def __init__(self, head: HeadWeights) -> None:
        self.head = head

    def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
        """The library's numbers for these states."""
        return scoring.token_statistics(hidden_NH, head=self.head, **arguments)


def rollout(*, more: int) -> Rollout:
    """Three responses of 4, 2 and 1 tokens; ``more`` columns of padding, and no numbers off the mask."""

    def wide(value_BTX: Tensor, filling: float) -> Tensor:
        filled = value_BTX.new_full((ROWS, more, *value_BTX.shape[2:]), filling)
        whole = torch.cat([value_BTX, filled], dim=1)
        return torch.where(mask_BT.reshape(*mask_BT.shape, *[1] * (whole.dim() - 2)), whole, filling)

    mask_BT = torch.arange(PLACES + more) < torch.tensor([[4], [2], [1]])
    states = [wide(rough(ROWS, PLACES, width, seed=width), math.nan) for width in WIDTHS]
    return Rollout(
        prompts=PromptBatch(
            uid_B=("a", "b", "c"), sample_B=(0, 0, 0), ids_BP=torch.ones(ROWS, 1).long(),
            mask_BP=torch.ones(ROWS, 1).bool(),
        ),
        response_BT=wide(torch.arange(ROWS * PLACES).view(ROWS, PLACES) % VOCABULARY, VOCABULARY - 1), mask_BT=mask_BT,
        stop_B=(Stop.LENGTH, Stop.EOS, Stop.EMPTY), teacher_drew_BT=torch.zeros_like(mask_BT),
        logq_BT=wide(rough(ROWS, PLACES), math.nan), student_hidden_BTH=states[0], teacher_hidden_BTH=states[1],
        support_BTC=None, policy_step=0,
    )  # fmt: skip


def loss_and_slope(found: Rollout, *, baseline: str, whiten: str) -> tuple[Tensor, Tensor]:
    """Of these rows: scored, given credit, and brought to the student's head as in training."""
    weight_VH = rough(VOCABULARY, WIDTHS[0], seed=1).requires_grad_()
    head = HeadWeights(weight_VH=weight_VH, bias_V=None)
    teacher = HeadWeights(weight_VH=rough(VOCABULARY, WIDTHS[1], seed=2), bias_V=None)
    scored = scoring.score(found, student=OwnHead(head), teacher_head=teacher, temperature=1.0)
    targets = targets_of(scored, stage(baseline=baseline, whiten=whiten))
    kept_BT = found.mask_BT
    assert found.student_hidden_BTH is not None and found.teacher_hidden_BTH is not None
    old_N, advantage_N = scored.logq_BT[kept_BT], targets.advantage_BT[kept_BT]
    loss, _ = token_loss.token_loss(
        found.student_hidden_BTH[kept_BT], head=head,
        task=Task(
            taken_N=found.response_BT[kept_BT], wanted=("logq", "reverse_kl"),
            teacher=TeacherView(head=teacher, hidden_NH=found.teacher_hidden_BTH[kept_BT]),
        ),
        loss=lambda of, here: of["reverse_kl"].sum() + clipped_surrogate(
            of["logq"], old_N[here], advantage=advantage_N[here], importance=torch.ones_like(old_N[here]), clip=0.2,
            max_log_ratio=20.0,
        ).loss.sum(),
    )  # fmt: skip
    return loss, torch.autograd.grad(loss, weight_VH)[0]


def padding() -> Found:
    """Columns of padding that hold no numbers change neither loss nor gradient; nor does whitening see them."""
    errors = []
    for baseline, whiten in (("none", "none"), ("position_mean", "none"), ("position_mean", "masked")):
        want, want_VH = loss_and_slope(rollout(more=0), baseline=baseline, whiten=whiten)
        for more in (1, 6):
            got, got_VH = loss_and_slope(rollout(more=more), baseline=baseline, whiten=whiten)
            errors += [gap(got, want), gap(got_VH, want_VH)]
    return Found(worst(*errors), ROUNDING)


def batch_mates() -> Found:
    """Without a baseline the loss of a batch is the sum of its rows' losses alone, and so is its gradient."""
    whole = rollout(more=0)
    want = loss_and_slope(whole, baseline="none", whiten="none")
    parts = [loss_and_slope(one_row(whole, at), baseline="none", whiten="none") for at in range(ROWS)]
    sums = [torch.stack(values).sum(dim=0) for values in zip(*parts, strict=True)]
    return Found(worst(*(gap(got, value) for got, value in zip(sums, want, strict=True))), ROUNDING)


def one_row(found: Rollout, at: int) -> Rollout:
    """A row of a rollout as a batch of its own, as wide as it is long."""
    here, prompts = slice(at, at + 1), found.prompts
    length = int(found.length_B[at])
    parts = {
        name: getattr(found, name)[here, :length]
        for name in ("response_BT", "mask_BT", "teacher_drew_BT", "logq_BT", "student_hidden_BTH", "teacher_hidden_BTH")
    }
    alone = PromptBatch(
        uid_B=prompts.uid_B[here], sample_B=(0,), ids_BP=prompts.ids_BP[here], mask_BP=prompts.mask_BP[here]
    )
    return dataclasses.replace(found, prompts=alone, stop_B=found.stop_B[here], **parts)


CHECKS = (
    Check(name="returns: golden numbers", run=golden_returns),
    Check(name="returns: golden numbers, discounted", run=golden_discount),
    Check(name="returns: a constant reward per token", run=constant_reward),
    Check(name="returns: whitening over kept tokens", run=whitening),
    Check(name="batch: padding changes nothing", run=padding),
    Check(name="batch: mates change nothing", run=batch_mates),
)

"""Padding and batch mates: the whole loss of a row is the same alone, widened, and beside a longer response."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.credit import future_return, peers, position_baseline
from minillm.divergences import reverse_kl
from minillm.policy_loss import clipped_surrogate
from minillm.types import PromptBatch, Rollout, Stop
from tests.exact.tabular import EOS, Enumeration, TabularLM, assert_close, enumerate_pair, gradient, make_pair, taken

ROWS = torch.tensor([0, 4, 9, 14])
"""Responses of 1, 3, 4 and 4 tokens; padded with EOS, which is also a token that they end with."""


def toy() -> tuple[TabularLM, Enumeration]:
    student, teacher = make_pair(vocab=3, length=4, seed=2)
    return student, enumerate_pair(student, teacher)


def whole_loss(
    logq_BTV: Tensor, logp_BTV: Tensor, response_BT: Tensor, mask_BT: Tensor, *, prompts: tuple[int, ...], future: str
) -> Tensor:
    """Single-step and long-horizon loss of a batch with its position baseline, summed over tokens, [B]."""
    logq_BT, logp_BT = taken(logq_BTV, response_BT, mask_BT), taken(logp_BTV, response_BT, mask_BT)
    kl_BT = torch.where(mask_BT, reverse_kl(logq_BTV, logp_BTV), 0.0)
    value_BT = future_return((logp_BT - logq_BT) if future == "sampled" else -kl_BT, mask_BT)
    prompt_B, row_B = torch.tensor(prompts), torch.arange(len(prompts))
    allowed_BB = peers("position_mean", prompt_B=prompt_B, row_B=row_B, prompt_A=prompt_B, row_A=row_B)
    advantage_BT = torch.where(mask_BT, value_BT - position_baseline(value_BT, mask_BT, allowed_BB), 0.0)
    surrogate = clipped_surrogate(
        logq_BT,
        logq_BT.detach(),
        advantage=advantage_BT,
        importance=torch.ones_like(advantage_BT),
        clip=0.2,
        max_log_ratio=20.0,
    )
    return torch.where(mask_BT, kl_BT + surrogate.loss, 0.0).sum(1)


def widened(log_probs_BTV: Tensor, *, columns: int, seed: int) -> Tensor:
    """Extra positions whose log-probabilities are junk, as a padded forward would give."""
    noise = torch.Generator().manual_seed(seed)
    shape = (len(log_probs_BTV), columns, log_probs_BTV.shape[2])
    junk_BTV = 3 * torch.randn(shape, generator=noise, dtype=torch.float64)
    return torch.cat([log_probs_BTV, junk_BTV.log_softmax(-1)], dim=1)


def padded(value_BT: Tensor, columns: int, fill: int) -> Tensor:
    return torch.cat([value_BT, torch.full((len(value_BT), columns), fill, dtype=value_BT.dtype)], dim=1)


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("pad", [EOS, 2])
@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_pad_columns_change_no_loss_and_no_gradient(columns: int, pad: int, future: str) -> None:
    student, every = toy()
    prompts = (0, 0, 1, 2)
    logq_BTV, logp_BTV = every.logq_NTV[ROWS], every.logp_NTV[ROWS]
    response_BT, mask_BT = every.response_NT[ROWS], every.mask_NT[ROWS]
    want_B = whole_loss(logq_BTV, logp_BTV, response_BT, mask_BT, prompts=prompts, future=future)
    got_B = whole_loss(
        widened(logq_BTV, columns=columns, seed=0),
        widened(logp_BTV, columns=columns, seed=1),
        padded(response_BT, columns, pad),
        padded(mask_BT, columns, False),
        prompts=prompts,
        future=future,
    )
    assert_close(got_B.detach(), want_B.detach(), atol=1e-14)
    assert_close(gradient(got_B.sum(), student), gradient(want_B.sum(), student), atol=1e-14)


def test_a_mask_from_other_columns_is_noticed() -> None:
    """Negative control: with the padding counted, both the loss and the gradient move."""
    student, every = toy()
    both = every.logq_NTV[ROWS], every.logp_NTV[ROWS], every.response_NT[ROWS]
    want_B = whole_loss(*both, every.mask_NT[ROWS], prompts=(0, 0, 1, 2), future="sampled")
    everywhere_BT = torch.ones_like(every.mask_NT[ROWS])
    got_B = whole_loss(*both, everywhere_BT, prompts=(0, 0, 1, 2), future="sampled")
    assert float((got_B - want_B).detach().abs().max()) > 0.05
    assert float((gradient(got_B.sum(), student) - gradient(want_B.sum(), student)).norm()) > 0.05


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_a_longer_batch_mate_of_the_same_prompt_changes_nothing(future: str) -> None:
    """It may not serve as this row's position mean, so a row's loss is the one it has alone."""
    student, every = toy()

    def of(rows: Tensor, columns: int) -> Tensor:
        return whole_loss(
            every.logq_NTV[rows, :columns],
            every.logp_NTV[rows, :columns],
            every.response_NT[rows, :columns],
            every.mask_NT[rows, :columns],
            prompts=(0,) * len(rows),
            future=future,
        )

    alone_B, beside_B = of(ROWS[1:2], int(every.length_N[ROWS[1]])), of(ROWS[1:], 4)
    assert int(every.length_N[ROWS[1]]) < 4
    assert_close(beside_B[0].detach(), alone_B[0].detach(), atol=1e-15)
    assert_close(gradient(beside_B[0], student), gradient(alone_B[0], student), atol=1e-15)


def test_closing_eos_counts_where_pad_and_eos_are_one_id() -> None:
    """A prompt that ends with EOS is read whole, a response keeps its EOS, and an unfinished one all its tokens."""
    prompts = PromptBatch(
        uid_B=("a", "b", "c"),
        sample_B=(0, 0, 0),
        ids_BP=torch.tensor([[EOS, EOS, 7], [EOS, 7, EOS], [5, 7, EOS]]),
        mask_BP=torch.tensor([[False, False, True], [False, True, True], [True, True, True]]),
    )
    rollout = Rollout(
        prompts=prompts,
        response_BT=torch.tensor([[4, EOS, EOS], [EOS, EOS, EOS], [4, 5, 6]]),
        mask_BT=torch.tensor([[True, True, False], [True, False, False], [True, True, True]]),
        stop_B=(Stop.EOS, Stop.EMPTY, Stop.LENGTH),
        teacher_drew_BT=torch.zeros(3, 3, dtype=torch.bool),
        logq_BT=torch.zeros(3, 3),
        student_hidden_BTH=None,
        teacher_hidden_BTH=None,
        support_BTC=None,
        policy_step=0,
    )
    assert rollout.length_B.tolist() == [2, 1, 3]
    assert rollout.prompts.mask_BP.sum(1).tolist() == [1, 2, 3]
    by_id_B = (rollout.response_BT != EOS).sum(1)  # negative control: a mask made from ids loses every closing EOS
    assert by_id_B.tolist() == [1, 0, 3]

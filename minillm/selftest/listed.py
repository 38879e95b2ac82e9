"""A student and a teacher small enough to list: expectations over their responses are sums, not samples.

Both are tables of logits, one row for each beginning of a response. Row 0 is the empty beginning, and id v after row x
leads to row 3 x + v + 1. The same tables are also a model for the decode loop (``TableReader``).

Legend: X beginnings, V ids (3), T response positions (3), N distinct responses (15), D entries of the student's table;
B rows, S new positions, L positions of the mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from minillm import advantages, divergences, policy_loss
from minillm.advantages import RowNames
from minillm.ranks import Ranks
from minillm.selftest.check import rough
from minillm.stage_base import OptimiserConfig
from minillm.stage_config import MinillmStage
from minillm.types import PromptBatch, Rollout, Scored, Stop, Targets

IDS, LONGEST, BEGINNINGS = 3, 3, 13
EOS = 0
"""Ends a response and is also the pad, as in GPT-2: only the mask tells them apart."""
ALPHA = 0.2
"""The teacher's share where it draws some of the tokens, as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Every response to one prompt, and what both models say at each of its positions."""

    table_XV: Tensor
    """The student's logits, which gradients are of."""
    response_NT: Tensor
    mask_NT: Tensor
    logq_NTV: Tensor
    logp_NTV: Tensor

    @property
    def logq_NT(self) -> Tensor:
        """The student's log-probability of each token, with its gradient; 0 off the mask."""
        return self._of_tokens(self.logq_NTV)

    @property
    def logp_NT(self) -> Tensor:
        """The teacher's."""
        return self._of_tokens(self.logp_NTV)

    @property
    def kl_NT(self) -> Tensor:
        """The library's reverse KL at the state before each token; 0 off the mask."""
        return torch.where(self.mask_NT, divergences.reverse_kl(self.logq_NTV, self.logp_NTV), 0.0)

    @property
    def reward_NT(self) -> Tensor:
        """log p - log q of each token, without gradient."""
        return (self.logp_NT - self.logq_NT).detach()

    @property
    def chance_N(self) -> Tensor:
        """The student's probability of each response, without gradient."""
        return self.mixed_chance_N(0.0)

    def mixed_chance_N(self, alpha: float) -> Tensor:
        """Probability of each response where the teacher draws a share ``alpha`` of the tokens."""
        mixed_NT = (1.0 - alpha) * self.logq_NT.detach().exp() + alpha * self.logp_NT.exp()
        return torch.where(self.mask_NT, mixed_NT, 1.0).prod(dim=1)

    def sequence_kl(self) -> Tensor:
        """KL(student || teacher) over whole responses, written out: what MiniLLM descends."""
        logq_N = self.logq_NT.sum(1)
        return (logq_N.exp() * (logq_N - self.logp_NT.sum(1))).sum()

    def gradient(self, value: Tensor) -> Tensor:
        """Of a number, in the student's table, flat [D]."""
        return torch.autograd.grad(value, self.table_XV, retain_graph=True)[0].flatten()

    def expected_gradient(self, loss_N: Tensor, *, chance_N: Tensor | None = None) -> Tensor:
        """Of the loss of one sampled response, on average; who is sampled is not differentiated."""
        return self.gradient(((self.chance_N if chance_N is None else chance_N) * loss_N).sum())

    def _of_tokens(self, log_NTV: Tensor) -> Tensor:
        return torch.where(self.mask_NT, log_NTV.gather(2, self.response_NT[:, :, None])[:, :, 0], 0.0)


def tables(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher, [X, V] each."""
    return rough(BEGINNINGS, IDS, seed=2 * seed), rough(BEGINNINGS, IDS, seed=2 * seed + 1)


def every_response() -> tuple[Tensor, Tensor]:
    """The ids of all responses and their masks, [N, T] each."""
    cut = [tuple(itertools.takewhile(lambda v: v != EOS, ids)) for ids in itertools.product(range(IDS), repeat=LONGEST)]
    ended = dict.fromkeys((*ids, EOS)[:LONGEST] for ids in cut)
    response_NT = torch.tensor([[*ids, *[EOS] * (LONGEST - len(ids))] for ids in ended])
    return response_NT, torch.arange(LONGEST) < torch.tensor([[len(ids)] for ids in ended])


def listed(student_XV: Tensor, teacher_XV: Tensor) -> Listed:
    """Everything that can happen with these two tables."""
    response_NT, mask_NT = every_response()
    at_N, rows = torch.zeros(len(response_NT), dtype=torch.long), []
    for id_N in response_NT.T:
        rows.append(at_N)
        at_N = IDS * at_N + id_N + 1
    row_NT, table_XV = torch.stack(rows, dim=1), student_XV.clone().requires_grad_()
    return Listed(
        table_XV=table_XV,
        response_NT=response_NT,
        mask_NT=mask_NT,
        logq_NTV=table_XV[row_NT].log_softmax(-1),
        logp_NTV=teacher_XV[row_NT].log_softmax(-1),
    )


def finite_difference(value: Callable[[Tensor], Tensor], table_XV: Tensor, *, step: float = 1e-5) -> Tensor:
    """Central differences in every entry of a table, [D]: knows nothing of autograd."""
    moves_DXV = step * torch.eye(table_XV.numel(), dtype=torch.float64).view(-1, *table_XV.shape)
    ends = [(value(table_XV + move_XV) - value(table_XV - move_XV)) / (2 * step) for move_XV in moves_DXV]
    return torch.stack(ends).detach()


def policy_loss_N(of: Listed, advantage_NT: Tensor, *, weight_NT: Tensor | None = None) -> Tensor:
    """The library's clipped surrogate at the weights that sampled, summed over each response, [N]."""
    surrogate = policy_loss.clipped_surrogate(
        of.logq_NT, of.logq_NT.detach(), advantage=advantage_NT,
        importance=torch.ones_like(advantage_NT) if weight_NT is None else weight_NT, clip=0.2, max_log_ratio=20.0,
    )  # fmt: skip
    return torch.where(of.mask_NT, surrogate.loss, 0.0).sum(1)


def stage(**settings: Any) -> MinillmStage:
    """A MiniLLM stage without teacher mixing and without a baseline but for what is asked for."""
    plain: dict[str, Any] = {
        "steps": 1,
        "prompts": 2,
        "optimiser": OptimiserConfig(lr=1e-3),
        "teacher_mix": 0.0,
        "baseline": "none",
    }
    return MinillmStage(**(plain | settings))


class OneRank:
    """As much of ``Ranks`` as credit asks for, in one process and without DeepSpeed."""

    def sum(self, values: Tensor) -> Tensor:
        """What all ranks add up to."""
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All ranks' rows."""
        return rows


def targets_of(scored: Scored, chosen: MinillmStage, *, prompt_B: Tensor | None = None) -> Targets:
    """The library's credit for these rows, each the response to a prompt of its own if none are named."""
    row_B = torch.arange(len(scored.logq_BT))
    names = RowNames(
        prompt_B=row_B if prompt_B is None else prompt_B, row_B=row_B, coin_group_B=torch.zeros_like(row_B)
    )
    return advantages.targets_of(
        scored, chosen, names=names, ranks=cast(Ranks, OneRank()), longest=scored.rollout.mask_BT.shape[1]
    )


def scored_of(of: Listed, pick_B: Tensor, *, drew_BT: Tensor | None = None) -> Scored:
    """Some of the responses as one scored rollout."""
    mask_BT, logq_BT = of.mask_NT[pick_B], of.logq_NT.detach()[pick_B]
    rollout = Rollout(
        prompts=PromptBatch(
            uid_B=tuple(map(str, pick_B.tolist())), sample_B=(0,) * len(pick_B),
            ids_BP=torch.ones_like(pick_B)[:, None], mask_BP=torch.ones_like(mask_BT[:, :1]),
        ),
        response_BT=of.response_NT[pick_B], mask_BT=mask_BT, stop_B=(Stop.EOS,) * len(pick_B),
        teacher_drew_BT=torch.zeros_like(mask_BT) if drew_BT is None else drew_BT, logq_BT=logq_BT,
        student_hidden_BTH=None, teacher_hidden_BTH=None, support_BTC=None, policy_step=0,
    )  # fmt: skip
    return Scored(
        rollout=rollout, logq_BT=logq_BT, logp_BT=of.logp_NT[pick_B], reverse_kl_BT=of.kl_NT.detach()[pick_B],
        entropy_BT=torch.zeros_like(logq_BT),
    )  # fmt: skip


def objective_N(of: Listed, chosen: MinillmStage, *, drew_NT: Tensor | None = None) -> Tensor:
    """The loss of each response as a stage makes it: single-step KL and surrogate, with the library's credit, [N]."""
    targets = targets_of(scored_of(of, torch.arange(len(of.mask_NT)), drew_BT=drew_NT), chosen)
    share_NT = targets.single_weight_BT
    single_NT = of.kl_NT if share_NT is None else share_NT * of.kl_NT
    long_N = policy_loss_N(of, targets.advantage_BT, weight_NT=targets.importance_BT)
    return chosen.single_weight * single_NT.sum(1) + chosen.long_weight * long_N


class TableReader:
    """A table as a model for the decode loop. The state after a token is the number of its row; prompts are one token
    long and lead to row 0."""

    lockstep = False

    def __init__(self, table_XV: Tensor, *, device: torch.device) -> None:
        self.table_XV, self.device = table_XV.to(device), device

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows of the table that the new tokens lead to, [B, S, 1], and the last of them."""
        at_B = ids_BS.new_full((len(ids_BS),), -1) if cache is None else cache
        rows = []
        for id_B, real_B in zip(ids_BS.T, mask_BL[:, -ids_BS.shape[1] :].T, strict=True):
            at_B = torch.where(real_B, torch.where(at_B < 0, 0, IDS * at_B + id_B + 1), at_B)
            rows.append(at_B)
        return torch.stack(rows, dim=1)[:, :, None].double(), at_B

    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The same for whole rows; 0 off the mask."""
        return self.extend(ids_BL, mask_BL, None)[0] * mask_BL[:, :, None]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """The rows of the table by their numbers; past the longest beginning anything."""
        return self.table_XV[hidden_NH[:, 0].long().clamp(0, BEGINNINGS - 1)]

    def select_rows(self, cache: Tensor, index: Tensor) -> Tensor:
        """The last rows of some of the batch."""
        return cache[index]

"""Language models small enough to list: every expectation below is a sum over all responses, not a sample.

Legend: N distinct responses of a prompt, T response positions, V vocabulary columns, D entries of the student's
table, K coin patterns. A response ends at its first EOS or at T. ``logq`` is the student and carries the gradient,
``logp`` the teacher. All in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.credit import future_return
from minillm.divergences import reverse_kl
from minillm.policy_loss import clipped_surrogate, importance_weights

EOS = 0
"""The id that ends a response. It is also the pad id, as in GPT-2: only the mask tells them apart."""


class TabularLM:
    """One free row of logits for each prompt and prefix: the most general model of its size."""

    def __init__(self, *, vocab: int, length: int, seed: int, prompts: int = 1, scale: float = 1.0) -> None:
        prefixes = sum(vocab**n for n in range(length))
        noise = torch.Generator().manual_seed(seed)
        self.vocab, self.length = vocab, length
        self.table = scale * torch.randn(prompts, prefixes, vocab, generator=noise, dtype=torch.float64)
        self.table.requires_grad_()

    def logits(self, response_NT: Tensor, *, prompt: int = 0) -> Tensor:
        """Logits of the next token before each position, [N, T, V]; past the end of a response they mean nothing."""
        first, rows = 0, []
        code_N = torch.zeros(len(response_NT), dtype=torch.long)
        for t in range(response_NT.shape[1]):
            rows.append(first + code_N)
            first, code_N = first + self.vocab**t, code_N * self.vocab + response_NT[:, t]
        return self.table[prompt][torch.stack(rows, dim=1)]


def every_response(*, vocab: int, length: int, eos: int | None = EOS, pad: int = EOS) -> tuple[Tensor, Tensor]:
    """All distinct responses as (ids, mask), each [N, T]; with ``eos`` None all of them are T long."""
    ids: list[list[int]] = []
    mask: list[list[bool]] = []
    open_prefixes: list[list[int]] = [[]]
    for t in range(length):
        grown = [[*prefix, v] for prefix in open_prefixes for v in range(vocab)]
        ended = [row for row in grown if row[-1] == eos or t == length - 1]
        ids += [row + [pad] * (length - len(row)) for row in ended]
        mask += [[True] * len(row) + [False] * (length - len(row)) for row in ended]
        open_prefixes = [row for row in grown if row[-1] != eos]
    return torch.tensor(ids), torch.tensor(mask)


def taken(log_probs_NTV: Tensor, response_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Log-probability of each token that was taken, [N, T]; 0 off the mask."""
    return torch.where(mask_NT, log_probs_NTV.gather(-1, response_NT[..., None])[..., 0], 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enumeration:
    """Everything that can happen after one prompt."""

    response_NT: Tensor
    mask_NT: Tensor
    logq_NTV: Tensor
    logp_NTV: Tensor
    logq_NT: Tensor
    logp_NT: Tensor

    @property
    def chance_N(self) -> Tensor:
        """The student's probability of each response, a plain number."""
        return self.logq_NT.detach().sum(1).exp()

    @property
    def length_N(self) -> Tensor:
        return self.mask_NT.sum(1)

    @property
    def kl_NT(self) -> Tensor:
        """Reverse KL at the state before each token, from the library; 0 off the mask."""
        return torch.where(self.mask_NT, reverse_kl(self.logq_NTV, self.logp_NTV), 0.0)

    @property
    def reward_NT(self) -> Tensor:
        return (self.logp_NT - self.logq_NT).detach()


def enumerate_pair(student: TabularLM, teacher: TabularLM, *, prompt: int = 0, eos: int | None = EOS) -> Enumeration:
    response_NT, mask_NT = every_response(vocab=student.vocab, length=student.length, eos=eos)
    logq_NTV = student.logits(response_NT, prompt=prompt).log_softmax(-1)
    logp_NTV = teacher.logits(response_NT, prompt=prompt).detach().log_softmax(-1)
    return Enumeration(
        response_NT=response_NT,
        mask_NT=mask_NT,
        logq_NTV=logq_NTV,
        logp_NTV=logp_NTV,
        logq_NT=taken(logq_NTV, response_NT, mask_NT),
        logp_NT=taken(logp_NTV, response_NT, mask_NT),
    )


def make_pair(*, vocab: int = 3, length: int = 3, prompts: int = 1, seed: int = 0) -> tuple[TabularLM, TabularLM]:
    """A student and a teacher with nothing in common."""
    student = TabularLM(vocab=vocab, length=length, prompts=prompts, seed=2 * seed)
    return student, TabularLM(vocab=vocab, length=length, prompts=prompts, seed=2 * seed + 1)


def sequence_kl(every: Enumeration) -> Tensor:
    """KL(student || teacher) over whole responses, written out: what MiniLLM promises to descend."""
    logq_N = every.logq_NT.sum(1)
    return (logq_N.exp() * (logq_N - every.logp_NT.sum(1))).sum()


def gradient(value: Tensor, student: TabularLM) -> Tensor:
    """Gradient of ``value`` in the student's table, flat, [D]."""
    (table,) = torch.autograd.grad(value, student.table, retain_graph=True)
    return table.flatten()


def gradients(value_N: Tensor, student: TabularLM) -> Tensor:
    """One gradient for each entry of ``value_N``, [N, D]."""
    (table,) = torch.autograd.grad(
        value_N, student.table, torch.eye(len(value_N), dtype=value_N.dtype), retain_graph=True, is_grads_batched=True
    )
    return table.flatten(1)


def finite_difference(value: Callable[[], Tensor], student: TabularLM, *, step: float = 1e-5) -> Tensor:
    """Central differences of ``value`` in every entry of the table: knows nothing of autograd."""
    flat_D = student.table.detach().view(-1)  # shares storage with the table
    slope = []
    for d in range(len(flat_D)):
        kept = flat_D[d].item()
        ends = []
        for sign in (1.0, -1.0):
            flat_D[d] = kept + sign * step
            ends.append(float(value().detach()))
        flat_D[d] = kept
        slope.append((ends[0] - ends[1]) / (2 * step))
    return torch.tensor(slope, dtype=torch.float64)


def credit(every: Enumeration, *, future: str, gamma: float = 1.0, per_token: bool = False) -> Tensor:
    """Next-step return from the rewards that were sampled, or from their conditional expectation -KL."""
    reward_NT = every.reward_NT if future == "sampled" else -every.kl_NT
    return future_return(reward_NT, every.mask_NT, gamma=gamma, per_token=per_token)


def policy_loss_N(
    every: Enumeration, advantage_NT: Tensor, *, weight_NT: Tensor | None = None, clip: float | None = 0.2
) -> Tensor:
    """The library's surrogate at theta = theta_old, summed over the tokens of each response, [N]."""
    weight_NT = torch.ones_like(advantage_NT) if weight_NT is None else weight_NT
    surrogate = clipped_surrogate(
        every.logq_NT,
        every.logq_NT.detach(),
        advantage=advantage_NT,
        importance=weight_NT,
        clip=clip,
        max_log_ratio=20.0,
    )
    return torch.where(every.mask_NT, surrogate.loss, 0.0).sum(1)


def minillm_loss_N(
    every: Enumeration, *, future: str, gamma: float = 1.0, per_token: bool = False, weight_NT: Tensor | None = None
) -> Tensor:
    """Single-step plus long-horizon loss of each response, [N]: the whole exact objective, from library parts."""
    advantage_NT = credit(every, future=future, gamma=gamma, per_token=per_token)
    return every.kl_NT.sum(1) + policy_loss_N(every, advantage_NT, weight_NT=weight_NT)


def expected_gradient(
    every: Enumeration, loss_N: Tensor, student: TabularLM, *, chance_N: Tensor | None = None
) -> Tensor:
    """Expectation of the gradient that one sampled response gives, [D]; the probabilities are not differentiated."""
    chance_N = every.chance_N if chance_N is None else chance_N
    return gradient((chance_N * loss_N).sum(), student)


def coin_patterns(length: int, *, alpha: float) -> tuple[Tensor, Tensor]:
    """All K = 2^T ways the teacher's coin can fall, bool [K, T], and their probabilities, [K]."""
    heads_KT = torch.tensor(list(itertools.product([False, True], repeat=length)))
    heads_K = heads_KT.double().sum(dim=1)
    return heads_KT, alpha**heads_K * (1.0 - alpha) ** (length - heads_K)


def chance_given_coins(every: Enumeration, heads_KT: Tensor) -> Tensor:
    """Probability of each response when the coins have fallen, [K, N]: the teacher draws at heads."""
    log_KNT = torch.where(heads_KT[:, None], every.logp_NT, every.logq_NT.detach())
    return log_KNT.sum(-1).exp()


def mixed_chance_N(every: Enumeration, *, alpha: float) -> Tensor:
    """Probability of each response under m = (1 - alpha) q + alpha p at every token, [N]."""
    mixed_NT = (1.0 - alpha) * every.logq_NT.detach().exp() + alpha * every.logp_NT.exp()
    return torch.where(every.mask_NT, mixed_NT, 1.0).prod(dim=1)


def weights(kind: str, every: Enumeration, drew_NT: Tensor, *, alpha: float) -> Tensor:
    return importance_weights(
        kind,
        logq_BT=every.logq_NT.detach(),
        logp_BT=every.logp_NT,
        teacher_drew_BT=drew_NT,
        teacher_mix=alpha,
        max_log_ratio=20.0,
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def bend(got: Tensor, want: Tensor) -> float:
    """Share of ``got`` that is left when the best rescaling of ``want`` is taken out of it: 0 when parallel."""
    cosine = float(got @ want / (got.norm() * want.norm()))
    return math.sqrt(max(0.0, 1.0 - cosine**2))


def assert_close(got: Tensor, want: Tensor, *, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)

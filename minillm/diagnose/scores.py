"""Derivatives of what happens at each token, along a few random directions in the space of weights.

A gradient estimate is a sum over tokens of a number (its credit) times the score ``grad log q(y_t)``. Along a direction
v that score is one number, ``v . grad log q(y_t)``, and a forward pass with forward-mode differentiation gives those of
all tokens at once. With them in hand every choice of credit is a weighted sum: no backward pass for each. For v with
independent standard normal entries the square of a projection has the square of the vector's length as its mean, so
variances (traces of covariances), inner products and biases are estimated without bias, from any two vectors along the
same directions.

Legend: B rows, L positions, N kept tokens, V real ids, J directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.models import CausalLM
from minillm.objectives import rollout_inputs
from minillm.sampling import restrict, unpack_support
from minillm.scoring import HeadWeights
from minillm.types import Rollout

WORKING_BYTES = 2**30
"""Memory for the logits of a forward pass, their derivatives and what is made of them."""
_TENSORS = 12
"""Of the size of the logits, alive at once."""


class TokenScores(NamedTuple):
    """For each kept token, in row order, and each direction."""

    score_NJ: Tensor
    """Derivative of log q(y_t)."""
    single_NJ: Tensor
    """Derivative of KL(student || teacher) at the state before the token."""


def token_scores(
    root: CausalLM, rollout: Rollout, *, teacher_head: HeadWeights, temperature: float, directions: int, seed: int
) -> TokenScores:
    """Derivatives along ``directions`` random directions, the same for a seed on every rank and at every call."""
    numbers = _Numbers(root)
    params = {name: parameter.detach() for name, parameter in numbers.named_parameters()}
    heads = int(getattr(root.backbone.config, "num_attention_heads", None) or 1)
    batches = list(_row_batches(rollout, vocabulary=root.head.real_ids, heads=heads))
    columns: list[tuple[list[Tensor], list[Tensor]]] = []
    for number in range(directions):
        tangent = direction(params, seed=seed, number=number)
        parts = []
        for rows in batches:  # the teacher's logits of one batch at a time
            inputs = _inputs(rollout, rows, teacher_head=teacher_head, temperature=temperature)
            parts.append(_derivatives(numbers, params, tangent, inputs))
        columns.append(([score for score, _ in parts], [single for _, single in parts]))
    empty_N = next(iter(params.values())).new_zeros(0)
    score, single = (
        torch.stack([torch.cat([empty_N, *column[place]]) for column in columns], dim=1) for place in (0, 1)
    )
    return TokenScores(score, single)


def direction(params: dict[str, Tensor], *, seed: int, number: int) -> dict[str, Tensor]:
    """One random direction: independent standard normal entries for every parameter."""
    noise = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return {
        name: torch.randn(p.shape, generator=noise, dtype=torch.float32).to(p.device, p.dtype)
        for name, p in params.items()
    }


class _Numbers(nn.Module):
    """Log-probability of each taken token and KL at the state before it, plainly, so that it can be differentiated."""

    def __init__(self, root: CausalLM) -> None:
        super().__init__()
        self.root = root

    def forward(
        self, *, ids_BL: Tensor, mask_BL: Tensor, predict_BL: Tensor, logp_NV: Tensor, support_NV: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        hidden_BLH = self.root("read", ids_BL=ids_BL, mask_BL=mask_BL)
        logits_NV = self.root("logits", hidden_NH=hidden_BLH[predict_BL.roll(-1, dims=1)])
        logq_NV = restrict(logits_NV / temperature, support_NV).log_softmax(dim=-1)
        taken_N = logq_NV.gather(1, ids_BL[predict_BL][:, None]).squeeze(1)
        apart_NV = logq_NV - logp_NV
        if support_NV is not None:
            apart_NV = torch.where(support_NV, apart_NV, 0.0)  # of two ids at minus infinity
        return taken_N, (logq_NV.exp() * apart_NV).sum(dim=-1)


def _derivatives(
    numbers: _Numbers, params: dict[str, Tensor], tangent: dict[str, Tensor], inputs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    # The fused kernels of attention have no forward mode.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what its forward mode is made with
        make: Any = forward_ad.make_dual
        duals = {name: make(value, tangent[name]) for name, value in params.items()}
        score_N, single_N = map(forward_ad.unpack_dual, functional_call(numbers, duals, (), inputs))
        return score_N.tangent, single_N.tangent


@torch.no_grad()
def _inputs(rollout: Rollout, rows: Sequence[int], *, teacher_head: HeadWeights, temperature: float) -> dict[str, Any]:
    keep_BT = rollout.mask_BT[list(rows)]
    assert rollout.teacher_hidden_BTH is not None
    logits_NV = teacher_head.logits(rollout.teacher_hidden_BTH[list(rows)][keep_BT]) / temperature
    support_NV = None
    if rollout.support_BTC is not None:
        support_NV = unpack_support(rollout.support_BTC[list(rows)][keep_BT], logits_NV.shape[1])
    logp_NV = restrict(logits_NV, support_NV).log_softmax(dim=-1)
    return {**rollout_inputs(rollout, rows), "logp_NV": logp_NV, "support_NV": support_NV, "temperature": temperature}


def _row_batches(rollout: Rollout, *, vocabulary: int, heads: int) -> Iterator[list[int]]:
    """Rows in their order, as many at once as memory allows: logits of response tokens, and whole attention weights."""
    most = WORKING_BYTES // (4 * _TENSORS)
    prompt_B = rollout.prompts.mask_BP.sum(dim=1).tolist()
    rows: list[int] = []
    numbers = 0
    for row, (prompt, length) in enumerate(zip(prompt_B, rollout.length_B.tolist(), strict=True)):
        wanted = length * vocabulary + heads * (prompt + length) ** 2
        if rows and numbers + wanted > most:
            yield rows
            rows, numbers = [], 0
        rows.append(row)
        numbers += wanted
    if rows:
        yield rows

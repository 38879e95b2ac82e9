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

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.models import CausalLM
from minillm.practice import rollout_inputs
from minillm.sampling import restrict, unpack_support
from minillm.scoring import HeadWeights
from minillm.types import Rollout

WORKING_BYTES = 2**30
"""Memory for the logits of a forward pass, their derivatives and what is made of them."""
_TENSORS = 12
"""Of the size of the logits, alive at once."""


Memory = dict[tuple[str, int, int], tuple[Tensor, Tensor]]
"""The student's side of what was differentiated, for other teachers: log-probabilities [N, V] and their derivative, by
text, seed and direction. One student's only, and as large as all its logits, once for each direction."""


class TokenScores(NamedTuple):
    """For each kept token, in row order, and each direction."""

    score_NJ: Tensor
    """Derivative of log q(y_t)."""
    single_NJ: Tensor
    """Derivative of KL(student || teacher) at the state before the token."""


def token_scores(
    root: CausalLM,
    rollout: Rollout,
    *,
    teacher_head: HeadWeights,
    temperature: float,
    directions: int,
    seed: int,
    memory: Memory | None = None,
) -> TokenScores:
    """Derivatives along ``directions`` random directions, the same for a seed on every rank and at every call.

    The teacher enters after the student is differentiated, so with a ``memory`` a text that was seen is not
    differentiated again.
    """
    numbers = _LogProbs(root)
    params = {name: parameter.detach() for name, parameter in numbers.named_parameters()}
    heads = int(getattr(root.backbone.config, "num_attention_heads", None) or 1)
    batches = list(_row_batches(rollout, vocabulary=root.head.real_ids, heads=heads))
    columns: list[tuple[list[Tensor], list[Tensor]]] = []
    for number in range(directions):
        tangent = direction(params, seed=seed, number=number)
        parts = []
        for rows in batches:  # the teacher's logits of one batch at a time
            inputs = _inputs(rollout, rows, teacher_head=teacher_head, temperature=temperature)
            logp_NV, taken_N = inputs.pop("logp_NV"), inputs["ids_BL"][inputs["predict_BL"]]
            logq_NV, moved_NV = _derivatives(numbers, params, tangent, inputs, key=(seed, number), memory=memory)
            parts.append(_with_teacher(logq_NV, moved_NV, taken_N, logp_NV=logp_NV, support_NV=inputs["support_NV"]))
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


class _LogProbs(nn.Module):
    """Log-probabilities at the state before each token, plainly, so that they can be differentiated."""

    def __init__(self, root: CausalLM) -> None:
        super().__init__()
        self.root = root

    def forward(
        self, *, ids_BL: Tensor, mask_BL: Tensor, predict_BL: Tensor, support_NV: Tensor | None, temperature: float
    ) -> Tensor:
        hidden_BLH = self.root("read", ids_BL=ids_BL, mask_BL=mask_BL)
        logits_NV = self.root("logits", hidden_NH=hidden_BLH[predict_BL.roll(-1, dims=1)])
        return restrict(logits_NV / temperature, support_NV).log_softmax(dim=-1)


def _derivatives(
    numbers: _LogProbs,
    params: dict[str, Tensor],
    tangent: dict[str, Tensor],
    inputs: dict[str, Any],
    *,
    key: tuple[int, int],
    memory: Memory | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and their derivative along the direction of that seed and number; from memory if there."""
    name = None if memory is None else (_named(inputs), *key)
    if memory is not None and name in memory:
        return memory[name]
    # The fused kernels of attention have no forward mode.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of what its forward mode is made with
        make: Any = forward_ad.make_dual
        duals = {of: make(value, tangent[of]) for of, value in params.items()}
        unpack: Any = forward_ad.unpack_dual
        logq_NV, moved_NV = unpack(functional_call(numbers, duals, (), inputs))
    if memory is not None and name is not None:
        same_NV = memory.get((name[0], key[0], 0), (logq_NV, moved_NV))[0]  # along every direction
        memory[name] = (same_NV, moved_NV)
    return logq_NV, moved_NV


@torch.no_grad()
def _with_teacher(
    logq_NV: Tensor, moved_NV: Tensor, taken_N: Tensor, *, logp_NV: Tensor, support_NV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Derivatives of log q(y_t) and of KL = sum q (log q - log p), from that of log q."""
    score_N = moved_NV.gather(1, taken_N[:, None]).squeeze(1)
    each_NV = logq_NV.exp() * moved_NV * (logq_NV - logp_NV + 1.0)
    if support_NV is not None:
        each_NV = torch.where(support_NV, each_NV, 0.0)  # of two ids at minus infinity
    return score_N, each_NV.sum(dim=-1)


def _named(inputs: dict[str, Any]) -> str:
    """Names a text and how it is read, whichever teacher scores it."""
    digest = hashlib.sha256(repr(inputs["temperature"]).encode())
    for each in (inputs["ids_BL"], inputs["mask_BL"], inputs["predict_BL"], inputs["support_NV"]):
        if each is not None:
            digest.update(repr(tuple(each.shape)).encode() + each.cpu().numpy().tobytes())
    return digest.hexdigest()


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

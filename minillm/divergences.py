"""Divergences between student and teacher, one number per position, exact over the vocabulary.

Legend: N positions, V vocabulary columns. ``logq_NV`` is the student and ``logp_NV`` the teacher, both normalised
log-probabilities. All results are in nats. An entry of ``-inf`` is a token that cannot be drawn: where *both* forbid it
(truncated support, masked vocabulary) it adds exactly 0 to value and gradient; where only the second
distribution forbids it the divergence is +inf, and that is not hidden.

A name says its direction: KL(a || b) is an expectation under a. Values are 0 if and only if the two agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minillm.errors import ShapeMismatch


def entropy(logq_NV: Tensor) -> Tensor:
    """Shannon entropy of each row, [N]; 0 for a row that allows one token only."""
    return _expected(logq_NV, -logq_NV)


def reverse_kl(logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
    """KL(student || teacher) of each row, [N]: MiniLLM's divergence (Gu et al. 2024, eq. 1), mode-seeking."""
    return _kl(logq_NV, logp_NV)


def forward_kl(logq_NV: Tensor, logp_NV: Tensor) -> Tensor:
    """KL(teacher || student) of each row, [N]: classical distillation (Hinton et al. 2015), mass-covering."""
    return _kl(logp_NV, logq_NV)


def jensen_shannon(logq_NV: Tensor, logp_NV: Tensor, *, beta: float) -> Tensor:
    """Generalised JSD, [N]: ``beta KL(p || m) + (1 - beta) KL(q || m)``, ``m = beta p + (1 - beta) q``.

    GKD's divergence (Agarwal et al. 2024). It vanishes at both ends of beta; ``JSD / beta`` tends to KL(p || q) as
    beta -> 0 and ``JSD / (1 - beta)`` to KL(q || p) as beta -> 1, so beta must lie strictly between.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"jensen_shannon: beta must lie strictly between 0 and 1, got {beta}")
    middle_NV = _mixture(logq_NV, logp_NV, teachers=beta)
    return beta * _kl(logp_NV, middle_NV) + (1.0 - beta) * _kl(logq_NV, middle_NV)


def skew_forward_kl(logq_NV: Tensor, logp_NV: Tensor, *, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q), [N]: DistiLLM's (Ko et al. 2024); at most -log(skew), so that it stays bounded.

    ``skew`` from 0 (the forward KL) to below 1.
    """
    return _kl(logp_NV, _mixture(logq_NV, logp_NV, teachers=skew))


def skew_reverse_kl(logq_NV: Tensor, logp_NV: Tensor, *, skew: float) -> Tensor:
    """KL(q || (1 - skew) p + skew q), [N]: the same with the student in front (Ko et al. 2024)."""
    return _kl(logq_NV, _mixture(logq_NV, logp_NV, teachers=1.0 - skew))


def top_k_and_rest(logq_NV: Tensor, logp_NV: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Both distributions over the teacher's ``k`` likeliest ids and one bucket for all others, [N, k + 1] each.

    What is left of a teacher where only its top is stored. Any divergence of the two is at most that of the whole
    distributions (data processing), and equal at k = V; without the bucket it could be negative, or 0 where the two
    differ. Of equals the smaller ids are kept. Raises ``ValueError`` for a k that is not 1 to V.
    """
    if logq_NV.shape != logp_NV.shape:
        raise ShapeMismatch("log-probabilities of the two models", tuple(logq_NV.shape), tuple(logp_NV.shape))
    if not 1 <= k <= logp_NV.shape[-1]:
        raise ValueError(f"top_k_and_rest: k must lie between 1 and {logp_NV.shape[-1]}, got {k}")
    kept_NK = logp_NV.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return kept_and_rest(logq_NV, kept_NK), kept_and_rest(logp_NV, kept_NK)


def kept_and_rest(log_NV: Tensor, kept_NK: Tensor) -> Tensor:
    """Log-probabilities of these ids, each once in its row, and that of all others together, [N, k + 1]."""
    rest_N = _log_sum(log_NV.scatter(-1, kept_NK, -math.inf))
    return torch.cat([log_NV.gather(-1, kept_NK), rest_N[..., None]], dim=-1)


def _log_sum(log_NV: Tensor) -> Tensor:
    """log of the sum of exponentials; -inf, with a gradient of 0, where there is nothing to add."""
    nothing_N = (log_NV == -math.inf).all(dim=-1)
    summed_N = torch.where(nothing_N[..., None], 0.0, log_NV).logsumexp(dim=-1)
    return torch.where(nothing_N, -math.inf, summed_N)


def _mixture(logq_NV: Tensor, logp_NV: Tensor, *, teachers: float) -> Tensor:
    """log(teachers p + (1 - teachers) q)."""
    if teachers in {0.0, 1.0}:
        return logp_NV if teachers else logq_NV
    # Where both forbid a token logaddexp is right and its gradient NaN; any number will do there, its weight is 0.
    nowhere_NV = (logq_NV == -math.inf) & (logp_NV == -math.inf)
    return torch.logaddexp(
        torch.where(nowhere_NV, 0.0, logp_NV) + math.log(teachers),
        torch.where(nowhere_NV, 0.0, logq_NV) + math.log1p(-teachers),
    )


def _kl(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    if first_NV.shape != second_NV.shape:
        raise ShapeMismatch("log-probabilities of the two models", tuple(first_NV.shape), tuple(second_NV.shape))
    # Select before subtracting: -inf minus -inf is NaN, and 0 * NaN in the backward pass is NaN too.
    # "not -inf" rather than "> -inf": a NaN must come out as NaN, not as perfect agreement.
    possible_NV = first_NV != -math.inf
    gap_NV = torch.where(possible_NV, first_NV, 0.0) - torch.where(possible_NV, second_NV, 0.0)
    return _expected(first_NV, gap_NV)


def _expected(log_weight_NV: Tensor, value_NV: Tensor) -> Tensor:
    """Sum over columns of ``exp(log_weight) * value``, leaving out the columns of weight 0."""
    possible_NV = log_weight_NV != -math.inf
    weight_NV = torch.where(possible_NV, log_weight_NV, 0.0).exp()
    product_NV = weight_NV * torch.where(possible_NV, value_NV, 0.0)
    # A weight may underflow to 0 while its token is possible: an infinite gap is infinite still, not 0 * inf.
    product_NV = torch.where(value_NV == math.inf, math.inf, product_NV)
    return torch.where(possible_NV, product_NV, 0.0).sum(dim=-1)

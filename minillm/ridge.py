"""A value function without a value network: ridge regression of returns on what is in memory at each state.

The baseline of a row is predicted from rows that it was not fitted on (*cross-fitting*), so that it depends on the
state before a token and on other rows, and on neither the token nor what follows it: then it leaves the expectation of
the policy gradient untouched (design D5; tests/exact enumerates it).

Legend: N tokens of this rank, D features, F folds, P projected widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.types import require_shape

FOLDS = 4
"""Parts of the rows: each is predicted from the three others."""
STRENGTH = 1.0
"""Of the penalty, in pseudo-observations for each feature."""
WIDEST = 256
"""Features that a hidden state gives at most: wider ones are projected, since a fit costs D^2 a token and D^3."""
_SEED = 20231


class Moments(NamedTuple):
    """Sums over tokens, in float64, by fold; the first feature is the constant 1."""

    gram_FDD: Tensor
    moment_FD: Tensor


@torch.no_grad()
def cross_fitted(
    features_ND: Tensor,
    target_N: Tensor,
    fold_N: Tensor,
    *,
    folds: int = FOLDS,
    strength: float = STRENGTH,
    total: Callable[[Tensor], Tensor] = lambda mine: mine,
) -> Tensor:
    """Prediction of each token's target [N] from a ridge regression on the tokens of the *other* folds.

    ``total`` sums a tensor over ranks; a fit then rests on the tokens of all of them. Features are scaled to unit
    variance, and the constant is not penalised. Where the other folds hold no token the prediction is 0. Raises
    ``ShapeMismatch`` unless there is one target and one fold a token.
    """
    require_shape("targets", target_N, (len(features_ND),))
    require_shape("folds", fold_N, (len(features_ND),))
    wide_ND = torch.cat([torch.ones_like(features_ND[:, :1]), features_ND], dim=1).double()
    mine = _moments(wide_ND, target_N.double(), fold_N, folds=folds)
    of_all = Moments(*map(total, mine))
    weights_FD = torch.stack([_fit(of_all, without=fold, strength=strength) for fold in range(folds)])
    predicted_N: Tensor = (wide_ND * weights_FD[fold_N]).sum(dim=1)
    return predicted_N.to(target_N.dtype)


def projected(hidden_NH: Tensor, *, widest: int = WIDEST) -> Tensor:
    """At most ``widest`` features of hidden states: themselves, or random combinations that are the same everywhere."""
    width = hidden_NH.shape[1]
    if width <= widest:
        return hidden_NH
    noise = torch.Generator().manual_seed(_SEED)
    mix_HP = torch.randn(width, widest, generator=noise, dtype=torch.float64) / width**0.5
    mixed_NP: Tensor = hidden_NH @ mix_HP.to(hidden_NH.device, hidden_NH.dtype)
    return mixed_NP


def _moments(wide_ND: Tensor, target_N: Tensor, fold_N: Tensor, *, folds: int) -> Moments:
    parts = [(wide_ND[at], target_N[at]) for at in (fold_N == fold for fold in range(folds))]
    return Moments(torch.stack([x.T @ x for x, _ in parts]), torch.stack([x.T @ y for x, y in parts]))


def _fit(sums: Moments, *, without: int, strength: float) -> Tensor:
    """Weights [D] from all folds but one."""
    others = [fold for fold in range(len(sums.gram_FDD)) if fold != without]
    # Added up anew: the whole less one fold would keep that fold's rounding.
    gram_DD, moment_D = sums.gram_FDD[others].sum(dim=0), sums.moment_FD[others].sum(dim=0)
    count = gram_DD[0, 0]
    if count == 0:
        return torch.zeros_like(moment_D)
    mean_E, mean = gram_DD[0, 1:] / count, moment_D[0] / count
    spread_EE = gram_DD[1:, 1:] / count - mean_E[:, None] * mean_E[None, :]
    together_E = moment_D[1:] / count - mean_E * mean
    variance_E = spread_EE.diagonal().clone()
    # A feature that does not vary (in float64's rounding) says nothing.
    varies_E = variance_E > 1e-12 * (variance_E + mean_E.square())
    scale_E = torch.where(varies_E, variance_E, 1.0).rsqrt() * varies_E
    penalty = strength * len(mean_E) / count
    unit_EE = spread_EE * scale_E[:, None] * scale_E[None, :] + penalty * torch.eye(len(mean_E)).to(spread_EE)
    slope_E = scale_E * torch.linalg.solve(unit_EE, together_E * scale_E)
    return torch.cat([(mean - mean_E @ slope_E)[None], slope_E])

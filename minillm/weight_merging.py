"""Several models that were trained from one start, as one: how much of each task vector goes into the merged one.

A task vector is what training added to the start, delta = theta - theta_0. Every way to merge here is a linear
combination of task vectors, theta = theta_0 + eta * sum of c_m delta_m, and the shares c follow from the dot products
of the task vectors alone. So both passes over the weights, the one that measures and the one that merges, go piece by
piece, and nothing as long as a layer is ever held.

Each function is for one layer group (WARP, Ramé et al. 2024: all tensors of one transformer block, end to end): angles
are those of its vectors, and what happens in one group changes no other.

Legend: M models, N weights of a group or of a piece of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minillm.errors import ConfigError, ModelError

Method = Literal["lerp", "slerp", "nlerp"]
WIDE = torch.float64
"""What differences and sums are made in, whatever the weights are stored in: in bf16 a step of a hundredth of the way
from 1.0 to 1.25 rounds to no step at all. Rounded once, when the result is stored; with so many digits to spare an end
point, or a merge of equal models, comes back bit by bit."""
STILL = 1e-12
"""A task vector shorter than this share of the start's norm has no direction: its layers were frozen."""
STRAIGHT = 1e-6
"""Sine of an angle from which on two directions count as one line."""
ZERO, PARALLEL = "zero", "parallel"
"""Edges at which SLERP is LERP: a task vector is (nearly) zero; two have one direction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How a group is merged."""

    shares: tuple[float, ...]
    """By model: what its task vector is multiplied with. They do not sum to 1 where directions differ."""
    edges: tuple[str, ...] = ()
    """What made it fall back to LERP: of ``ZERO`` and ``PARALLEL``, each once."""


def normalised(weights: Sequence[float] | None, models: int) -> tuple[float, ...]:
    """Weights of so many models that sum to 1, equal where none are given; ``ConfigError`` where they are unfit."""
    if weights is None:
        return (1.0 / models,) * models
    total = math.fsum(weights) if all(math.isfinite(weight) and weight >= 0 for weight in weights) else 0.0
    if len(weights) != models or not 0 < total < math.inf:
        raise ConfigError(
            f"weights: got {list(weights)} for {models} models; wanted one of each, none below 0 and not all 0"
        )
    return tuple(weight / total for weight in weights)


def task_vector(start: Tensor, model: Tensor) -> Tensor:
    """What training added to a piece of the start, in ``WIDE``."""
    return model.to(WIDE) - start.to(WIDE)


def gram(vectors: Sequence[Tensor]) -> Tensor:
    """Dot products of vectors, or of a piece of each: [M, M] in ``WIDE``. Those of all pieces add up to the whole's."""
    rows_MN = torch.stack([vector.reshape(-1).to(WIDE) for vector in vectors])
    return rows_MN @ rows_MN.T


def norms(gram_MM: Tensor) -> tuple[float, ...]:
    """Lengths of the vectors of which these are the dot products."""
    return tuple(gram_MM.diagonal().clamp(min=0).sqrt().tolist())


def angle(gram_MM: Tensor, one: int, other: int, *, still: float = 0.0) -> float | None:
    """The angle between two of the vectors in radians, 0 to pi; None where one is not longer than ``still``."""
    length = norms(gram_MM)
    if min(length[one], length[other]) <= still:
        return None
    cosine = float(gram_MM[one, other]) / length[one] / length[other]
    return math.acos(min(1.0, max(-1.0, cosine)))


def angles(gram_MM: Tensor, *, still: float = 0.0) -> tuple[float | None, ...]:
    """Those of all pairs: of 0 and 1, of 0 and 2, …, of 1 and 2, …"""
    models = len(gram_MM)
    return tuple(angle(gram_MM, one, other, still=still) for one in range(models) for other in range(one + 1, models))


def mix(gram_MM: Tensor, *, method: Method, weights: Sequence[float], start_norm: float) -> Mix:
    """The shares of a group's task vectors; ``weights`` sum to 1. SLERP of more than two is the sequential one.

    ``ModelError`` where directions cancel, so that there is none to go in.
    """
    still = STILL * start_norm
    if method == "lerp":
        return lerp(weights)
    return (nlerp if method == "nlerp" else sequential)(gram_MM, weights, still=still)


def lerp(weights: Sequence[float]) -> Mix:
    """The weighted mean of the models themselves. It is shorter than its parts: at right angles by the root of M."""
    return Mix(shares=tuple(weights))


def slerp(gram_22: Tensor, share: float, *, still: float = 0.0) -> Mix:
    """WARP's SLERP of two task vectors at ``share`` of the way from the first to the second: sin((1-l) O)/sin O and
    sin(l O)/sin O, of the vectors as they are, O from their directions. Keeps a norm that both have, and no other."""
    if share in {0.0, 1.0}:  # an end point, and no rounding, whatever the angle
        return Mix(shares=(1.0 - share, share))
    omega = angle(gram_22, 0, 1, still=still)
    if omega is None:
        return Mix(shares=(1.0 - share, share), edges=(ZERO,))
    sine = math.sin(omega)
    if sine < STRAIGHT:
        if omega > math.pi / 2:
            raise _opposite("two task vectors point in opposite directions")
        return Mix(shares=(1.0 - share, share), edges=(PARALLEL,))
    return Mix(shares=(math.sin((1.0 - share) * omega) / sine, math.sin(share * omega) / sine))


def sequential(gram_MM: Tensor, weights: Sequence[float], *, still: float = 0.0) -> Mix:
    """SLERP one model after the other (WARP, equation 26): the first, then at its weight's part of all so far towards
    the next. The order counts: of four vectors at right angles and of one length the first two get 0.57, the last 0.38.
    """
    shares_M = torch.zeros(len(gram_MM), dtype=WIDE)
    shares_M[0] = 1.0
    so_far, edges = weights[0], dict[str, None]()
    for model in range(1, len(gram_MM)):
        so_far += weights[model]
        both_2M = torch.stack([shares_M, torch.zeros_like(shares_M)])
        both_2M[1, model] = 1.0
        step = slerp(both_2M @ gram_MM @ both_2M.T, weights[model] / so_far if so_far else 0.0, still=still)
        shares_M = torch.tensor(step.shares, dtype=WIDE) @ both_2M
        edges |= dict.fromkeys(step.edges)
    return Mix(shares=tuple(shares_M.tolist()), edges=tuple(edges))


def nlerp(gram_MM: Tensor, weights: Sequence[float], *, still: float = 0.0) -> Mix:
    """The direction of the weighted sum of the task vectors' directions, at the weighted mean of their norms. The order
    does not count; equal to SLERP of two at one half, where both have one norm. LERP where one is zero."""
    length, used = norms(gram_MM), [model for model, weight in enumerate(weights) if weight]
    if any(length[model] <= still for model in used):
        return Mix(shares=tuple(weights), edges=(ZERO,))
    parts = [weight / length[model] if weight else 0.0 for model, weight in enumerate(weights)]
    sum_M = torch.tensor(parts, dtype=WIDE)
    reach = math.sqrt(max(float(sum_M @ gram_MM @ sum_M), 0.0))  # of the sum of directions: 1 where all are one
    if reach < STRAIGHT:
        raise _opposite("the task vectors' directions cancel")
    mean = math.fsum(weight * length[model] for model, weight in enumerate(weights))
    return Mix(shares=tuple((sum_M * (mean / reach)).tolist()))


def combined(start: Tensor, vectors: Sequence[Tensor], shares: Sequence[float], *, eta: float = 1.0) -> Tensor:
    """A piece of theta_0 + eta * sum of share * task vector, in ``WIDE``: to be rounded once, by who stores it."""
    moved = torch.zeros(start.shape, dtype=WIDE)
    for vector, share in zip(vectors, shares, strict=True):
        moved.add_(vector.to(WIDE), alpha=share)
    return moved.mul_(eta).add_(start.to(WIDE))


def liti(start: Tensor, merged: Tensor, eta: float) -> Tensor:
    """Linear interpolation towards the initialisation: the start at ``eta`` 0, what was merged at 1; in ``WIDE``."""
    return combined(start, [task_vector(start, merged)], [1.0], eta=eta)


def _opposite(what: str) -> ModelError:
    return ModelError(
        f"{what}, so that there is no direction between them to merge in.\n"
        "  merge with the method lerp, or leave one of the models out"
    )

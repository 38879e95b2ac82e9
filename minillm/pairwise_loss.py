"""Losses of two responses to one prompt, of which one is preferred: DPO, TDPO, and the links between them and a number.

Legend: B pairs. ``w`` is the chosen response and ``l`` the rejected one; m is log student - log reference summed over a
response's tokens, its EOS included, and K the sum over the same states of KL(reference || student).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Value = Literal["dpo", "tdpo1", "tdpo2"]
"""What of a pair is compared: log-ratios, or log-ratios and sequential KLs."""
Link = Literal["sigmoid", "ipo", "hinge", "robust"]
"""How the comparison becomes a loss."""
Target = Literal["hard", "smoothed", "soft"]
"""Which probability the chosen response is to be given over the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What the student says of the pairs beside the reference."""

    m_w_B: Tensor
    m_l_B: Tensor
    k_w_B: Tensor | None = None
    k_l_B: Tensor | None = None


def pair_logit(value: Value, of: Compared, *, alpha: float = 0.5) -> Tensor:
    """h of each pair, [B]: above 0 where the student prefers the chosen response more than the reference does.

    ``dpo`` (Rafailov et al. 2023): m_w - m_l. ``tdpo1`` (Zeng et al. 2024): that less K_l - K_w, so that moving away
    from the reference on the chosen response is rewarded. ``tdpo2``: that less alpha (K_l - K_w) with K_w a constant,
    so that only the rejected side is held. All three are equal, with equal gradients, where student and reference are.
    """
    h_B = of.m_w_B - of.m_l_B
    if value == "dpo":
        return h_B
    assert of.k_w_B is not None and of.k_l_B is not None, f"{value} without the sequential KLs"
    if value == "tdpo1":
        return h_B - (of.k_l_B - of.k_w_B)
    assert value == "tdpo2", value
    return h_B - alpha * (of.k_l_B - of.k_w_B.detach())


def pairwise_loss(
    h_B: Tensor, *, beta: float, link: Link = "sigmoid", target: Target = "hard", noise: float = 0.0,
    soft_target_B: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of each pair, [B], in nats for ``sigmoid`` and ``robust``.

    ``sigmoid`` is the cross-entropy of sigma(beta h) with the target: 1 where it is ``hard``, 1 - ``noise`` where
    ``smoothed`` (conservative DPO), ``soft_target_B`` where ``soft``. ``robust`` (Chowdhury et al. 2024) is the loss
    whose mean over labels swapped with chance ``noise``, below 1/2, is that of the right ones; it is below 0 for large
    h. ``ipo`` (Azar et al. 2023) is (h - 1 / (2 beta))^2, of an h made of means over tokens; ``hinge`` is
    max(0, 1 - beta h), with slope 0 from the corner on.
    """
    assert (soft_target_B is not None) == (target == "soft"), target
    assert target == "hard" or link == "sigmoid", (link, target)
    if link == "ipo":
        return (h_B - 1.0 / (2.0 * beta)).square()
    if link == "hinge":
        return torch.relu(1.0 - beta * h_B)
    right_B, wrong_B = -logsigmoid(beta * h_B), -logsigmoid(-beta * h_B)
    if link == "robust":
        assert 0.0 <= noise < 0.5, noise
        return ((1.0 - noise) * right_B - noise * wrong_B) / (1.0 - 2.0 * noise)
    if soft_target_B is not None:
        return soft_target_B * right_B + (1.0 - soft_target_B) * wrong_B
    if target == "smoothed":
        return (1.0 - noise) * right_B + noise * wrong_B
    return right_B


def soft_target(*, teacher_w_B: Tensor, teacher_l_B: Tensor, ref_w_B: Tensor, ref_l_B: Tensor, beta: float) -> Tensor:
    """sigma(beta h_T), [B], with h_T what ``dpo`` compares were the student the teacher; from sequence log-probs in
    nats. At student = teacher the loss with this target has gradient 0."""
    return torch.sigmoid(beta * ((teacher_w_B - ref_w_B) - (teacher_l_B - ref_l_B)))

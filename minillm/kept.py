"""A teacher of whom only the likeliest ids are known, and the forward KL from what is known.

Legend: N tokens, n tokens of a piece, V vocabulary columns, K ids that are kept of each token, J = K + 1: those and one
bucket for all others, last. ``logq`` is the student, ``logp`` the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from minillm.errors import ShapeMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is known of a teacher at each of N tokens: a distribution over K ids and a bucket for all others.

    A token for which K is the whole vocabulary has an empty bucket, of log-probability -inf.
    """

    ids_NK: Tensor
    """int64, each once in its row."""
    logp_NJ: Tensor
    """Normalised."""

    def __post_init__(self) -> None:
        tokens, kept = self.ids_NK.shape
        if self.logp_NJ.shape != (tokens, kept + 1):
            raise ShapeMismatch(
                "log-probs of the kept ids and their rest", tuple(self.logp_NJ.shape), (tokens, kept + 1)
            )

    def of(self, here: slice) -> Self:
        """That of some tokens, as views."""
        return type(self)(ids_NK=self.ids_NK[here], logp_NJ=self.logp_NJ[here])


def kept_forward_kl_(kept: Kept, *, logq_nV: Tensor, q_nV: Tensor, out_nV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(teacher || student) over the kept ids and the rest [n], its derivative by the student's logits, in ``out``).

    By a logit of a kept id that is q - p; by one of the others q - p_rest q / q_rest, since they share what the teacher
    gives to all of them in the proportions that the student gives them. An id off the support has a ``logq`` of -inf.
    No further tensor of [n, V] is made.
    """
    logp_nJ = kept.logp_NJ.to(logq_nV.dtype)
    p_nJ = logp_nJ.exp()
    # What is left of q without the kept ids, as a softmax of its own: 1 - sum(q) would lose all digits of a small rest.
    out_nV.copy_(logq_nV).scatter_(1, kept.ids_NK, -torch.inf)
    highest_n1 = out_nV.amax(dim=1, keepdim=True)
    nothing_n1 = highest_n1 == -torch.inf
    out_nV.sub_(highest_n1.masked_fill(nothing_n1, 0.0)).exp_()
    total_n1 = out_nV.sum(dim=1, keepdim=True)  # at least 1 where there is anything
    logq_nJ = torch.cat([logq_nV.gather(1, kept.ids_NK), highest_n1 + total_n1.clamp(min=1.0).log()], dim=1)
    gap_nJ = torch.where(logp_nJ == -torch.inf, 0.0, logp_nJ - logq_nJ)
    value_n = torch.where(gap_nJ == torch.inf, gap_nJ, p_nJ * gap_nJ).sum(dim=1)  # also where p underflows to 0
    out_nV.mul_(p_nJ[:, -1:] / total_n1.clamp(min=1.0))
    torch.sub(q_nV, out_nV, out=out_nV)
    return value_n, out_nV.scatter_add_(1, kept.ids_NK, -p_nJ[:, :-1])

"""From final hidden states to numbers per token: both heads applied tile by tile, nothing of size [tokens,
vocabulary] kept.

Legend: N kept tokens, V real vocabulary ids, H hidden width (each model its own), C packed bytes of V. A *head* turns a
hidden state into logits over the real ids; rows of a head beyond those are cut off before the softmax, so both
distributions are renormalised exactly and a padded row can neither be drawn nor receive a gradient (design D2, D9).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minillm import divergences
from minillm.errors import NonFinite
from minillm.sampling import restrict, unpack_support
from minillm.types import Rollout, Scored

TILE_BYTES = 40 * 2**20
"""Memory for one tile of logits of one model, in fp32; about eleven such tensors live at once. Above 32 MiB, to which
glibc lets its heap take blocks: there, freed tiles of slightly different sizes once piled up to 2 GiB."""

STATISTICS = ("logq", "logp", "entropy", "reverse_kl", "forward_kl", "jsd", "skew_fkl", "skew_rkl")
"""Numbers that there are for each token; see ``tile_statistics``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadWeights:
    """What a head multiplies by: rows of real ids only. ``logits = softcap * tanh(scale * (h W^T + b) / softcap)``."""

    weight_VH: Tensor
    bias_V: Tensor | None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Logits of each hidden state, [N, V], in fp32 (float64 if the hidden states are), before any temperature."""
        logits_NV = torch.nn.functional.linear(hidden_NH, self.weight_VH, self.bias_V)
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """What the teacher says about N tokens, not yet multiplied out: its head and its final hidden states."""

    head: HeadWeights
    hidden_NH: Tensor


def rows_of_a_tile(vocabulary: int) -> int:
    """Tokens that are worked on together: as many as ``TILE_BYTES`` of logits hold."""
    return max(16, TILE_BYTES // (4 * vocabulary))


@torch.no_grad()
def token_statistics(
    hidden_NH: Tensor,
    *,
    head: HeadWeights,
    taken_N: Tensor,
    wanted: Sequence[str],
    temperature: float = 1.0,
    teacher: TeacherView | None = None,
    support_NC: Tensor | None = None,
    jsd_beta: float = 0.5,
    skew: float = 0.1,
    tile: int | None = None,
) -> dict[str, Tensor]:
    """The wanted numbers for each of N tokens, each [N], without gradient (``token_loss`` has one).

    ``wanted`` is chosen from ``STATISTICS``: log-probs of the taken token under student (``logq``) and teacher
    (``logp``), the student's ``entropy``, and the divergences of ``minillm.divergences``, all at ``temperature`` (of
    both models) and, with a support, over the kept ids only, both distributions renormalised. ``tile`` is the number of
    tokens a pass; by default it follows from ``TILE_BYTES``.
    """
    rows, count = tile or rows_of_a_tile(head.weight_VH.shape[0]), hidden_NH.shape[0]
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for start in range(0, max(count, 1), rows):
        here = slice(start, min(start + rows, count))
        support = None if support_NC is None else unpack_support(support_NC[here], head.weight_VH.shape[0])
        values = tile_statistics(
            head.logits(hidden_NH[here]), None if teacher is None else teacher.head.logits(teacher.hidden_NH[here]),
            taken_n=taken_N[here], temperature=temperature, support_nV=support, wanted=wanted, jsd_beta=jsd_beta,
            skew=skew,
        )  # fmt: skip
        for name in wanted:
            parts[name].append(values[name])
    return {name: torch.cat(columns) for name, columns in parts.items()}


def tile_statistics(
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    *,
    taken_n: Tensor,
    temperature: float,
    support_nV: Tensor | None,
    wanted: Sequence[str],
    jsd_beta: float,
    skew: float,
) -> dict[str, Tensor]:
    """The same for one tile from whole logits: the slow obvious form, and the definition that tiles are tested
    against."""
    logq_nV = restrict(student_nV / temperature, support_nV).log_softmax(dim=-1)
    values = {"logq": logq_nV.gather(1, taken_n[:, None])[:, 0]}
    if "entropy" in wanted:
        values["entropy"] = divergences.entropy(logq_nV)
    if teacher_nV is None:
        return values
    logp_nV = restrict(teacher_nV / temperature, support_nV).log_softmax(dim=-1)
    values["logp"] = logp_nV.gather(1, taken_n[:, None])[:, 0]
    if "reverse_kl" in wanted:
        values["reverse_kl"] = divergences.reverse_kl(logq_nV, logp_nV)
    if "forward_kl" in wanted:
        values["forward_kl"] = divergences.forward_kl(logq_nV, logp_nV)
    if "jsd" in wanted:
        values["jsd"] = divergences.jensen_shannon(logq_nV, logp_nV, beta=jsd_beta)
    if "skew_fkl" in wanted:
        values["skew_fkl"] = divergences.skew_forward_kl(logq_nV, logp_nV, skew=skew)
    if "skew_rkl" in wanted:
        values["skew_rkl"] = divergences.skew_reverse_kl(logq_nV, logp_nV, skew=skew)
    return values


def spread(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Per-token values laid back onto [B, T] in row order; 0 off the mask."""
    out_BT = values_N.new_zeros(mask_BT.shape)
    out_BT[mask_BT] = values_N
    return out_BT


class StatisticsReader(Protocol):
    """A model whose head can be applied to hidden states."""

    def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
        """``token_statistics`` with the model's own head."""


@torch.no_grad()
def score(rollout: Rollout, *, student: StatisticsReader, teacher_head: HeadWeights, temperature: float) -> Scored:
    """What both models say about the sampled tokens, from the hidden states that the rollout kept: no further forward
    pass.

    Raises ``NonFinite`` if a score of a sampled token is not a finite number: a teacher that forbids a token which the
    student drew has an infinite reverse KL, and a policy gradient from it would be meaningless.
    """
    assert rollout.student_hidden_BTH is not None and rollout.teacher_hidden_BTH is not None, (
        "the rollout kept no states"
    )
    mask_BT = rollout.mask_BT
    values = student.statistics(
        rollout.student_hidden_BTH[mask_BT],
        taken_N=rollout.response_BT[mask_BT],
        wanted=("logq", "logp", "entropy", "reverse_kl"),
        temperature=temperature,
        teacher=TeacherView(head=teacher_head, hidden_NH=rollout.teacher_hidden_BTH[mask_BT]),
        support_NC=None if rollout.support_BTC is None else rollout.support_BTC[mask_BT],
    )
    for name, value_N in values.items():
        if not bool(value_N.isfinite().all()):
            raise NonFinite(_where_not_finite(name, value_N, rollout))
    return Scored(
        rollout=rollout,
        logq_BT=spread(values["logq"], mask_BT),
        logp_BT=spread(values["logp"], mask_BT),
        reverse_kl_BT=spread(values["reverse_kl"], mask_BT),
        entropy_BT=spread(values["entropy"], mask_BT),
    )


def _where_not_finite(name: str, value_N: Tensor, rollout: Rollout) -> str:
    row, position = rollout.mask_BT.nonzero()[int((~value_N.isfinite()).nonzero()[0])].tolist()
    return (
        f"{name} is {float(value_N[~value_N.isfinite()][0])} for row {rollout.prompts.uid_B[row]!r}, "
        f"response position {position}; no update was made from it.\n"
        "  look at the teacher's and student's dtype (fp16 overflows) and at the row itself"
    )

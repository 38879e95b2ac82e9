"""The numbers of each token from whole logits: the slow obvious form, which holds for infinities too.

Legend: n tokens, V real vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minillm import divergences
from minillm.kept import Kept
from minillm.sampling import restrict


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
    kept: Kept | None = None,
) -> dict[str, Tensor]:
    """``scoring.token_statistics`` of one piece, by autograd; numbers of a model that is not there are left out."""
    logq_nV = restrict(student_nV / temperature, support_nV).log_softmax(dim=-1)
    values = {"logq": logq_nV.gather(1, taken_n[:, None])[:, 0]}
    if "entropy" in wanted:
        values["entropy"] = divergences.entropy(logq_nV)
    if kept is not None:
        logq_nJ = divergences.kept_and_rest(logq_nV, kept.ids_NK)
        values["cached_kl"] = divergences.forward_kl(logq_nJ, kept.logp_NJ.to(logq_nJ.dtype))
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

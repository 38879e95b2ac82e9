"""What the log says of a rollout and of the credit that was made of it.

Legend: B this rank's rows, T response positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minillm.ranks import Ranks
from minillm.repetition import repetition_rewards
from minillm.types import Rollout, Stop, Targets
from minillm.updates import Sums

_SHOWN_NGRAM = 3
"""Length of the n-grams, in tokens, whose return the log counts, whatever is rewarded."""


def rollout_figures(targets: Targets, *, sequences: int, ranks: Ranks) -> dict[str, float]:
    """The log's figures of a rollout, of which all ranks together have so many responses; every rank must call it."""
    scored = targets.scored
    rollout, mask_BT = scored.rollout, scored.rollout.mask_BT
    sums = _text_sums(rollout)
    sums.add(
        rows=len(rollout.stop_B),
        kl=scored.reverse_kl_BT.sum(),
        entropy=scored.entropy_BT.sum(),
        square=targets.advantage_BT.square().sum(),
        mass=torch.where(mask_BT, scored.logp_BT.exp(), 0.0).sum(),
        leak=_leaks(targets),
        weight=targets.importance_BT.sum(),
        weight_square=targets.importance_BT.square().sum(),
        teacher_forwards=rollout.teacher_forwards,
    )
    if scored.anchor is not None:
        sums.add(anchor_kl=scored.anchor.kl_BT.sum())
    total = sums.over_ranks(ranks)
    tokens = max(total["tokens"], 1.0)
    held = {"anchor_kl": total["anchor_kl"] / sequences} if scored.anchor is not None else {}
    return {
        "tokens": total["tokens"],
        "reverse_kl": total["kl"] / sequences,
        "reverse_kl_per_token": total["kl"] / tokens,
        **held,
        "entropy": total["entropy"] / tokens,
        **_text_figures(total),
        "teacher_mass": total["mass"] / tokens,
        "padding_leak": total["leak"],
        "advantage_std": (total["square"] / tokens) ** 0.5,
        "importance_ess": total["weight"] ** 2 / max(tokens * total["weight_square"], 1e-30),
        "teacher_forwards": total["teacher_forwards"] / ranks.size,
    }


def text_figures(rollout: Rollout, *, ranks: Ranks) -> dict[str, float]:
    """How long the responses of all ranks are, and how much they repeat; every rank must call it."""
    sums = _text_sums(rollout)
    sums.add(rows=len(rollout.stop_B))
    return _text_figures(sums.over_ranks(ranks))


def _text_sums(rollout: Rollout) -> Sums:
    """What this rank's responses are as text, before the models' numbers."""
    again_BT = repetition_rewards(rollout.response_BT, rollout.mask_BT, ngram=_SHOWN_NGRAM)
    sums = Sums()
    sums.add(
        tokens=rollout.mask_BT.sum(), cut=sum(stop is Stop.LENGTH for stop in rollout.stop_B),
        repeating=again_BT.any(dim=1).sum(), again=again_BT.sum(),
    )  # fmt: skip
    return sums


def _text_figures(total: Mapping[str, float]) -> dict[str, float]:
    """Lengths without the end token, shares of responses and of tokens, from the sums of all ranks."""
    rows = max(total["rows"], 1.0)
    return {
        "mean_length": (total["tokens"] - (rows - total["cut"])) / rows,
        "cut_share": total["cut"] / rows,
        "repeated_tokens": total["again"] / max(total["tokens"], 1.0),
        f"repetition_{_SHOWN_NGRAM}": total["repeating"] / rows,
    }


def _leaks(targets: Targets) -> Tensor:
    """How many places without a token carry credit or a score: there is no right number but 0."""
    scored, off_BT = targets.scored, ~targets.scored.rollout.mask_BT
    values = (targets.advantage_BT, targets.importance_BT, scored.logq_BT, scored.logp_BT, scored.reverse_kl_BT)
    return torch.stack([(value[off_BT] != 0).sum() for value in values]).sum()

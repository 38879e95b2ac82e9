"""Pairs of responses as the rows of one forward, and what numbers per token make of them.

Legend: B pairs, R = 2B rows with the chosen responses first, L positions, T response positions, N response tokens of
all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minillm.batches import example_batch
from minillm.pairwise_loss import Compared, pair_logit, pairwise_loss
from minillm.preference_reference import Known, Prepared
from minillm.preference_stage import PreferenceStage
from minillm.scored_rows import spread
from minillm.types import PreferencePair
from minillm.updates import nobody


class Side(NamedTuple):
    """One of a pair's responses, as a ``types.Example``."""

    uid: str
    ids: tuple[int, ...]
    response_ids: tuple[int, ...]


def sides(pairs: Sequence[PreferencePair]) -> list[Side]:
    """The rows of one forward over pairs: all chosen responses, then all rejected ones."""
    return [
        *(Side(one.prompt.uid, one.prompt.ids, one.chosen_ids) for one in pairs),
        *(Side(one.prompt.uid, one.prompt.ids, one.rejected_ids) for one in pairs),
    ]


def lengths_of_pair(one: PreferencePair) -> tuple[int, int]:
    """Tokens of its two rows."""
    prompt = len(one.prompt.ids)
    return prompt + len(one.chosen_ids), prompt + len(one.rejected_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """Some pairs as one forward reads them."""

    count: int
    inputs: dict[str, Tensor]
    """Of ``Student.loss``; those of a dummy row where there is no pair."""
    mask_RT: Tensor
    """True for the tokens of each row: they stand at its left."""
    tokens_R: Tensor
    reference_R: Tensor | None
    """Log-probabilities of the responses, where they are not asked for in the forward."""
    target_B: Tensor | None

    @classmethod
    def of(cls, known: Known, picked: Sequence[int], *, pad_id: int, device: torch.device) -> PairRows:
        """Those of ``known`` with these indices."""
        rows = sides([known.pairs[place] for place in picked])
        inputs = nobody(device)
        if rows:
            batch = example_batch(rows, pad_id=pad_id, device=device)
            inputs = {"ids_BL": batch.ids_BL, "mask_BL": batch.mask_BL, "predict_BL": batch.target_BL}
        lengths = [len(row.response_ids) for row in rows]
        tokens_R = torch.tensor(lengths, dtype=torch.int64, device=device)
        place_T = torch.arange(max(lengths, default=0), device=device)
        reference_R = target_B = None
        if known.reference is not None:
            logps = [known.reference[place][side] for side in (0, 1) for place in picked]
            reference_R = torch.tensor(logps, dtype=torch.float64, device=device)
        if known.soft_targets is not None:
            targets = [known.soft_targets[place] for place in picked]
            target_B = torch.tensor(targets, dtype=torch.float64, device=device)
        return cls(
            count=len(picked), inputs=inputs, mask_RT=place_T < tokens_R[:, None], tokens_R=tokens_R,
            reference_R=reference_R, target_B=target_B,
        )  # fmt: skip

    def by_row(self, value_N: Tensor) -> Tensor:
        """Sums over the tokens of each row, [R], in float64: differences of such sums are what is learnt from."""
        # Laid out by rows: adding by the index of a row has no fixed order on a GPU, and so no fixed bits.
        return spread(value_N.double(), self.mask_RT).sum(dim=1)

    def sides_of(self, value_R: Tensor) -> tuple[Tensor, Tensor]:
        """(Chosen [B], rejected [B])."""
        return value_R[: self.count], value_R[self.count :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What the objective makes of some pairs: each [B], with a gradient where the numbers have one."""

    loss_B: Tensor
    h_B: Tensor
    m_w_B: Tensor
    """Log-ratios of the chosen responses to the reference, in nats, summed over tokens; and of the rejected ones."""
    m_l_B: Tensor
    kl: tuple[Tensor, Tensor] | None
    """Sequential KLs from the reference, of the chosen and of the rejected responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The stage's objective on pairs."""

    stage: PreferenceStage
    target: Literal["hard", "smoothed", "soft"]
    live: bool
    """Whether the reference is asked in the forward."""

    @classmethod
    def of(cls, stage: PreferenceStage, known: Prepared) -> Comparison:
        """That of a stage whose pairs are known."""
        return cls(stage=stage, target=known.target, live=known.live is not None)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Numbers of ``scoring.STATISTICS`` that it reads."""
        return ("logq", "entropy", *(("logp", "forward_kl") if self.live else ()))

    def read(self, of: Mapping[str, Tensor], rows: PairRows) -> Read:
        """Losses and what they are made of, from numbers per token [N]."""
        stage = self.stage
        reference_R = rows.by_row(of["logp"]) if rows.reference_R is None else rows.reference_R
        m_w_B, m_l_B = rows.sides_of(rows.by_row(of["logq"]) - reference_R)
        kl = rows.sides_of(rows.by_row(of["forward_kl"])) if self.live else None
        compared = Compared(m_w_B=m_w_B, m_l_B=m_l_B)
        if stage.link == "ipo":
            tokens_w_B, tokens_l_B = rows.sides_of(rows.tokens_R)
            compared = Compared(m_w_B=m_w_B / tokens_w_B, m_l_B=m_l_B / tokens_l_B)
        elif kl is not None:
            compared = Compared(m_w_B=m_w_B, m_l_B=m_l_B, k_w_B=kl[0], k_l_B=kl[1])
        h_B = pair_logit(stage.value, compared, alpha=stage.alpha)
        loss_B = pairwise_loss(
            h_B, beta=stage.beta, link=stage.link, target=self.target, noise=stage.label_noise,
            soft_target_B=rows.target_B,
        )  # fmt: skip
        return Read(loss_B=loss_B, h_B=h_B, m_w_B=m_w_B, m_l_B=m_l_B, kl=kl)

    def sums(self, of: Mapping[str, Tensor], rows: PairRows) -> dict[str, float]:
        """Sums over the pairs of what is told of them, and over tokens of what is told of those."""
        found = self.read(of, rows)
        half = torch.tensor(0.5, dtype=found.h_B.dtype, device=found.h_B.device)
        beta = self.stage.beta
        sums: dict[str, float | Tensor] = {
            "pairs": float(rows.count),
            "pair_loss": found.loss_B.sum(),
            "sft_loss": -rows.sides_of(rows.by_row(of["logq"]))[0].sum(),
            "accuracy": torch.heaviside(found.h_B.detach(), half).sum(),  # a tie is neither right nor wrong
            "margin": beta * found.h_B.sum(),
            "chosen_reward": beta * found.m_w_B.sum(),
            "rejected_reward": beta * found.m_l_B.sum(),
            "chosen_log_ratio": found.m_w_B.sum(),
            "rejected_log_ratio": found.m_l_B.sum(),
            "entropy": of["entropy"].double().sum(),
            "tokens": float(len(of["entropy"])),
            "chosen_tokens": float(rows.sides_of(rows.tokens_R)[0].sum()),
        }
        if found.kl is not None:
            sums |= {"chosen_kl": found.kl[0].sum(), "rejected_kl": found.kl[1].sum()}
        return {name: float(value) for name, value in sums.items()}


def told(sums: Mapping[str, float], *, sft_weight: float) -> dict[str, float]:
    """Means over all pairs and, of the entropy, over all response tokens. ``loss`` is what is minimised; where the
    cross-entropy of the chosen responses has a weight in it, it and that of the pairs are told beside it."""
    counts = {name: max(sums[name], 1.0) for name in ("pairs", "tokens", "chosen_tokens")}
    over = {"entropy": "tokens", "sft_loss": "chosen_tokens"}
    means = {name: sums[name] / counts[over.get(name, "pairs")] for name in sums if name not in counts}
    pair_loss, sft_loss = means.pop("pair_loss"), means.pop("sft_loss")
    parts = {"pair_loss": pair_loss, "sft_loss": sft_loss} if sft_weight else {}
    return {"loss": pair_loss + sft_weight * sft_loss, **parts, **means}

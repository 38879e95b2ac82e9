"""Importance weights when both models are tempered and the student's support is all that may be drawn: what top-k,
top-p and the n-gram ban leave.

The mixture is then m = (1 - alpha) q + alpha p with q the student on its own support and p the teacher on *the
student's*, each renormalised. Both are taken from the decode loop as it draws; weights from the log-probs that scoring
gives. Enumerated over the vocabulary.

Legend: V ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minillm.by_definition import tile_statistics
from minillm.decode import _mix
from minillm.reading import Asked
from minillm.repetition import held_back
from minillm.types import Decoding
from tests.exact.tabular import assert_close
from tests.exact.test_importance import weight_of

V = 7
CHAINS = {
    "plain": Decoding(max_new_tokens=1),
    "temperature": Decoding(max_new_tokens=1, temperature=0.7),
    "top-k": Decoding(max_new_tokens=1, top_k=4),
    "top-p": Decoding(max_new_tokens=1, top_p=0.8),
    "no-repeat": Decoding(max_new_tokens=1, no_repeat_ngram_size=2),
    "all": Decoding(max_new_tokens=1, temperature=0.7, top_k=5, top_p=0.95),
    "all-no-repeat": Decoding(max_new_tokens=1, temperature=0.7, top_k=5, top_p=0.95, no_repeat_ngram_size=2),
}
NEVER_TRUNCATED = {"plain", "temperature"}
PAST = torch.tensor([[2, 5, 2, 6, 0, 2, 3, 2]])
"""What stands in the row: 5, 6 and 3 have followed its last id."""
ALPHAS = [0.05, 0.2, 0.7]
STATES = range(4)
KINDS = ["per_step", "coin"]
VISIBLE = 1e-3


@dataclass(frozen=True, slots=True)
class State:
    """Logits of both models before one token."""

    student_V: Tensor
    teacher_V: Tensor

    @classmethod
    def number(cls, seed: int) -> State:
        noise = torch.Generator().manual_seed(seed)
        return cls(*(2 * torch.randn(2, V, generator=noise, dtype=torch.float64)))

    def drawn(self, decoding: Decoding) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, p [V] and the student's support, as the decode loop draws: tails from the first, heads from the second."""
        rows = torch.zeros(1, dtype=torch.long)
        asked, taught = (Asked(rows, logits_V[None]) for logits_V in (self.student_V, self.teacher_V))
        held = held_back(
            PAST, PAST >= 0, vocabulary=V, ngram=decoding.no_repeat_ngram_size, penalty=1.0,
            eos_E=torch.tensor([6]),
        )  # fmt: skip
        student_1V, chosen_1V, support_1V = _mix(asked, [taught], decoding=decoding, held=held)
        return student_1V.softmax(-1)[0], chosen_1V.softmax(-1)[0], None if support_1V is None else support_1V[0]

    def scored(self, *, temperature: float, support_V: Tensor | None) -> tuple[Tensor, Tensor]:
        """log q and log p [V] of each id, as scoring gives them for a token that was drawn."""
        values = tile_statistics(
            self.student_V.expand(V, V), self.teacher_V.expand(V, V), taken_n=torch.arange(V),
            temperature=temperature, support_nV=None if support_V is None else support_V.expand(V, V),
            wanted=("logq", "logp"), jsd_beta=0.5, skew=0.1,
        )  # fmt: skip
        return values["logq"], values["logp"]


def weighted_chance(
    kind: str, q_V: Tensor, p_V: Tensor, scores: tuple[Tensor, Tensor], *, alpha: float
) -> tuple[Tensor, Tensor]:
    """E over the coin of chance x weight of each id, [V]; and the chance that an id is drawn at all, [V]."""
    tails_V, heads_V = (weight_of(kind, *scores, alpha=alpha, drew=drew) for drew in (False, True))
    chance_V = (1 - alpha) * q_V + alpha * p_V
    product_V = (1 - alpha) * q_V * tails_V + alpha * p_V * heads_V
    return torch.where(chance_V > 0, product_V, 0.0), chance_V


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_mean_one_and_turn_the_mixture_into_the_student(
    kind: str, chain: str, alpha: float, state: int
) -> None:
    """E_m[w] = 1, and E_m[w f] = E_q[f] for every f: id by id, chance under m x weight is q."""
    decoding, logits = CHAINS[chain], State.number(state)
    q_V, p_V, support_V = logits.drawn(decoding)
    scores = logits.scored(temperature=decoding.temperature, support_V=support_V)
    weighted_V, chance_V = weighted_chance(kind, q_V, p_V, scores, alpha=alpha)
    assert float(weighted_V.sum()) == pytest.approx(1.0, abs=1e-12)
    assert_close(weighted_V, q_V)
    kept_V = torch.ones(V, dtype=torch.bool) if support_V is None else support_V
    assert torch.equal(chance_V > 0, kept_V)
    assert (int(kept_V.sum()) < V) == (chain not in NEVER_TRUNCATED)
    if decoding.no_repeat_ngram_size:
        assert not bool(kept_V[[3, 5]].any())
    if chain == "no-repeat":
        assert int(kept_V.sum()) == V - 2
    assert float(chance_V.sum()) == pytest.approx(1.0, abs=1e-12)


def mean_weight(state: int, chain: str, *, scored: Decoding, teacher_free: bool = False) -> float:
    """E_m[q/m] at alpha .2 where scoring follows ``scored`` and, with ``teacher_free``, the teacher draws any id."""
    decoding, logits = CHAINS[chain], State.number(state)
    q_V, p_V, support_V = logits.drawn(decoding)
    if teacher_free:
        p_V = (logits.teacher_V / decoding.temperature).softmax(-1)
    truncated = scored.top_k or scored.top_p < 1 or scored.no_repeat_ngram_size
    scores = logits.scored(temperature=scored.temperature, support_V=support_V if truncated else None)
    weighted_V, _ = weighted_chance("per_step", q_V, p_V, scores, alpha=0.2)
    kept_V = torch.ones(V, dtype=torch.bool) if support_V is None else support_V
    return float(weighted_V[kept_V].sum())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain != "plain"])
def test_weights_that_forget_the_chain_or_a_teacher_off_the_support_are_seen(chain: str, state: int) -> None:
    """Negative controls: scores of the plain distributions, and a teacher that is not held to the student's support."""
    assert mean_weight(state, chain, scored=CHAINS[chain]) == pytest.approx(1.0, abs=1e-12)
    assert abs(mean_weight(state, chain, scored=CHAINS["plain"]) - 1) > VISIBLE
    if chain != "temperature":
        assert abs(mean_weight(state, chain, scored=CHAINS[chain], teacher_free=True) - 1) > VISIBLE

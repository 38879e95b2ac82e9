"""Responses under an n-gram ban or a repetition penalty are distributed as enumerated, and so is the stored support.

Each prefix of the table models of ``mixture`` gives a distribution of its own: the student's logits, penalised by hand,
on the ids that no n-gram of prompt and prefix forbids, and the teacher's on the same ids.

Legend: V ids, T response positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from minillm import decode
from minillm.repetition import Held, held_back, penalised
from minillm.sampling import coin_group, unpack_support
from minillm.types import Rollout
from tests.exact.mixture import EOS, STUDENT, TEACHER, Response, T, V, p_value, responses, roll

PROMPT = 1
"""The one id of every prompt."""
ROWS = {0.0: 12_000, 0.2: 1_200, 1.0: 1_200}
"""Rows of a rollout by the teacher's share; with mixing each has coins, and so a reading of the teacher, of its own."""
TOLD, SURE = 1e-3, 1e-6
SETTINGS: dict[str, dict[str, Any]] = {
    "no id twice": {"no_repeat_ngram_size": 1},
    "no pair twice": {"no_repeat_ngram_size": 2},
    "penalised": {"repetition_penalty": 3.0},
    "penalised, no pair twice": {"repetition_penalty": 0.4, "no_repeat_ngram_size": 2},
}


def allowed(prefix: Response, *, ngram: int) -> list[bool]:
    """By trying: may this id come after prompt and prefix?"""
    text = (PROMPT, *prefix)
    stand = {text[at : at + ngram] for at in range(len(text) - ngram + 1)}
    return [v == EOS or ngram == 0 or (*text, v)[-ngram:] not in stand for v in range(V)]


def shares(logits: list[float], prefix: Response, *, ngram: int, penalty: float) -> list[float]:
    """One model's probabilities after this prefix."""
    text = {PROMPT, *prefix}
    logits = [x if v not in text else x / penalty if x > 0 else x * penalty for v, x in enumerate(logits)]
    mass = [math.exp(x) if may else 0.0 for x, may in zip(logits, allowed(prefix, ngram=ngram), strict=True)]
    return [each / sum(mass) for each in mass]


def enumerated(
    alpha: float, *, no_repeat_ngram_size: int = 0, repetition_penalty: float = 1.0
) -> dict[Response, float]:
    """Probability of each response that can be, of up to T tokens."""
    how: dict[str, Any] = {"ngram": no_repeat_ngram_size, "penalty": repetition_penalty}
    cells: dict[Response, float] = {}
    open_prefixes: list[tuple[Response, int, float]] = [((), 0, 1.0)]
    while open_prefixes:
        prefix, node, mass = open_prefixes.pop()
        q, p = (shares(model.table_XV[node].tolist(), prefix, **how) for model in (STUDENT, TEACHER))
        for v in range(V):
            share, response = (1 - alpha) * q[v] + alpha * p[v], (*prefix, v)
            if share > 0 and (v == EOS or len(response) == T):
                cells[response] = mass * share
            elif share > 0:
                open_prefixes.append((response, node * V + v + 1, mass * share))
    return cells


def rolled(alpha: float, **decoding: Any) -> Rollout:
    """One rollout of rows that share no coin."""
    rows = ROWS[alpha]
    groups = rows * 5 // 4 if alpha else 1
    names = list(map(str, range(rows * 4)))
    uids = list({coin_group(name, groups): name for name in names}.values()) if alpha else names
    return roll(uids[:rows], alpha, coin_groups=groups, **decoding)


@pytest.mark.parametrize("alpha", ROWS)
@pytest.mark.parametrize("name", SETTINGS)
def test_responses_follow_the_enumerated_distribution(name: str, alpha: float) -> None:
    rollout = rolled(alpha, **SETTINGS[name])
    assert len(rollout.stop_B) == ROWS[alpha]
    chance_of = enumerated(alpha, **SETTINGS[name])
    assert math.isclose(sum(chance_of.values()), 1.0)
    assert p_value(responses(rollout), chance_of) > TOLD
    assert (len(chance_of) < len(enumerated(alpha))) == ("no_repeat_ngram_size" in SETTINGS[name])


@pytest.mark.parametrize("ngram", [1, 2])
def test_the_support_that_is_stored_is_the_one_that_was_drawn_from(ngram: int) -> None:
    """And the log-probs are exact: by the enumeration, of whole responses."""
    rollout = rolled(0.0, no_repeat_ngram_size=ngram)
    assert rollout.support_BTC is not None
    support_BTV = unpack_support(rollout.support_BTC, V)
    chance_of = enumerated(0.0, no_repeat_ngram_size=ngram)
    for row, response in enumerate(responses(rollout)[:500]):
        want = [allowed(response[:t], ngram=ngram) for t in range(len(response))]
        assert support_BTV[row, : len(response)].tolist() == want
        assert float(rollout.logq_BT[row].sum().exp()) == pytest.approx(chance_of[response], rel=1e-12)
    assert bool(support_BTV[~rollout.mask_BT].all())


def test_log_probs_under_a_penalty_are_those_of_what_was_drawn() -> None:
    """Of the penalised student, also at tokens that the teacher drew."""
    settings = SETTINGS["penalised"]
    alone, chance_of = rolled(0.0, **settings), enumerated(0.0, **settings)
    taught = rolled(1.0, **settings)
    assert taught.repetition_penalty == alone.repetition_penalty == 3.0
    for rollout in (alone, taught):
        said_N = rollout.logq_BT.sum(dim=1).exp().tolist()
        assert said_N == pytest.approx([chance_of[response] for response in responses(rollout)], rel=1e-12)
    plain = enumerated(0.0)  # negative control
    assert alone.logq_BT.sum(dim=1).exp().tolist() != pytest.approx([plain[one] for one in responses(alone)], rel=1e-2)


BROKEN: dict[str, Callable[..., Held]] = {
    "the ban ignores the prompt": lambda ids_NL, real_NL, **more: held_back(ids_NL[:, 1:], real_NL[:, 1:], **more),
    "n is larger by one": lambda *past, ngram, **more: held_back(*past, ngram=ngram + 1, **more),
    "an end token is banned": lambda *past, eos_E, **more: held_back(*past, eos_E=eos_E + 2, **more),
}


@pytest.mark.parametrize("name", BROKEN)
def test_planted_errors_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: what cannot be is drawn, or what is drawn is drawn too often."""
    monkeypatch.setattr(decode, "held_back", BROKEN[name])
    rollout = rolled(0.0, no_repeat_ngram_size=1)
    try:
        p = p_value(responses(rollout), enumerated(0.0, no_repeat_ngram_size=1))
    except KeyError:
        p = 0.0
    assert p < SURE


def test_a_teacher_that_knows_no_penalty_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: both models must be penalised. Here a reading of the teacher has one row, the student's all."""

    def students_only(logits_NV: Tensor, seen_NV: Tensor | None, penalty: float) -> Tensor:
        return penalised(logits_NV, None if len(logits_NV) == 1 else seen_NV, penalty)

    monkeypatch.setattr(decode, "penalised", students_only)
    rollout = rolled(1.0, **SETTINGS["penalised"])
    assert p_value(responses(rollout), enumerated(1.0, **SETTINGS["penalised"])) < SURE

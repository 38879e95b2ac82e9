"""Exposure bias: how much a student's errors grow because it continues its own text and not its teacher's.

Legend: B responses, N prompts, T response positions, L lengths 1 .. L of the curve, R resamples. p is the teacher, q
the student. KL is the forward one, KL(p || q), exact over the vocabulary at the state before a token.

At each position t two means are taken, over the responses that are still *alive* there (that have a token at t, the end
token included): ``a(t)`` over responses that the student drew, ``b(t)`` over responses that the teacher drew. Then,
after Arora et al. (2022),

    R(l) = a(1) + ... + a(l)         what a student adds up to that goes on from its own text
    l e(l) = b(1) + ... + b(l)       the same had it always been put on the teacher's text
    ExAccErr(l) = (R(l) - l e(l)) / (l e(l)) * 100 %

It is 0 at l = 1, where both stand at the prompt. The means are conditional: a response that has ended is left out, and
is not counted as one without error, by which a model that stops earlier would look better. What is left of length is
who survives: at a late position both means are of long responses only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minillm.errors import NonFinite, ShapeMismatch
from minillm.statistics import Array, divide, interval, number, resample_weights

LEAST_ALIVE = 20
"""Responses of each kind that a position needs: with fewer its mean is chance."""
LEAST_PROMPTS = 10
"""Prompts of each kind that still have a living response there: many responses to one prompt say what it is like, not
what others are, and an interval over prompts needs some."""
ROUNDING = 1e-6
"""Nats a token. Of two models that differ by less in both kinds of text nothing is left but rounding."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Texts:
    """Responses of one kind, judged: those that the student drew, or those that the teacher drew.

    Example: one response of two tokens and one of a single token, of prompts 0 and 1: kl [[.1, .3], [.2, 9]], alive
    [[1, 1], [1, 0]], prompt [0, 1]. What stands off the mask is not looked at.
    """

    kl_BT: Array
    """KL(teacher || student) at the state before each token, nats."""
    alive_BT: NDArray[np.bool_]
    """True on every token that was drawn."""
    prompt_B: NDArray[np.int64]
    """Which prompt each response continues, 0 .. N-1."""

    def __post_init__(self) -> None:
        if self.alive_BT.shape != self.kl_BT.shape:
            raise ShapeMismatch("living positions", self.alive_BT.shape, self.kl_BT.shape)
        if self.prompt_B.shape != self.kl_BT.shape[:1]:
            raise ShapeMismatch("prompts of the responses", self.prompt_B.shape, self.kl_BT.shape[:1])
        assert (self.alive_BT[:, 1:] <= self.alive_BT[:, :-1]).all(), "a response that has ended came back to life"
        bad = np.argwhere(self.alive_BT & ~np.isfinite(self.kl_BT))
        if len(bad):
            b, t = bad[0]
            raise NonFinite(
                f"KL(teacher || student) of response {b} at position {t} is {self.kl_BT[b, t]}, wanted a finite "
                f"number; {len(bad)} such values in all.\n  a student that forbids a token which its teacher allows "
                "has an infinite one; look at both models' dtype (fp16 overflows)"
            )


def exposure_curve(
    student: Texts,
    teacher: Texts,
    *,
    prompts: int,
    resamples: int,
    seed: int,
    least_alive: int = LEAST_ALIVE,
    least_prompts: int = LEAST_PROMPTS,
) -> dict[str, Any]:
    """ExAccErr over length in per cent, with 95 % intervals, ready for JSON; see the head of this file for what it is.

    ``ex_acc_err`` and ``ci95`` have an entry for each length 1 .. ``positions``, as have ``student_kl`` (a),
    ``teacher_kl`` (b), ``accumulated`` (R), ``expected`` (l e) and ``alive``, how many responses of each kind stand
    behind it, and ``prompts_alive``, how many prompts these answer. The curve ends where fewer than ``least_alive``
    responses of either kind are left, or those of fewer than ``least_prompts`` prompts; ``left_out`` counts the
    positions behind it. Intervals are percentiles over draws of the prompts, the two kinds of text of a prompt always
    together; None with fewer than two prompts. A draw in which nobody lives to a position has no value from there on
    (``undefined_resamples``, at the end). None also where the teacher's own text shows no error to compare with; where
    neither does, ExAccErr is 0.
    """
    width = max(student.kl_BT.shape[1], teacher.kl_BT.shape[1])
    sums = tuple(_by_prompt(texts, prompts=prompts, width=width) for texts in (student, teacher))
    alive_2T = np.stack([alive_NT.sum(axis=0) for _, alive_NT in sums])
    prompts_2T = np.stack([(alive_NT > 0).sum(axis=0) for _, alive_NT in sums])
    # Both fall with the position, since nobody comes back to life: what is kept are the first ones.
    positions = int(((alive_2T.min(axis=0) >= least_alive) & (prompts_2T.min(axis=0) >= least_prompts)).sum())
    sums = tuple((kl_NT[:, :positions], alive_NT[:, :positions]) for kl_NT, alive_NT in sums)
    own_L, given_L = (_means(np.ones((1, prompts)), *each)[0] for each in sums)
    value_L = _percent(own_L[None], given_L[None])[0]
    draw_RL = np.concatenate(
        [np.empty((0, positions))]
        + [
            _percent(_means(weight_RN, *sums[0]), _means(weight_RN, *sums[1]))
            for weight_RN in resample_weights(prompts, resamples=resamples, seed=seed)
        ]
    )
    intervals = [interval(draw_R, prompts=prompts)["ci95"] for draw_R in draw_RL.T]
    found: dict[str, Any] = {
        "prompts": prompts,
        "least_alive": least_alive,
        "least_prompts": least_prompts,
        "positions": positions,
        "left_out": width - positions,
        "ex_acc_err": [number(value) for value in value_L],
        "ci95": intervals,
        "student_kl": own_L.tolist(),
        "teacher_kl": given_L.tolist(),
        "accumulated": own_L.cumsum().tolist(),
        "expected": given_L.cumsum().tolist(),
        "alive": _of_each(alive_2T[:, :positions]),
        "prompts_alive": _of_each(prompts_2T[:, :positions]),
    }
    undefined = int(np.isnan(draw_RL[:, -1]).sum()) if positions else 0
    return found | ({"undefined_resamples": undefined} if undefined else {})


def _of_each(count_2L: NDArray[Any]) -> dict[str, list[int]]:
    return dict(zip(("student", "teacher"), count_2L.astype(int).tolist(), strict=True))


def _by_prompt(texts: Texts, *, prompts: int, width: int) -> tuple[Array, Array]:
    """(sum of the KLs, how many responses are alive) of each prompt at each position, both [N, T]."""
    held = texts.kl_BT.shape[1]
    kl_NT, alive_NT = np.zeros((prompts, width)), np.zeros((prompts, width))
    np.add.at(kl_NT[:, :held], texts.prompt_B, np.where(texts.alive_BT, texts.kl_BT, 0.0))
    np.add.at(alive_NT[:, :held], texts.prompt_B, texts.alive_BT.astype(np.float64))
    return kl_NT, alive_NT


def _means(weight_RN: Array, kl_NL: Array, alive_NL: Array) -> Array:
    """Mean over the living at each position [R, L]; NaN where a draw has none."""
    return divide(weight_RN @ kl_NL, weight_RN @ alive_NL)


def _percent(own_RL: Array, given_RL: Array) -> Array:
    """ExAccErr of each length from the two means of each position; NaN where there is nothing to compare with."""
    accumulated_RL, expected_RL = own_RL.cumsum(axis=1), given_RL.cumsum(axis=1)
    rounding_L = ROUNDING * np.arange(1, own_RL.shape[1] + 1)
    excess_RL: Array = accumulated_RL - expected_RL
    comparable_RL = expected_RL > rounding_L
    percent_RL: Array = np.full_like(excess_RL, np.nan)
    np.divide(100.0 * excess_RL, expected_RL, out=percent_RL, where=comparable_RL)
    percent_RL[~comparable_RL & (accumulated_RL <= rounding_L)] = 0.0
    return percent_RL

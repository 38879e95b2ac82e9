"""Calibration: whether a model that is sure to a degree is right to the same degree.

Legend: K answers (each with a confidence and a verdict), N prompts, M bins, C choices, R resamples.

The interval (0, 1] is cut into M bins of equal width, each open on its left: (0, 1/M], (1/M, 2/M], ... Within a bin the
mean confidence is held against the share that is right, and

    ECE = sum over bins of (answers in the bin / all answers) * |share right - mean confidence|

is 0 for a model whose confidence is kept in every bin. It is a sum of magnitudes, so chance alone makes it positive,
the more so the fewer answers and the more bins there are: compare models on the same answers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minillm.errors import NonFinite, ShapeMismatch
from minillm.statistics import Array, divide, interval, number, resample_weights

BINS = 15
"""As usual since Guo et al. (2017)."""
_SPARE = 1e-6
"""By how much a sum of rounded probabilities may exceed 1."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answers:
    """What a model said, how sure it was, and whether that was right.

    Example: two answers to prompt 0, one to prompt 1: confidence [.9, .8, .6], correct [1, 0, 1], prompt [0, 0, 1].
    """

    confidence_K: Array
    """Probability of what was said, 0 to 1."""
    correct_K: NDArray[np.bool_]
    prompt_K: NDArray[np.int64]
    """Which prompt each answer belongs to, 0 .. N-1: answers to one prompt are resampled together."""

    def __post_init__(self) -> None:
        for what, value in (("verdicts", self.correct_K), ("prompts of the answers", self.prompt_K)):
            if value.shape != self.confidence_K.shape:
                raise ShapeMismatch(what, value.shape, self.confidence_K.shape)
        if not np.isfinite(self.confidence_K).all():
            raise NonFinite("a confidence is not a finite number; look at the model's dtype (fp16 overflows)")
        assert ((self.confidence_K >= 0) & (self.confidence_K <= 1 + _SPARE)).all(), "a confidence is no probability"


def bin_of(confidence_K: Array, *, bins: int) -> NDArray[np.int64]:
    """The bin of each confidence, 0 .. M-1. A confidence on an edge is in the bin below it; 0 is in the first."""
    edges = np.linspace(0.0, 1.0, bins + 1)
    return np.searchsorted(edges[1:-1], confidence_K, side="left").astype(np.int64)


def calibration(answers: Answers, *, prompts: int, resamples: int, seed: int, bins: int = BINS) -> dict[str, Any]:
    """ECE with a 95 % interval and the reliability curve, ready for JSON.

    ``{"ece", "ci95", "accuracy", "confidence", "answers", "prompts", "bins", "curve"}``; ``curve`` has an entry for
    each bin with an answer: ``{"low", "high", "answers", "confidence", "accuracy", "ci95"}``, the interval that of its
    accuracy. Intervals are percentiles over draws of the prompts, a prompt's answers together; None with fewer than two
    prompts. A percentile interval of an ECE lies somewhat high, as resampling adds chance to a sum of magnitudes.
    """
    sums = _by_prompt(answers, prompts=prompts, bins=bins)
    count_M, confidence_M, correct_M = (each.sum(axis=0) for each in sums)
    eces: list[Array] = [np.empty(0)]
    shares: list[Array] = [np.empty((0, bins))]
    for weight_RN in resample_weights(prompts, resamples=resamples, seed=seed):
        count_RM, confidence_RM, correct_RM = (weight_RN @ each for each in sums)
        eces.append(_ece(count_RM, confidence_RM, correct_RM))
        shares.append(divide(correct_RM, count_RM))
    carrying = int((sums[0].sum(axis=1) > 0).sum())
    share_RM = np.concatenate(shares)
    curve = [
        {
            "low": m / bins,
            "high": (m + 1) / bins,
            "answers": int(count_M[m]),
            "confidence": float(confidence_M[m] / count_M[m]),
            "accuracy": float(correct_M[m] / count_M[m]),
            "ci95": interval(share_RM[:, m], prompts=carrying)["ci95"],
        }
        for m in range(bins)
        if count_M[m] > 0
    ]
    total = count_M.sum()
    return {
        "ece": number(_ece(count_M[None], confidence_M[None], correct_M[None])[0]),
        "ci95": interval(np.concatenate(eces), prompts=carrying)["ci95"],
        "accuracy": float(correct_M.sum() / total) if total else None,
        "confidence": float(confidence_M.sum() / total) if total else None,
        "answers": int(total),
        "prompts": carrying,
        "bins": bins,
        "curve": curve,
    }


def chosen(logq_C: Sequence[float], *, right: int) -> tuple[float, bool]:
    """How sure a model is of the choice that it finds likeliest, and whether that is the right one.

    ``logq_C`` are the choices' log-probabilities; the confidence is softmax over these, the probability of the choice
    given that it is one of them. Of equals the first is taken.
    """
    shifted_C = np.asarray(logq_C, dtype=np.float64) - max(logq_C)
    mass_C = np.exp(shifted_C)
    best = int(mass_C.argmax())
    return float(mass_C[best] / mass_C.sum()), best == right


def _by_prompt(answers: Answers, *, prompts: int, bins: int) -> tuple[Array, Array, Array]:
    """(answers, summed confidence, right answers) of each prompt in each bin, all [N, M]."""
    at_K = answers.prompt_K * bins + bin_of(answers.confidence_K, bins=bins)

    def summed(weight_K: Array) -> Array:
        flat = np.bincount(at_K, weights=weight_K, minlength=prompts * bins)
        return flat.reshape(prompts, bins).astype(np.float64)

    ones_K = np.ones(len(at_K))
    return summed(ones_K), summed(answers.confidence_K), summed(answers.correct_K.astype(np.float64))


def _ece(count_RM: Array, confidence_RM: Array, correct_RM: Array) -> Array:
    """[R]; NaN where there is no answer."""
    return divide(np.abs(correct_RM - confidence_RM).sum(axis=1), count_RM.sum(axis=1))

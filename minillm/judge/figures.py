"""From verdicts to figures: scores and shares with intervals over prompts, and how far the judge goes by position.

Legend: S sampling seeds (one here), N prompts. Everything is asked in both orders: a pair of verdicts, the first with
the left answer shown first, the second with the right one. A prompt without both is unjudged and in no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minillm.judge.prompts import Verdict
from minillm.statistics import Ratio, difference, estimate

Pair = tuple[Verdict | None, Verdict | None]
"""Verdicts on one prompt: left shown first, right shown first."""


def single(uids: Sequence[str], pairs: Sequence[Pair], *, resamples: int, seed: int) -> dict[str, Any]:
    """The response's share of the reference's score, in percent: Σ response / Σ reference × 100, and how it came about.

    The response is the left answer. ``position``: ``points`` is how much more an answer gets for being shown first,
    on average; ``share`` how often the order of the two answers depends on which is shown first.
    """
    ratios = _single_ratios(uids, pairs)
    judged = [_scores(pair) for pair in pairs if _whole(pair)]
    flips = [np.sign(a[0] - a[1]) != np.sign(b[1] - b[0]) for a, b in judged]
    points = [((a[0] - b[1]) + (b[0] - a[1])) / 2 for a, b in judged]
    return {
        **estimate(ratios, resamples=resamples, seed=seed),
        "judged": len(judged),
        "unjudged": len(pairs) - len(judged),
        "position": {"share": mean(flips), "points": mean(points)},
    }


def single_difference(
    uids: Sequence[str], left: Sequence[Pair], right: Sequence[Pair], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Left score minus right score, paired, over the prompts that are judged for both: ``{"mean", "ci95"}``."""
    both = [n for n in range(len(uids)) if _whole(left[n]) and _whole(right[n])]
    kept = [uids[n] for n in both]
    ours, theirs = (_single_ratios(kept, [pairs[n] for n in both]) for pairs in (left, right))
    return difference({"score": ours["score"]}, {"score": theirs["score"]}, resamples=resamples, seed=seed)["score"]


def pairwise(uids: Sequence[str], pairs: Sequence[Pair], *, resamples: int, seed: int) -> dict[str, Any]:
    """What ``outcome_ratios`` says of the pairs; and ``consistency``, the share of judged prompts whose verdicts agree.

    Verdicts of the two orders that disagree count as a tie.

    ``position``: ``share`` is how often they disagree, ``first`` and ``second`` how often the answer in that place won
    both times.
    """
    agree_N = np.array([_whole(pair) and _favours(pair[0]) == -_favours(pair[1]) for pair in pairs], dtype=float)
    shares = outcome_ratios(uids, [_outcome(pair) for pair in pairs])
    shares["consistency"] = ratio(uids, agree_N, np.array([_whole(pair) for pair in pairs], dtype=float))
    judged = [pair for pair in pairs if _whole(pair)]
    return {
        **estimate(shares, resamples=resamples, seed=seed),
        "judged": len(judged),
        "unjudged": len(pairs) - len(judged),
        "position": {
            "disagreements": sum(_favours(a) != -_favours(b) for a, b in judged),
            "share": mean([_favours(a) != -_favours(b) for a, b in judged]),
            "first": mean([a == b == "1" for a, b in judged]),
            "second": mean([a == b == "2" for a, b in judged]),
        },
    }


def outcome_ratios(uids: Sequence[str], outcomes: Sequence[int | None]) -> dict[str, Ratio]:
    """Shares of prompts that the left answer wins (outcome 1), ties (0) and loses (-1); ``net``, wins minus losses; and
    ``win_rate``, wins and half of the ties. A prompt without an outcome is in none of them."""
    judged_N = np.array([outcome is not None for outcome in outcomes], dtype=float)
    net_N = np.array([float(outcome or 0) for outcome in outcomes])
    shares = {
        name: ratio(uids, np.array([outcome == value for outcome in outcomes], dtype=float), judged_N)
        for name, value in (("win", 1), ("tie", 0), ("lose", -1))
    }
    return {
        **shares,
        "net": ratio(uids, net_N, judged_N),
        "win_rate": ratio(uids, (judged_N + net_N) / 2, judged_N),
    }


def _single_ratios(uids: Sequence[str], pairs: Sequence[Pair]) -> Mapping[str, Ratio]:
    response_N, reference_N = np.zeros(len(uids)), np.zeros(len(uids))
    for n, pair in enumerate(pairs):
        if _whole(pair):
            left_first, right_first = _scores(pair)
            response_N[n] = left_first[0] + right_first[1]
            reference_N[n] = left_first[1] + right_first[0]
    asked_N = 2.0 * (reference_N > 0)
    return {
        "score": ratio(uids, 100 * response_N, reference_N),
        "response": ratio(uids, response_N, asked_N),
        "reference": ratio(uids, reference_N, asked_N),
    }


def ratio(uids: Sequence[str], numerator_N: Any, denominator_N: Any) -> Ratio:
    """A measure of which there is one number a prompt."""
    return Ratio(uids=tuple(uids), seeds=(0,), numerator_SN=numerator_N[None], denominator_SN=denominator_N[None])


def _whole(pair: Pair) -> bool:
    return pair[0] is not None and pair[1] is not None


def _scores(pair: Pair) -> tuple[list[float], list[float]]:
    assert isinstance(pair[0], list) and isinstance(pair[1], list), "verdicts of another form"
    return pair[0], pair[1]


def _favours(verdict: Verdict | None) -> int:
    """1 for the answer shown first, -1 for the second, 0 for neither."""
    return {"1": 1, "2": -1}.get(str(verdict), 0)


def _outcome(pair: Pair) -> int | None:
    """1 where the left answer wins in both orders, -1 where the right one does, 0 for ties and disagreements."""
    if not _whole(pair):
        return None
    left, right = _favours(pair[0]), -_favours(pair[1])
    return left if left == right else 0


def mean(values: Sequence[Any]) -> float | None:
    """None of nothing."""
    return float(np.mean(values)) if values else None

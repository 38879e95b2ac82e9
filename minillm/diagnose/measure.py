"""From projected gradients of prompts to variances, biases and the choice of least error: pure functions.

Every prompt has two independent lots ("halves") of S samples. What is projected is the contribution of a lot to the
gradient, per sample, along J random directions; averages over directions are then squared lengths and inner products of
the whole vectors, up to the noise of the directions, which two choices on the same directions share.

Legend: H = 2 halves, M prompts, J directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

RESAMPLES = 1000
TAIL = 0.025
MOST_WEIGHT = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lots:
    """Projected gradients of one kind, [H, M, J], and the samples behind each."""

    value_HMJ: Tensor
    samples: int

    @property
    def mean_MJ(self) -> Tensor:
        """Of both halves."""
        return self.value_HMJ.mean(dim=0)

    def within_M(self) -> Tensor:
        """Variance of one sample's gradient given its prompt, summed over parameters: an estimate from each prompt."""
        return self.samples * (self.value_HMJ[0] - self.value_HMJ[1]).square().mean(dim=1) / 2.0


def mean_product(one: Lots, other: Lots) -> float:
    """Inner product of the expected gradients, without bias: from pairs of different prompts only."""
    x_MJ, y_MJ = one.mean_MJ, other.mean_MJ
    prompts = len(x_MJ)
    all_pairs_J = x_MJ.sum(dim=0) * y_MJ.sum(dim=0)
    return float((all_pairs_J - (x_MJ * y_MJ).sum(dim=0)).mean()) / (prompts * (prompts - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What one update averages over."""

    prompts: float
    samples: int
    """Of each prompt."""

    @property
    def responses(self) -> float:
        """In all."""
        return self.prompts * self.samples

    def noise(self, one: Lots, other: Lots) -> float:
        """Covariance of two gradients averaged over so much: prompts differ, and samples of a prompt do."""
        between, within = spread(one, other)
        return between / self.prompts + within / self.responses


def covariance(one: Lots, other: Lots) -> float:
    """Covariance of one sample's gradients, of a prompt drawn at random, summed over parameters."""
    between, within = spread(one, other)
    return between + within


def spread(one: Lots, other: Lots) -> tuple[float, float]:
    """That covariance in two parts: of prompts' expected gradients, and of one sample's around its prompt's."""
    x_MJ, y_MJ = one.mean_MJ, other.mean_MJ
    prompts = len(x_MJ)
    of_means = float(((x_MJ - x_MJ.mean(dim=0)) * (y_MJ - y_MJ.mean(dim=0))).sum(dim=0).mean()) / (prompts - 1)
    apart_x_MJ, apart_y_MJ = (of.value_HMJ[0] - of.value_HMJ[1] for of in (one, other))
    # Of the mean of a lot's samples; the means of both lots hold half of it, one sample all of it ``samples`` times.
    within = float((apart_x_MJ * apart_y_MJ).mean()) / 2.0
    return of_means - within / 2.0, one.samples * within


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One choice of credit, by the names that the JSON has. Ratios are to the reference unless said otherwise."""

    variance: float
    """Of the long-horizon gradient of one sample, given its prompt."""
    interval: tuple[float, float]
    """95 % by resampling prompts."""
    variance_of_objective: float
    """The same, over sampled returns without a baseline of the same discount, horizon and normalisation."""
    total: float
    """Over prompts as well."""
    snr: float
    """Squared length of the expected long-horizon gradient over the total variance of one sample's; may come out below
    0 where it is too small to be seen."""
    snr_error: float
    """Standard error of it, by leaving one prompt out of the squared length."""
    bias_squared: float | None
    """Squared length of the difference of expectations, over the reference's squared length; without bias, so it comes
    out below 0 as often as above where there is no difference. None where the reference's length cannot be told from
    0."""
    bias_squared_error: float | None
    """Standard error of the difference's, by leaving one prompt out."""
    cosine: float | None
    """Of the two expectations."""
    tokens_for_half: float | None
    """Sampled tokens after which the standard error is half as long as the expected gradient."""
    keeps_expectation: bool
    weight: float
    """What to multiply the long-horizon term by for the least mean squared error of the gradient at the budget."""
    error: float
    """That error, relative to the squared length of the whole gradient, or to an update's variance where the estimate
    of that length is not above 0."""
    error_at_one: float
    """The same at weight 1."""
    whole_snr: float
    """Squared length of the expected whole gradient (single-step term and this long-horizon term, weight 1) over the
    total variance of one sample's; may come out below 0, as ``snr``."""
    whole_snr_error: float
    """Standard error of it, as ``snr_error``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Absolute:
    """What is no ratio, in squared units of one sample's gradient. Without teacher mixing two teachers of one student
    can be compared at equal seed and sizes: text and directions then are the same."""

    variance: float
    """Of the reference's long-horizon gradient, given the prompt."""
    interval: tuple[float, float]
    """95 % by resampling prompts."""
    total: float
    """The same over prompts as well: what ``Figures.total`` and ``Whole.single_variance`` are over."""
    squared_length: float
    """Of the reference's expected long-horizon gradient; may come out below 0."""
    squared_length_error: float
    """Standard error of it, by leaving one prompt out."""
    single_squared_length: float
    """Of the expected single-step gradient; may come out below 0."""
    single_squared_length_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What belongs to no choice."""

    single_length: float | None
    long_over_single: float | None
    """Length of the expected long-horizon gradient over that of the single-step term."""
    single_variance: float
    """Total variance of one sample's single-step gradient, over that of the reference's long-horizon one."""
    heaviest_share: float
    """Of the reference's variance within prompts, that of the heaviest twentieth of the prompts."""
    error_single_alone: float
    """Relative mean squared error of the single-step term by itself, as ``Figures.error``."""
    absolute: Absolute
    choices: dict[str, Figures] = field(default_factory=dict)


def figures_of(
    lots: Mapping[str, Lots],
    single: Lots,
    *,
    reference: str,
    twins: Mapping[str, str],
    keeps: Mapping[str, bool],
    budget: Budget,
    tokens_per_sample: float,
    seed: int,
) -> Whole:
    """Figures of every choice; ``budget`` is one update's."""
    first = lots[reference]
    target = lots[min((name for name in lots if keeps[name]), key=lambda name: covariance(lots[name], lots[name]))]
    scale = _whole_scale(single, target, budget=budget)
    resample_RM = _resamples(len(first.mean_MJ), seed=seed)
    signal, noise = _told(first), covariance(first, first)
    single_signal = _told(single)
    choices = {}
    for name, of in lots.items():
        mine, told, total = mean_product(of, of), _told(of), covariance(of, of)
        apart = Lots(value_HMJ=of.value_HMJ - first.value_HMJ, samples=of.samples)
        both = Lots(value_HMJ=single.value_HMJ + of.value_HMJ, samples=of.samples)
        weight = _best_weight(of, single, target, budget=budget)
        error, at_one = (
            _squared_error(of, single, target, weight=each, budget=budget) / scale for each in (weight, 1.0)
        )
        choices[name] = Figures(
            variance=_ratio(of, first),
            interval=_interval(of.within_M(), first.within_M(), resample_RM),
            variance_of_objective=_ratio(of, lots[twins[name]]),
            total=total / noise,
            snr=mine / total,
            snr_error=_length_error(of) / total,
            bias_squared=None if signal is None else mean_product(apart, apart) / signal,
            bias_squared_error=None if signal is None else _length_error(apart) / signal,
            cosine=None if signal is None or told is None else _cosine(of, first),
            tokens_for_half=None if told is None else 4.0 * total / told * tokens_per_sample,
            keeps_expectation=keeps[name],
            weight=weight,
            error=error,
            error_at_one=at_one,
            whole_snr=mean_product(both, both) / covariance(both, both),
            whole_snr_error=_length_error(both) / covariance(both, both),
        )
    return Whole(
        single_length=None if single_signal is None else math.sqrt(single_signal),
        long_over_single=None if signal is None or single_signal is None else math.sqrt(signal / single_signal),
        single_variance=covariance(single, single) / noise,
        heaviest_share=_heaviest(first.within_M()),
        error_single_alone=_squared_error(target, single, target, weight=0.0, budget=budget) / scale,
        absolute=_absolute(first, single, resample_RM),
        choices=choices,
    )


def _absolute(first: Lots, single: Lots, resample_RM: Tensor) -> Absolute:
    within_M = first.within_M()
    return Absolute(
        variance=float(within_M.mean()),
        interval=_interval(within_M, torch.ones_like(within_M), resample_RM),
        total=covariance(first, first),
        squared_length=mean_product(first, first),
        squared_length_error=_length_error(first),
        single_squared_length=mean_product(single, single),
        single_squared_length_error=_length_error(single),
    )


def _ratio(one: Lots, other: Lots) -> float:
    return float(one.within_M().sum() / other.within_M().sum())


def _interval(one_M: Tensor, other_M: Tensor, resample_RM: Tensor) -> tuple[float, float]:
    ratio_R = (one_M[resample_RM].sum(dim=1) / other_M[resample_RM].sum(dim=1)).sort().values
    cut = int(TAIL * len(ratio_R))
    return float(ratio_R[cut]), float(ratio_R[-1 - cut])


def _resamples(prompts: int, *, seed: int) -> Tensor:
    return torch.randint(0, prompts, (RESAMPLES, prompts), generator=torch.Generator().manual_seed(seed))


def _length_error(of: Lots) -> float:
    """Standard error of ``mean_product(of, of)``, from its values with one prompt left out each."""
    x_MJ = of.mean_MJ
    prompts = len(x_MJ)
    sum_J, square_J = x_MJ.sum(dim=0), x_MJ.square().sum(dim=0)
    without_M = ((sum_J - x_MJ).square() - (square_J - x_MJ.square())).mean(dim=1) / ((prompts - 1) * (prompts - 2))
    return float(((prompts - 1) / prompts * (without_M - without_M.mean()).square().sum()).sqrt())


def _squared_error(of: Lots, single: Lots, target: Lots, *, weight: float, budget: Budget) -> float:
    """Mean squared error of ``single + weight * of`` from ``budget`` samples, for ``single + target`` expected."""
    made = Lots(value_HMJ=single.value_HMJ + weight * of.value_HMJ, samples=of.samples)
    off = Lots(value_HMJ=weight * of.value_HMJ - target.value_HMJ, samples=of.samples)
    return max(0.0, mean_product(off, off)) + budget.noise(made, made)


def _best_weight(of: Lots, single: Lots, target: Lots, *, budget: Budget) -> float:
    """The weight at which that error is least: of a parabola's foot, 0 and 1, since a squared bias that comes out below
    0 counts as 0 and leaves no parabola."""
    foot = _foot(of, single, target, budget=budget)
    return min((foot, 0.0, 1.0), key=lambda each: _squared_error(of, single, target, weight=each, budget=budget))


def _foot(of: Lots, single: Lots, target: Lots, *, budget: Budget) -> float:
    curve = max(0.0, mean_product(of, of)) + budget.noise(of, of)
    slope = mean_product(of, target) - budget.noise(single, of)
    return min(MOST_WEIGHT, max(0.0, slope / curve)) if curve > 0 else 0.0


def _whole_scale(single: Lots, target: Lots, *, budget: Budget) -> float:
    whole = Lots(value_HMJ=single.value_HMJ + target.value_HMJ, samples=single.samples)
    length = mean_product(whole, whole)
    return length if length > 0 else budget.noise(whole, whole)


def _told(of: Lots) -> float | None:
    """The squared length of the expected gradient, where it is more than two standard errors from 0."""
    square = mean_product(of, of)
    return square if square > 2.0 * _length_error(of) else None


def _cosine(one: Lots, other: Lots) -> float:
    lengths = math.sqrt(mean_product(one, one) * mean_product(other, other))
    return max(-1.0, min(1.0, mean_product(one, other) / lengths))


def _heaviest(within_M: Tensor) -> float:
    most = len(within_M) // 20  # of fewer than 20 prompts nothing is said
    return float(within_M.sort(descending=True).values[:most].sum() / within_M.sum())

"""The gradient of KL(student || teacher) over whole responses, and every way in which the library makes it.

Legend: X beginnings, V ids, N distinct responses, T positions, K coin patterns, D entries of the student's table.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from minillm import credit, divergences, policy_loss
from minillm.selftest.check import ROUNDING, Check, Found, relative, rough, worst
from minillm.selftest.listed import (
    ALPHA,
    IDS,
    LONGEST,
    Listed,
    finite_difference,
    listed,
    objective_N,
    policy_loss_N,
    scored_of,
    stage,
    tables,
    targets_of,
)

FUTURES = ("sampled", "expected")
PER_STEP_BIAS = {"sampled": 0.273004527, "expected": 0.225844411}
"""Relative error that weights by token leave at ``ALPHA`` on the tables of seed 1, recorded."""

RECORDED_VARIANCE = (0.245378331, 0.647805889)
"""Of the gradient of one response, with expected and with sampled returns, relative to return to go; seed 0."""


def near(delta: float) -> Listed:
    """A teacher that differs from the student by ``delta`` in one direction."""
    student_XV, direction_XV = tables()
    return listed(student_XV, student_XV + delta * direction_XV)


def fixed_point() -> Found:
    """At the teacher there is no reward, no divergence, no weight but 1 and no gradient."""
    of = near(0.0)
    weight_NT = policy_loss.importance_weights(
        "per_step", logq_BT=of.logq_NT.detach(), logp_BT=of.logp_NT, teacher_drew_BT=of.mask_NT, teacher_mix=ALPHA,
        max_log_ratio=20.0,
    )  # fmt: skip
    slopes = [of.expected_gradient(objective_N(of, stage(future=future))).abs() for future in FUTURES]
    return Found(worst(of.reward_NT.abs(), of.kl_NT.abs(), (weight_NT - 1.0).abs(), *slopes), ROUNDING)


def continuity() -> Found:
    """The gradient of a single response, and that of all on average, shrinks tenfold with the distance."""
    ratios = []
    for future, alone in itertools.product(FUTURES, (True, False)):
        size = []
        for delta in (1e-3, 1e-4):
            of = near(delta)
            loss_N = objective_N(of, stage(future=future))
            size.append((of.gradient(loss_N[-1]) if alone else of.expected_gradient(loss_N)).norm())
        ratios.append((size[0] / size[1] / 10.0 - 1.0).abs())
    return Found(worst(*ratios), 0.01)


def chain_rule() -> Found:
    """The KL over whole responses is the expected sum of the KLs at their states."""
    of = listed(*tables())
    return Found(relative((of.chance_N * of.kl_NT.sum(1)).sum(), of.sequence_kl()), ROUNDING)


def three_returns() -> Found:
    """The return from each token on, that less 1, and the whole return all give the slope of the KL."""
    student_XV, teacher_XV = tables()
    of = listed(student_XV, teacher_XV)
    want_D = finite_difference(lambda table_XV: listed(table_XV, teacher_XV).sequence_kl(), student_XV)
    ahead_NT = credit.return_to_go(of.reward_NT, of.mask_NT)
    kinds = (ahead_NT, ahead_NT - 1.0, credit.whole_return(of.reward_NT, of.mask_NT))
    slopes = [of.expected_gradient(policy_loss_N(of, advantage_NT)) for advantage_NT in kinds]
    return Found(worst(*(relative(slope_D, want_D) for slope_D in slopes)), 1e-8)


def decomposition() -> Found:
    """The single-step term and the return from the next token on, together, are the whole gradient."""
    of = listed(*tables())
    want_D = of.gradient(of.sequence_kl())
    slopes = [of.expected_gradient(objective_N(of, stage(future=future))) for future in FUTURES]
    alone_D = of.expected_gradient(objective_N(of, stage(single_weight=0.0)))
    return Found(worst(*(relative(slope_D, want_D) for slope_D in (*slopes, alone_D))), ROUNDING)


def counted_twice() -> Found:
    """With the present reward in the return as well, there is the single-step gradient once too often."""
    of = listed(*tables())
    single_N = of.kl_NT.sum(1)
    twice_N = single_N + policy_loss_N(of, credit.return_to_go(of.reward_NT, of.mask_NT))
    want_D = of.gradient(of.sequence_kl()) + of.expected_gradient(single_N)
    return Found(relative(of.expected_gradient(twice_N), want_D), ROUNDING)


def single_step_weight() -> Found:
    """The mean of weight times single-step gradient is the gradient, for every share of the teacher."""
    student_1V, teacher_1V = (rough(1, IDS, seed=seed).log_softmax(-1) for seed in (5, 6))
    logits_1V = student_1V.clone().requires_grad_()
    kl_1 = divergences.reverse_kl(logits_1V.log_softmax(-1), teacher_1V)
    (slope_1V,) = torch.autograd.grad(kl_1.sum(), logits_1V)
    means = []
    for alpha in (0.05, ALPHA, 0.7, 1.0):
        weight_1V = policy_loss.importance_weights(
            "per_step", logq_BT=student_1V, logp_BT=teacher_1V, teacher_drew_BT=student_1V < 0, teacher_mix=alpha,
            max_log_ratio=20.0,
        )  # fmt: skip
        mixed_1V = (1.0 - alpha) * student_1V.exp() + alpha * teacher_1V.exp()
        means.append(relative((mixed_1V * weight_1V).sum() * slope_1V, slope_1V))
    return Found(worst(*means), ROUNDING)


def mixed_gradient(of: Listed, future: str, importance: str, alpha: float) -> Tensor:
    """The expected gradient where the teacher draws a share of the tokens, [D]."""
    chosen = stage(future=future, importance=importance, teacher_mix=alpha)
    return of.expected_gradient(objective_N(of, chosen), chance_N=of.mixed_chance_N(alpha))


def per_decision() -> Found:
    """Products of weights along the response give the exact gradient at any share of the teacher."""
    of = listed(*tables(1))
    want_D = of.gradient(of.sequence_kl())
    cases = itertools.product(FUTURES, (0.0, ALPHA, 1.0))
    slopes = [mixed_gradient(of, future, "per_decision", alpha) for future, alpha in cases]
    return Found(worst(*(relative(slope_D, want_D) for slope_D in slopes)), 1e-10)


def per_step_bias() -> Found:
    """Weights by token are biased by as much as was recorded: no more, and no less."""
    of = listed(*tables(1))
    want_D = of.gradient(of.sequence_kl())
    errors = {future: relative(mixed_gradient(of, future, "per_step", ALPHA), want_D) for future in FUTURES}
    return Found(worst(*(abs(errors[future] - PER_STEP_BIAS[future]) for future in FUTURES)), 1e-6)


def coin_weights() -> Found:
    """Weights by coin are, over all falls of the coin, those by token."""
    of = listed(*tables(1))
    gaps = []
    for future in FUTURES:
        chosen, total_D = stage(future=future, importance="coin", teacher_mix=ALPHA), torch.zeros(())
        for heads in itertools.product((False, True), repeat=LONGEST):
            heads_NT = torch.tensor(heads).expand_as(of.mask_NT)
            chance = ALPHA ** sum(heads) * (1.0 - ALPHA) ** (LONGEST - sum(heads))
            chance_N = chance * torch.where(heads_NT, of.logp_NT, of.logq_NT.detach()).sum(1).exp()
            total_D = total_D + of.expected_gradient(objective_N(of, chosen, drew_NT=heads_NT), chance_N=chance_N)
        gaps.append(relative(total_D, mixed_gradient(of, future, "per_step", ALPHA)))
    return Found(worst(*gaps), 1e-10)


def variances() -> Found:
    """Expected returns vary less than sampled ones, and these less than the return from the present token on without a
    single-step term: the gradient of one response, relative to the last, as recorded."""
    of = listed(*tables())
    want_D, found = of.gradient(of.sequence_kl()), []
    for settings in ({"future": "expected"}, {"future": "sampled"}, {"future": "sampled", "single_weight": 0.0}):
        slopes_ND = torch.stack([of.gradient(loss) for loss in objective_N(of, stage(**settings))])
        found.append(of.chance_N @ (slopes_ND - want_D).square().sum(dim=1))
    return Found(worst(*(abs(found[i] / found[2] - RECORDED_VARIANCE[i]) for i in (0, 1))), 1e-6)


def joined(first: Listed, second: Listed) -> Listed:
    """The responses of the one and then those of the other, of which no gradient is asked."""
    names = ("response_NT", "mask_NT", "logq_NTV", "logp_NTV")
    rows = {name: torch.cat([getattr(first, name), getattr(second, name)]).detach() for name in names}
    return dataclasses.replace(first, **rows)


def baselines() -> Found:
    """A baseline from other rows leaves the expected gradient as it is, by every pair of responses."""
    first, second = listed(*tables()), listed(*tables(1))
    errors = []
    for kind, rows in (("position_mean", (first, second)), ("leave_one_out", (first, first))):
        chosen, prompt_B = stage(baseline=kind, samples_per_prompt=2), torch.tensor([0, int(rows[1] is second)])
        credit_RNT = torch.zeros(2, *first.mask_NT.shape, dtype=torch.float64)
        both, chances = joined(*rows), [of.chance_N for of in rows]
        for pick in itertools.product(range(len(first.mask_NT)), repeat=2):
            scored = scored_of(both, torch.tensor([pick[0], len(first.mask_NT) + pick[1]]))
            targets = targets_of(scored, chosen, prompt_B=prompt_B)
            chance = chances[0][pick[0]] * chances[1][pick[1]]
            for r, n in enumerate(pick):
                credit_RNT[r, n] += chance * targets.advantage_BT[r]
        for of, credit_NT in zip(rows, credit_RNT, strict=True):
            # At the old weights the surrogate's gradient is minus credit times the score.
            got_D = of.expected_gradient(of.kl_NT.sum(1)) - of.gradient((credit_NT * of.logq_NT).sum())
            errors.append(relative(got_D, of.gradient(of.sequence_kl())))
    return Found(worst(*errors), 1e-10)


CHECKS = (
    Check(name="gradient: nothing moves at the teacher", run=fixed_point),
    Check(name="gradient: vanishes linearly at the teacher", run=continuity),
    Check(name="gradient: chain rule", run=chain_rule),
    Check(name="gradient: three returns, finite differences", run=three_returns),
    Check(name="gradient: single step + next-step return", run=decomposition),
    Check(name="gradient: present reward counted twice", run=counted_twice),
    Check(name="gradient: no weight on the single step", run=single_step_weight),
    Check(name="gradient: per-decision weights are exact", run=per_decision),
    Check(name="gradient: recorded bias of per-step weights", run=per_step_bias),
    Check(name="gradient: coin weights on average", run=coin_weights),
    Check(name="gradient: recorded variance of one response", run=variances),
    Check(name="gradient: baselines from other rows", run=baselines),
)

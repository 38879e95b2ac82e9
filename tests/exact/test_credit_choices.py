"""Every choice of credit through the function that a run calls, with two rows, their coins and EOS, all enumerated.

For each pick of two responses and each fall of the coins ``targets_of`` gets a rollout of two rows; what it hands to
the loss is averaged with the pick's chance. So what a choice does to the expected gradient is a sum, not a sample.

Legend: R rows, K coin patterns, N responses, T positions, D entries of the student's table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from minillm import credit, ridge
from minillm.advantages import RowNames, returns_of, targets_of
from minillm.selftest.listed import OneRank
from minillm.stage_base import OptimiserConfig
from minillm.stage_config import MinillmStage
from minillm.types import PromptBatch, Rollout, Scored, Stop
from tests.exact.tabular import (
    Enumeration,
    TabularLM,
    assert_close,
    chance_given_coins,
    coin_patterns,
    enumerate_pair,
    gradient,
    make_pair,
    relative_error,
    sequence_kl,
)

LENGTH = 3
SIBLINGS, STRANGERS = (0, 0), (0, 1)


def stage(**settings: Any) -> MinillmStage:
    """A stage with sampled returns, no baseline and no mixing but for what is asked for."""
    plain = {"steps": 1, "prompts": 2, "optimiser": OptimiserConfig(lr=1e-3), "teacher_mix": 0.0}
    return MinillmStage(**(plain | {"future": "sampled", "baseline": "none"} | settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What a rollout says of each response of a prompt; nothing carries a gradient."""

    response_NT: Tensor
    mask_NT: Tensor
    logq_NT: Tensor
    logp_NT: Tensor
    kl_NT: Tensor
    entropy_NT: Tensor
    states_NTV: Tensor

    @classmethod
    def of(cls, every: Enumeration, states_NTV: Tensor) -> Self:
        logq_NTV = every.logq_NTV.detach()
        entropy_NT = -(logq_NTV.exp() * logq_NTV).sum(-1)
        return cls(
            response_NT=every.response_NT, mask_NT=every.mask_NT, logq_NT=every.logq_NT.detach(), logp_NT=every.logp_NT,
            kl_NT=every.kl_NT.detach(), entropy_NT=torch.where(every.mask_NT, entropy_NT, 0.0),
            states_NTV=states_NTV.detach(),
        )  # fmt: skip


def scored_rows(rows: Sequence[tuple[Listed, int]], heads_RT: Tensor) -> Scored:
    """One rollout: of each row's responses the one of this number, and where the teacher drew."""

    def of(name: str) -> Tensor:
        return torch.stack([getattr(listed, name)[n] for listed, n in rows])

    mask_RT, logq_RT = of("mask_NT"), of("logq_NT")
    rollout = Rollout(
        prompts=PromptBatch(
            uid_B=tuple(map(str, range(len(rows)))), sample_B=(0,) * len(rows),
            ids_BP=torch.ones(len(rows), 1, dtype=torch.long), mask_BP=torch.ones(len(rows), 1, dtype=torch.bool),
        ),
        response_BT=of("response_NT"), mask_BT=mask_RT, stop_B=(Stop.EOS,) * len(rows), teacher_drew_BT=heads_RT,
        logq_BT=logq_RT, student_hidden_BTH=of("states_NTV"), teacher_hidden_BTH=None, support_BTC=None, policy_step=0,
    )  # fmt: skip
    return Scored(
        rollout=rollout, logq_BT=logq_RT, logp_BT=of("logp_NT"), reverse_kl_BT=of("kl_NT"), entropy_BT=of("entropy_NT")
    )


def expected_pair(
    chosen: MinillmStage, *, prompts: tuple[int, int], groups: tuple[int, int] = (0, 1), length: int = LENGTH
) -> tuple[Tensor, Tensor]:
    """Expected gradient of both rows' losses together, and the gradient of their sequence KLs (and of what repetition
    costs them), [D] each."""
    student, rows = both_rows(prompts, length=length)
    listed = [Listed.of(row, student.logits(row.response_NT, prompt=p)) for row, p in zip(rows, prompts, strict=True)]
    share = [torch.zeros_like(row.reward_NT) for row in rows]  # of the single-step term, for each response
    earned = [torch.zeros_like(row.reward_NT) for row in rows]
    names = RowNames(prompt_B=torch.tensor(prompts), row_B=torch.arange(2), coin_group_B=torch.tensor(groups))
    heads_KT, chance_K = coin_patterns(length, alpha=chosen.teacher_mix)
    drawn_KN = [chance_given_coins(row, heads_KT) for row in rows]
    patterns = [k for k in range(len(heads_KT)) if chance_K[k] > 0]
    for coins in itertools.product(patterns, repeat=len(set(groups))):
        fall = [coins[group] for group in groups]
        chance_NN = chance_K[list(coins)].prod() * torch.outer(drawn_KN[0][fall[0]], drawn_KN[1][fall[1]])
        heads_RT = heads_KT[fall]
        for (n, m), chance in zip(itertools.product(*map(range, chance_NN.shape)), chance_NN.flatten(), strict=True):
            scored = scored_rows([(listed[0], n), (listed[1], m)], heads_RT)
            targets = targets_of(scored, chosen, names=names, ranks=OneRank(), longest=length)  # type: ignore[arg-type]
            single_RT, earned_RT = targets.single_weight_BT, chance * targets.importance_BT * targets.advantage_BT
            for r, number in enumerate((n, m)):
                share[r][number] += chance * (1.0 if single_RT is None else single_RT[r])
                earned[r][number] += earned_RT[r]
    got_D = torch.zeros(())
    for row, share_NT, credit_NT in zip(rows, share, earned, strict=True):
        # At the old weights the surrogate's gradient is minus credit times the score (tests/exact/test_clip.py).
        loss = chosen.single_weight * (share_NT * row.kl_NT).sum()
        loss -= chosen.long_weight * torch.where(row.mask_NT, credit_NT * row.logq_NT, 0.0).sum()
        got_D = got_D + gradient(loss, student)
    return got_D, promised(chosen, prompts=prompts, length=length)


def both_rows(prompts: tuple[int, int], *, length: int) -> tuple[TabularLM, list[Enumeration]]:
    """The student, and everything that can happen after each of the prompts."""
    student, teacher = make_pair(vocab=3, length=length, prompts=2, seed=1)
    return student, [enumerate_pair(student, teacher, prompt=prompt) for prompt in prompts]


def promised(chosen: MinillmStage, *, prompts: tuple[int, int], length: int = LENGTH) -> Tensor:
    """Gradient of both sequence KLs and of what repetition costs, [D]; of all of ``chosen`` it asks for that cost."""
    student, rows = both_rows(prompts, length=length)
    return torch.stack([gradient(sequence_kl(row) + repetition_cost(row, chosen), student) for row in rows]).sum(0)


def repetition_cost(every: Enumeration, chosen: MinillmStage) -> Tensor:
    """The weight times the expected number of n-grams that return in a response, counted one by one."""
    counts = []
    for ids_T, kept_T in zip(every.response_NT, every.mask_NT, strict=True):
        ids, n = ids_T[kept_T].tolist(), chosen.repetition_ngram
        runs = [ids[at : at + n] for at in range(len(ids) - n + 1)]
        counts.append(sum(run in runs[:at] for at, run in enumerate(runs)))
    return chosen.repetition_weight * (every.logq_NT.sum(1).exp() * torch.tensor(counts, dtype=torch.float64)).sum()


def bias(chosen: MinillmStage, **how: Any) -> float:
    return relative_error(*expected_pair(chosen, **how))


def surplus(chosen: MinillmStage, **how: Any) -> float:
    """What the baseline adds to the expected gradient, relative to the gradient of the KL."""
    plain = chosen.model_copy(update={"baseline": "none"})
    (got_D, want_D), (without_D, _) = expected_pair(chosen, **how), expected_pair(plain, **how)
    return float((got_D - without_D).norm() / want_D.norm())


@pytest.mark.parametrize("future", ["sampled", "expected"])
@pytest.mark.parametrize("baseline", ["none", "position_mean", "ridge"])
def test_without_mixing_credit_keeps_the_gradient_of_the_kl(future: str, baseline: str) -> None:
    chosen = stage(future=future, baseline=baseline)
    assert chosen.bias_reasons(truncated=False, tempered=False) == []
    assert bias(chosen, prompts=STRANGERS) < 1e-10


def test_leave_one_out_keeps_it_too() -> None:
    assert bias(stage(baseline="leave_one_out", samples_per_prompt=2, prompts=1), prompts=SIBLINGS) < 1e-10


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_without_the_single_step_term_the_return_holds_the_present_token(future: str) -> None:
    chosen = stage(single_weight=0.0, future=future)
    assert chosen.bias_reasons(truncated=False, tempered=False) == []
    assert bias(chosen, prompts=STRANGERS) < 1e-10


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_weights_per_decision_are_exact_under_mixing(future: str, alpha: float) -> None:
    chosen = stage(future=future, importance="per_decision", teacher_mix=alpha)
    assert chosen.bias_reasons(truncated=False, tempered=False) == []
    assert bias(chosen, prompts=STRANGERS, length=2) < 1e-10


@pytest.mark.parametrize("baseline", ["position_mean", "ridge"])
def test_weights_per_decision_with_a_baseline_of_other_coin_groups_are_exact(baseline: str) -> None:
    chosen = stage(importance="per_decision", teacher_mix=0.2, baseline=baseline, coin_groups=2)
    assert bias(chosen, prompts=STRANGERS, length=2) < 1e-10


@pytest.mark.parametrize(("baseline", "visible"), [("position_mean", 1e-3), ("ridge", 1e-4)])
@pytest.mark.parametrize("importance", ["per_step", "per_decision"])
def test_rows_that_share_coins_would_bend_it(
    importance: str, baseline: str, visible: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: weights by token, shared coins, and a library that is not told to keep such rows apart."""
    chosen = stage(importance=importance, teacher_mix=0.2, baseline=baseline, coin_groups=2)
    monkeypatch.setattr("minillm.advantages._apart", lambda stage: False)
    assert surplus(chosen, prompts=STRANGERS, groups=(0, 0), length=2) > visible


@pytest.mark.parametrize("baseline", ["position_mean", "ridge"])
def test_coin_weights_let_rows_that_share_coins_serve(baseline: str) -> None:
    chosen = stage(importance="coin", teacher_mix=0.2, baseline=baseline)
    assert surplus(chosen, prompts=STRANGERS, groups=(0, 0), length=2) < 1e-10


def test_a_ridge_that_saw_the_row_itself_bends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without cross-fitting the baseline knows what followed the token."""
    fit = ridge._fit
    monkeypatch.setattr(ridge, "_fit", lambda sums, *, without, strength: fit(sums, without=-1, strength=strength))
    assert surplus(stage(baseline="ridge"), prompts=STRANGERS) > 1e-2


COSTLY = {"repetition_weight": 0.7}


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_ngram": 1},
        {"repetition_ngram": 1, "future": "expected"},
        {"repetition_ngram": 1, "single_weight": 0.0},
        {"repetition_ngram": 1, "baseline": "position_mean"},
        {"repetition_ngram": 1, "baseline": "ridge", "future": "expected"},
        {"repetition_ngram": 2, "length": 4},
        {"repetition_ngram": 2, "future": "expected"},  # 1 1 1 and 2 2 2 are all that repeats a pair
        {"repetition_ngram": 1, "teacher_mix": 0.2, "importance": "per_decision", "length": 2},
        {"repetition_ngram": 1, "teacher_mix": 0.2, "importance": "per_decision", "future": "expected", "length": 2},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_the_cost_of_repetition_adds_the_gradient_of_the_expected_number_of_repetitions(
    settings: dict[str, Any],
) -> None:
    settings = dict(settings)
    length = settings.pop("length", LENGTH)
    chosen = stage(**COSTLY, **settings)
    assert chosen.bias_reasons(truncated=False, tempered=False) == ["repetition reward: another objective"]
    got_D, want_D = expected_pair(chosen, prompts=STRANGERS, length=length)
    assert relative_error(got_D, want_D) < 1e-10
    free_D = promised(chosen.model_copy(update={"repetition_weight": 0.0}), prompts=STRANGERS, length=length)
    assert relative_error(got_D, free_D) > 1e-2  # it costs something here


@pytest.mark.parametrize("future", ["sampled", "expected"])
def test_a_cost_that_is_not_the_present_tokens_own_would_be_seen(future: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: only later repetitions counted, as is right for what the single-step term knows."""
    monkeypatch.setattr("minillm.credit.return_to_go", credit.future_return)
    assert bias(stage(**COSTLY, repetition_ngram=1, future=future), prompts=STRANGERS) > 1e-2


def test_without_a_weight_repetition_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    got_D, _ = expected_pair(stage(repetition_ngram=1), prompts=STRANGERS)
    monkeypatch.setattr("minillm.advantages.repetition_rewards", None)
    plain_D, _ = expected_pair(stage(), prompts=STRANGERS)
    assert torch.equal(got_D, plain_D)


def test_a_repetition_is_divided_discounted_and_cut_off_like_other_rewards() -> None:
    """One response "1 1 1 EOS", written out; and the whole response's cost where a response has one score."""
    student, teacher = make_pair(vocab=3, length=4, seed=1)
    every = enumerate_pair(student, teacher)
    number = every.response_NT.tolist().index([1, 1, 1, 0])
    listed = Listed.of(every, student.logits(every.response_NT))
    scored = scored_rows([(listed, number)], torch.zeros(1, 4, dtype=torch.bool))

    def cost_of(**settings: Any) -> list[float]:
        chosen = stage(repetition_ngram=1, samples_per_prompt=2, **settings)
        with_BT, without_BT = (
            returns_of(scored, chosen.model_copy(update={"repetition_weight": weight}), carry_BT=None)
            for weight in (1.0, 0.0)
        )
        cost: list[float] = (without_BT - with_BT)[0].tolist()
        return cost

    assert cost_of() == pytest.approx([2, 2, 1, 0])
    assert cost_of(gamma=0.5) == pytest.approx([0.75, 1.5, 1, 0])
    assert cost_of(horizon=1) == pytest.approx([1, 2, 1, 0])
    assert cost_of(length_norm=True) == pytest.approx([2 / 4, 2 / 3, 1 / 2, 0])
    assert cost_of(single_weight=0.0) == pytest.approx([2, 2, 1, 0])
    assert cost_of(baseline="grpo") == pytest.approx([2, 2, 2, 2])


BIASED = {
    "group_mean": ({"baseline": "group_mean", "samples_per_prompt": 2, "prompts": 1}, 0.046714),
    "grpo": ({"baseline": "grpo", "samples_per_prompt": 2, "prompts": 1}, 0.579781),
    "whitened": ({"whiten": "masked"}, 0.330239),
    "gamma 0.9": ({"gamma": 0.9}, 0.070461),
    "horizon 1": ({"horizon": 1}, 0.183038),
    "length_norm": ({"length_norm": True}, 0.338335),
    "per_step": ({"teacher_mix": 0.2, "importance": "per_step"}, 0.099208),
    "coin": ({"teacher_mix": 0.2, "importance": "coin"}, 0.099208),
    "present twice": ({"published": {"present_twice": True}}, 0.764793),
    "divided by a count": ({"length_norm": True, "gamma": 0.9, "published": {"count_divisor": True}}, 0.362257),
    "whitened over padding": ({"published": {"whiten_padding": True}}, 0.322847),
    "rewards of half the size": ({"published": {"reward_scale": 2.0}}, 0.277559),
    "rewards clipped": ({"published": {"reward_clip": 0.5}}, 0.392619),
    "truncated 1": ({"teacher_mix": 0.2, "importance": "truncated", "weight_cap": 1.0}, 0.089852),
}
"""Relative error of the expected gradient, two rows of up to three tokens, recorded."""


@pytest.mark.parametrize("name", BIASED)
def test_what_is_biased_says_so_and_by_how_much(name: str) -> None:
    settings, want = BIASED[name]
    chosen = stage(**settings)
    assert chosen.bias_reasons(truncated=False, tempered=False)
    prompts = SIBLINGS if "samples_per_prompt" in settings else STRANGERS
    assert bias(chosen, prompts=prompts, length=2 if chosen.teacher_mix else LENGTH) == pytest.approx(want, abs=2e-6)


def test_the_present_reward_counted_twice_adds_the_single_step_gradient() -> None:
    """What the published code does: the exact gradient plus that of the single-step term once more (enumerated)."""
    twice_D, want_D = expected_pair(stage(published={"present_twice": True}), prompts=STRANGERS)
    single_D, _ = expected_pair(stage(gamma=0.0), prompts=STRANGERS)
    assert_close(twice_D, want_D + single_D)
    assert float(single_D.norm()) > 0.1 * float(want_D.norm())


def test_a_weight_on_the_single_step_term_changes_no_expectation_but_the_numbers() -> None:
    """Equation 5 against the code: E[w grad KL] = grad KL given the prefix, so only noise is added."""
    plain = {"teacher_mix": 0.2, "importance": "per_step", "long_weight": 0.0}
    how = {"prompts": STRANGERS, "length": 2}
    with_D, _ = expected_pair(stage(**plain, published={"weight_on_single": True}), **how)  # type: ignore[arg-type]
    without_D, _ = expected_pair(stage(**plain), **how)  # type: ignore[arg-type]
    assert_close(with_D, without_D)


def test_gamma_zero_leaves_the_single_step_term_alone() -> None:
    """Plain on-policy distillation: the same as a long-horizon weight of 0."""
    got_D, _ = expected_pair(stage(gamma=0.0), prompts=STRANGERS)
    want_D, _ = expected_pair(stage(long_weight=0.0), prompts=STRANGERS)
    assert_close(got_D, want_D)
    assert float((got_D - expected_pair(stage(), prompts=STRANGERS)[0]).norm()) > 1e-2

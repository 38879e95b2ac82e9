"""The pairwise objective against numbers worked out by hand, closed forms, and a problem small enough to solve.

1. DPO: the loss and its slope at given log-probs, every link and target.
2. TDPO: the hand example, which gradients flow, and the closed forms of all three by the logits.
3. Soft targets: descent ends at the teacher, and begins along the reverse KL. Hard ones: it has no end.

Legend: B pairs, T response positions, V vocabulary ids, R responses of a table.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.divergences import forward_kl
from minillm.pairwise_loss import Compared, Value, pair_logit, pairwise_loss, soft_target

VALUES: tuple[Value, ...] = ("dpo", "tdpo1", "tdpo2")
MICRO = 1e-6
EXACT = 1e-12


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def response(logits_TV: Tensor, ref_TV: Tensor, y_T: Tensor) -> tuple[Tensor, Tensor]:
    """(m, K) of one response from whole logits, by autograd."""
    logq_TV, logref_TV = logits_TV.log_softmax(-1), ref_TV.log_softmax(-1)
    m = (logq_TV - logref_TV).gather(1, y_T[:, None]).sum()
    return m, forward_kl(logq_TV, logref_TV).sum()


def compared(student: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Compared:
    """A pair (chosen, rejected) as a batch of one."""
    (m_w, k_w), (m_l, k_l) = (response(*of) for of in zip(student, ref, y, strict=True))
    return Compared(m_w_B=m_w[None], m_l_B=m_l[None], k_w_B=k_w[None], k_l_B=k_l[None])


def random_pair(*, seed: int = 0) -> tuple[Any, Any, Any]:
    """Student's and reference's logits and tokens of a chosen response of 3 tokens and a rejected one of 4, V = 5."""
    noise = torch.Generator().manual_seed(seed)
    logits = [torch.randn(t, 5, generator=noise, dtype=torch.float64) for t in (3, 4, 3, 4)]
    y = tuple(torch.randint(5, (t,), generator=noise) for t in (3, 4))
    return (logits[0].requires_grad_(), logits[1].requires_grad_()), (logits[2], logits[3]), y


# 1. DPO


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 7.0])
def test_a_student_that_is_the_reference_has_loss_ln_2_and_the_slope_of_dpo(value: Value, beta: float) -> None:
    student, _, y = random_pair()
    ref = tuple(logits.detach().clone() for logits in student)
    of = compared(student, ref, y)
    assert of.k_w_B is not None and max(abs(x.item()) for x in (of.k_w_B, of.m_w_B)) < EXACT
    loss = pairwise_loss(pair_logit(value, of, alpha=0.3), beta=beta)
    assert abs(loss.item() - math.log(2)) < EXACT
    mine = torch.autograd.grad(loss.sum(), student, retain_graph=True)
    plain = torch.autograd.grad(pairwise_loss(pair_logit("dpo", of), beta=beta).sum(), student)
    for got, want in zip(mine, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=EXACT)


def test_the_slope_at_the_beginning_is_half_of_beta() -> None:
    h_B = numbers(0.0).requires_grad_()
    (slope,) = torch.autograd.grad(pairwise_loss(h_B, beta=0.1).sum(), h_B)
    assert abs(float(slope) + 0.05) < EXACT


GOLDEN: list[tuple[dict[str, Any], float]] = [
    ({}, 0.620957),
    ({"target": "smoothed", "noise": 0.1}, 0.635957),
    ({"link": "robust", "noise": 0.1}, 0.602207),
    ({"link": "hinge"}, 0.85),
    ({"link": "ipo"}, 12.25),
]


@pytest.mark.parametrize(("settings", "want"), GOLDEN)
def test_links_and_targets_have_the_numbers_worked_out_by_hand(settings: dict[str, Any], want: float) -> None:
    """Log-probs -10 against -11 of the reference, and -12 against -11.5: h = 1.5; beta 0.1."""
    of = Compared(m_w_B=numbers(-10.0 + 11.0), m_l_B=numbers(-12.0 + 11.5))
    h_B = pair_logit("dpo", of)
    assert abs(float(h_B) - 1.5) < EXACT
    assert abs(float(pairwise_loss(h_B, beta=0.1, **settings)) - want) < MICRO
    for other, number in GOLDEN:  # the control: no setting is ignored
        if other != settings:
            assert abs(float(pairwise_loss(h_B, beta=0.1, **other)) - want) > 100 * MICRO, number


def test_the_weight_of_the_gradient_is_the_golden_one() -> None:
    h_B = numbers(1.5).requires_grad_()
    (slope,) = torch.autograd.grad(pairwise_loss(h_B, beta=0.1).sum(), h_B)
    assert abs(float(slope) + 0.0462570) < 1e-7


def test_swapped_sides_lose_beta_h_more() -> None:
    h_B = torch.linspace(-300.0, 300.0, 61, dtype=torch.float64)
    gap_B = pairwise_loss(h_B, beta=0.1) - pairwise_loss(-h_B, beta=0.1)
    torch.testing.assert_close(gap_B, -0.1 * h_B, rtol=0, atol=EXACT)


def test_robust_labels_have_the_right_mean() -> None:
    """Over labels that are swapped with chance noise the mean is the loss of the right ones; smoothed ones' is not."""
    h_B, noise = torch.linspace(-30.0, 30.0, 13, dtype=torch.float64), 0.2

    def mean(**settings: Any) -> Tensor:
        settings |= {"beta": 0.3, "noise": noise}
        return (1 - noise) * pairwise_loss(h_B, **settings) + noise * pairwise_loss(-h_B, **settings)

    right_B = pairwise_loss(h_B, beta=0.3)
    torch.testing.assert_close(mean(link="robust"), right_B, rtol=0, atol=EXACT)
    assert float((mean(target="smoothed") - right_B).abs().max()) > 0.1


def test_a_soft_target_of_one_is_hard_and_of_a_half_is_lowest_at_nothing() -> None:
    h_B = torch.linspace(-5.0, 5.0, 11, dtype=torch.float64)
    assert torch.equal(
        pairwise_loss(h_B, beta=1.0, target="soft", soft_target_B=torch.ones_like(h_B)), pairwise_loss(h_B, beta=1.0)
    )
    half_B = pairwise_loss(h_B, beta=1.0, target="soft", soft_target_B=torch.full_like(h_B, 0.5))
    assert int(half_B.argmin()) == 5


def test_constants_by_position_and_by_prompt_change_nothing() -> None:
    student, ref, y = random_pair()
    plain = compared(student, ref, y)
    shifted = tuple(logits + numbers(*range(3, 3 + len(logits)))[:, None] for logits in student)
    moved = compared(shifted, ref, y)
    for value in VALUES:
        torch.testing.assert_close(pair_logit(value, moved), pair_logit(value, plain), rtol=0, atol=1e-11)
    both = Compared(m_w_B=plain.m_w_B + 3.0, m_l_B=plain.m_l_B + 3.0)
    torch.testing.assert_close(pair_logit("dpo", both), pair_logit("dpo", plain), rtol=0, atol=EXACT)


# 2. TDPO


def hand_example(*, q: tuple[float, float] = (0.8, 0.2)) -> Compared:
    """V = 2, a uniform reference, the same student at every position; chosen (0), rejected (1, 1)."""
    logits_1V, uniform_1V = numbers(*q).log()[None], numbers(0.5, 0.5).log()[None]
    return compared(
        (logits_1V, logits_1V.repeat(2, 1)), (uniform_1V, uniform_1V.repeat(2, 1)),
        (torch.tensor([0]), torch.tensor([1, 1])),
    )  # fmt: skip


HAND: dict[Value, tuple[float, float, float]] = {
    "dpo": (math.log(10), 0.0953102, 0.5846307),
    "tdpo1": (math.log(8), 0.1177830, 0.5945705),
    "tdpo2": (math.log(10 / math.sqrt(1.25)), 0.1059834, 0.5895852),
}


@pytest.mark.parametrize("value", VALUES)
def test_the_hand_example(value: Value) -> None:
    of, (h, at_one, at_tenth) = hand_example(), HAND[value]
    assert of.k_w_B is not None and abs(float(of.k_w_B) - 0.223144) < MICRO
    h_B = pair_logit(value, of, alpha=0.5)
    assert abs(float(h_B) - h) < EXACT
    assert abs(float(pairwise_loss(h_B, beta=1.0)) - at_one) < 1e-7
    assert abs(float(pairwise_loss(h_B, beta=0.1)) - at_tenth) < 1e-7


def closed_form(value: Value, side: str, *, logits_TV: Tensor, ref_TV: Tensor, y_T: Tensor, alpha: float) -> Tensor:
    """What the loss's slope by h multiplies, by the logits of one side."""
    taken_TV = torch.nn.functional.one_hot(y_T, logits_TV.shape[1]).double()
    q_TV, p_TV = logits_TV.softmax(-1), ref_TV.softmax(-1)
    if value == "tdpo1":
        return taken_TV - p_TV
    if value == "tdpo2" and side == "rejected":
        return taken_TV - (1 - alpha) * q_TV - alpha * p_TV
    return taken_TV - q_TV


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("value", VALUES)
def test_gradients_by_the_logits_are_the_closed_forms(value: Value, alpha: float) -> None:
    student, ref, y = random_pair()
    h_B = pair_logit(value, compared(student, ref, y), alpha=alpha)
    found = torch.autograd.grad(pairwise_loss(h_B, beta=0.7).sum(), student)
    c = -0.7 * torch.sigmoid(-0.7 * h_B).item()
    for place, (side, sign) in enumerate((("chosen", 1.0), ("rejected", -1.0))):
        of = {"logits_TV": student[place].detach(), "ref_TV": ref[place], "y_T": y[place], "alpha": alpha}
        torch.testing.assert_close(found[place], sign * c * closed_form(value, side, **of), rtol=0, atol=EXACT)
        others = [other for other in VALUES if other != value]
        told = [float((found[place] - sign * c * closed_form(o, side, **of)).abs().max()) > 1e-3 for o in others]
        same = {("dpo", "chosen"): 1, ("tdpo2", "chosen"): 1}.get((value, side), 0)  # these two are one form
        assert sum(told) == len(others) - same or alpha in {0.0, 1.0}


def test_alpha_is_heard() -> None:
    """The control of a setting that an implementation shipped and ignored."""
    student, ref, y = random_pair()
    of = compared(student, ref, y)
    slopes = {}
    for alpha in (0.0, 0.5, 1.0):
        loss = pairwise_loss(pair_logit("tdpo2", of, alpha=alpha), beta=1.0).sum()
        slopes[alpha] = torch.autograd.grad(loss, student, retain_graph=True)[1]
    for one, other in itertools.combinations(slopes.values(), 2):
        assert float((one - other).abs().max()) > 1e-3
    one, other = (pair_logit("tdpo1", of, alpha=alpha) for alpha in (0.0, 1.0))
    assert torch.equal(one, other)


def test_no_gradient_flows_through_the_chosen_sides_kl_in_tdpo2() -> None:
    student, ref, y = random_pair()
    of = compared(student, ref, y)
    assert of.k_w_B is not None and of.k_l_B is not None

    def slopes(of: Compared) -> tuple[Tensor, ...]:
        loss = pairwise_loss(pair_logit("tdpo2", of, alpha=0.5), beta=1.0).sum()
        return torch.autograd.grad(loss, student, retain_graph=True)

    want = slopes(of)
    by_hand = Compared(m_w_B=of.m_w_B, m_l_B=of.m_l_B, k_w_B=of.k_w_B.detach(), k_l_B=of.k_l_B)
    assert all(torch.equal(a, b) for a, b in zip(slopes(by_hand), want, strict=True))
    other = Compared(m_w_B=of.m_w_B, m_l_B=of.m_l_B, k_w_B=of.k_w_B, k_l_B=of.k_l_B.detach())
    assert float((slopes(other)[1] - want[1]).abs().max()) > 1e-3


def test_tdpo2_at_its_ends_is_dpo_and_has_the_value_of_tdpo1() -> None:
    student, ref, y = random_pair()
    of = compared(student, ref, y)
    assert torch.equal(pair_logit("tdpo2", of, alpha=0.0), pair_logit("dpo", of))
    first, second = pair_logit("tdpo1", of), pair_logit("tdpo2", of, alpha=1.0)
    assert abs((first - second).item()) < EXACT
    slopes = [torch.autograd.grad(h_B.sum(), student, retain_graph=True)[0] for h_B in (first, second)]
    assert float((slopes[0] - slopes[1]).abs().max()) > 1e-3


def test_tdpo1s_gradient_on_the_chosen_side_does_not_know_the_student() -> None:
    student, ref, y = random_pair()
    other = (student[0].detach().neg().requires_grad_(), student[1])
    slopes = [
        {value: torch.autograd.grad(pair_logit(value, compared(of, ref, y)).sum(), of[0])[0] for value in VALUES}
        for of in (student, other)
    ]
    torch.testing.assert_close(slopes[0]["tdpo1"], slopes[1]["tdpo1"], rtol=0, atol=EXACT)
    assert float((slopes[0]["tdpo2"] - slopes[1]["tdpo2"]).abs().max()) > 1e-3


def test_k_is_never_below_nothing_and_doubles_with_the_states() -> None:
    student, ref, y = random_pair()
    m, k = response(student[0], ref[0], y[0])
    twice = response(student[0].repeat(2, 1), ref[0].repeat(2, 1), y[0].repeat(2))
    assert k.item() > 0
    torch.testing.assert_close(torch.stack(twice), 2 * torch.stack((m, k)), rtol=0, atol=EXACT)


# 3. A table of responses to one prompt


def descend(pairs: list[tuple[int, int]], *, target_B: Tensor | None, steps: int, rate: float, beta: float) -> Tensor:
    """Log-probs [R] of a table of 4 responses after descent on these pairs, from a uniform reference."""
    ref_R = torch.full((4,), -math.log(4), dtype=torch.float64)
    logits_R = ref_R.clone().requires_grad_()
    chosen_B, rejected_B = torch.tensor(pairs).T
    for _ in range(steps):
        m_R = logits_R.log_softmax(-1) - ref_R
        h_B = pair_logit("dpo", Compared(m_w_B=m_R[chosen_B], m_l_B=m_R[rejected_B]))
        target = {} if target_B is None else {"target": "soft", "soft_target_B": target_B}
        (slope_R,) = torch.autograd.grad(pairwise_loss(h_B, beta=beta, **target).mean(), logits_R)
        logits_R = (logits_R - rate * slope_R).detach().requires_grad_()
    return logits_R.log_softmax(-1).detach()


def test_soft_targets_lead_to_the_teacher_and_stay_there() -> None:
    teacher_R = numbers(0.5, 0.3, 0.15, 0.05).log()
    ref = -math.log(4)
    pairs = [*itertools.combinations(range(4), 2)]
    chosen_B, rejected_B = torch.tensor(pairs).T
    uniform_B = torch.full((len(pairs),), ref, dtype=torch.float64)
    target_B = soft_target(
        teacher_w_B=teacher_R[chosen_B], teacher_l_B=teacher_R[rejected_B], ref_w_B=uniform_B, ref_l_B=uniform_B,
        beta=1.0,
    )  # fmt: skip
    found_R = descend(pairs, target_B=target_B, steps=2000, rate=2.0, beta=1.0)
    torch.testing.assert_close(found_R, teacher_R, rtol=0, atol=1e-12)
    hard_R = descend(pairs, target_B=None, steps=2000, rate=2.0, beta=1.0)  # the control
    assert float((hard_R - teacher_R).abs().max()) > 1.0
    swapped_B = 1.0 - target_B  # and another
    assert float((descend(pairs, target_B=swapped_B, steps=2000, rate=2.0, beta=1.0) - teacher_R).abs().max()) > 1.0


def test_the_margin_of_one_pair_with_a_hard_label_has_no_end() -> None:
    margins = []
    for steps in (20, 2000, 20_000):
        logq_R = descend([(0, 1)], target_B=None, steps=steps, rate=5.0, beta=0.1)
        margins.append(float(logq_R[0] - logq_R[1]))
    assert margins[0] < margins[1] < margins[2]
    assert abs(margins[2] - 75.98) < 0.005  # it grows as the logarithm of the steps


def test_soft_targets_on_the_students_own_pairs_begin_along_the_reverse_kl() -> None:
    """Where student = reference, the mean gradient over pairs that it drew itself is beta² / 2 of that of KL(q ‖ p), up
    to higher powers of beta: what a policy gradient of whole responses has, from one number a pair."""
    teacher_R, weights_R = numbers(0.5, 0.3, 0.15, 0.05).log(), numbers(0.4, -0.3, 0.2, 0.9)

    def gradients(beta: float, *, drawn_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        logits_R = weights_R.clone().requires_grad_()
        logq_R = logits_R.log_softmax(-1)
        ref_R, first_R = logq_R.detach(), logq_R.detach() if drawn_R is None else drawn_R
        chosen_B, rejected_B = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
        sides = {
            "teacher_w_B": teacher_R[chosen_B], "teacher_l_B": teacher_R[rejected_B], "ref_w_B": ref_R[chosen_B],
            "ref_l_B": ref_R[rejected_B],
        }  # fmt: skip
        target_B = soft_target(**sides, beta=beta)
        h_B = (logq_R - ref_R)[chosen_B] - (logq_R - ref_R)[rejected_B]
        losses_B = pairwise_loss(h_B, beta=beta, target="soft", soft_target_B=target_B)
        share_B = (first_R[chosen_B] + ref_R[rejected_B]).exp()
        (ours_R,) = torch.autograd.grad((share_B * losses_B).sum(), logits_R, retain_graph=True)
        (kl_R,) = torch.autograd.grad((logq_R.exp() * (logq_R - teacher_R)).sum(), logits_R)
        return ours_R, kl_R

    ours_R, kl_R = gradients(1e-3)
    torch.testing.assert_close(ours_R / (1e-6 / 2), kl_R, rtol=1e-5, atol=1e-7)
    others_R, _ = gradients(1e-3, drawn_R=teacher_R)  # the control: the chosen ones are the teacher's
    assert float((others_R / (1e-6 / 2) - kl_R).abs().max()) > 0.05

"""Promises: the curve is the definition, by hand and by listing all texts; length, padding and order have no say in it.

Legend: B responses, N prompts, T positions. p is the teacher, q the student.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from minillm.errors import NonFinite, ShapeMismatch
from minillm.exposure import Texts, exposure_curve
from minillm.statistics import Array

Curve = Callable[[Texts, Texts], list[float]]


def texts(rows: Sequence[Sequence[float]], prompts: Sequence[int] | None = None, *, pad: int = 0) -> Texts:
    """Ragged rows of KLs, right-padded with nonsense."""
    width = max(map(len, rows)) + pad
    kl_BT, alive_BT = np.full((len(rows), width), 99.0), np.zeros((len(rows), width), dtype=bool)
    for b, row in enumerate(rows):
        kl_BT[b, : len(row)], alive_BT[b, : len(row)] = row, True
    prompt_B = np.zeros(len(rows), dtype=np.int64) if prompts is None else np.array(prompts, dtype=np.int64)
    return Texts(kl_BT=kl_BT, alive_BT=alive_BT, prompt_B=prompt_B)


def curve(student: Texts, teacher: Texts, **changed: Any) -> dict[str, Any]:
    prompts = 1 + int(max(student.prompt_B.max(), teacher.prompt_B.max()))
    given: dict[str, Any] = {
        "prompts": prompts,
        "resamples": 40,
        "seed": 0,
        "least_alive": 1,
        "least_prompts": 1,
    } | changed
    return exposure_curve(student, teacher, **given)


def ours(student: Texts, teacher: Texts) -> list[float]:
    found: list[float] = curve(student, teacher)["ex_acc_err"]
    return found


def with_zeros(student: Texts, teacher: Texts) -> list[float]:
    """Broken as published: a response that has ended goes on without error."""
    means = [np.where(each.alive_BT, each.kl_BT, 0.0).mean(axis=0).cumsum() for each in (student, teacher)]
    return list(100 * (means[0] - means[1]) / means[1])


def without_first(student: Texts, teacher: Texts) -> list[float]:
    """Broken as published: the sums start at the second token."""
    sums = []
    for each in (student, teacher):
        alive_BT = each.alive_BT[:, 1:]
        sums.append((np.where(alive_BT, each.kl_BT[:, 1:], 0.0).sum(axis=0) / alive_BT.sum(axis=0)).cumsum())
    return list(100 * (sums[0] - sums[1]) / sums[1])


def test_by_hand() -> None:
    student = texts([[0.1, 0.4, 0.6], [0.1, 0.2]])
    teacher = texts([[0.1, 0.1], [0.1, 0.3, 0.2]])
    found = curve(student, teacher)
    # a = .1, .3, .6 and b = .1, .2, .2: R = .1, .4, 1.0 and l e = .1, .3, .5
    assert found["student_kl"] == pytest.approx([0.1, 0.3, 0.6])
    assert found["teacher_kl"] == pytest.approx([0.1, 0.2, 0.2])
    assert found["accumulated"] == pytest.approx([0.1, 0.4, 1.0])
    assert found["expected"] == pytest.approx([0.1, 0.3, 0.5])
    assert found["ex_acc_err"] == pytest.approx([0.0, 100 / 3, 100.0])
    assert found["alive"] == {"student": [2, 2, 1], "teacher": [2, 2, 1]}
    assert (found["positions"], found["left_out"], found["prompts"]) == (3, 0, 1)
    assert found["ci95"] == [None] * 3  # one prompt says nothing of others
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("broken", [with_zeros, without_first])
def test_the_published_faults_would_be_seen(broken: Curve) -> None:
    """Negative control of the case by hand."""
    student, teacher = texts([[0.1, 0.4, 0.6], [0.1, 0.2]]), texts([[0.1, 0.1], [0.1, 0.3, 0.2]])
    right, wrong = ours(student, teacher), broken(student, teacher)
    assert max(abs(a - b) for a, b in zip(right, wrong, strict=False)) > 10


def test_a_model_that_stops_early_gains_nothing_by_it() -> None:
    """The same errors at each position, and text of another length: the same curve. With zeros it would be another."""
    at_T, teacher = [0.1, 0.3, 0.5, 0.7], texts([[0.1, 0.2, 0.2, 0.2]] * 8)
    patient = texts([at_T] * 8)
    hasty = texts([at_T[: 1 + b % 4] for b in range(8)])
    assert ours(hasty, teacher) == pytest.approx(ours(patient, teacher))
    assert with_zeros(hasty, teacher)[-1] < with_zeros(patient, teacher)[-1] - 50


# Every text of a small vocabulary, as often as it is likely: 4^3 texts of three tokens out of {end, a, b}.
CHANCES = [(1, 1, 2), (2, 1, 1), (1, 2, 1)]
ENDS = 0
LONGEST = 3


def chances(prefix: tuple[int, ...], *, model: int) -> tuple[float, ...]:
    """Next-token probabilities in quarters, of three models that agree after some prefixes and not after others."""
    return tuple(c / 4 for c in CHANCES[(model + (model + 1) * sum(prefix)) % 3])


def kl_at(prefix: tuple[int, ...], *, q: int, p: int) -> float:
    student, teacher = chances(prefix, model=q), chances(prefix, model=p)
    return sum(b * np.log(b / a) for a, b in zip(student, teacher, strict=True))


def every_text(*, drawn_by: int, q: int, p: int) -> Texts:
    """All continuations of ``drawn_by``, each repeated in proportion to its probability."""
    rows: list[list[float]] = []
    for tokens in itertools.product(range(3), repeat=LONGEST):
        times = round(4**LONGEST * np.prod([chances(tokens[:t], model=drawn_by)[tokens[t]] for t in range(LONGEST)]))
        length = next((t + 1 for t in range(LONGEST) if tokens[t] == ENDS), LONGEST)
        rows += [[kl_at(tokens[:t], q=q, p=p) for t in range(length)]] * times
    assert len(rows) == 4**LONGEST
    return texts(rows)


def by_states(*, drawn_by: int, q: int, p: int) -> list[float]:
    """The conditional means again, by carrying the probability of each state forward."""
    state: dict[tuple[int, ...], float] = {(): 1.0}
    means = []
    for _ in range(LONGEST):
        means.append(sum(mass * kl_at(s, q=q, p=p) for s, mass in state.items()) / sum(state.values()))
        state = {
            (*s, token): mass * chances(s, model=drawn_by)[token]
            for s, mass in state.items()
            for token in range(3)
            if token != ENDS
        }
    return means


@pytest.mark.parametrize(("q", "p"), [(1, 0), (2, 1), (0, 2)])
def test_by_enumeration(q: int, p: int) -> None:
    student, teacher = every_text(drawn_by=q, q=q, p=p), every_text(drawn_by=p, q=q, p=p)
    own, given = by_states(drawn_by=q, q=q, p=p), by_states(drawn_by=p, q=q, p=p)
    want = [100 * (sum(own[:n]) - sum(given[:n])) / sum(given[:n]) for n in range(1, LONGEST + 1)]
    assert ours(student, teacher) == pytest.approx(want, abs=1e-9)
    for broken in (with_zeros, without_first):  # the control
        wrong = broken(student, teacher)
        assert max(abs(a - b) for a, b in zip(wrong, want, strict=False)) > 1


def test_identical_models_have_none_even_where_rounding_differs() -> None:
    rows = [[0.0, 0.0, 0.0], [0.0, 0.0]]
    assert ours(texts(rows), texts(rows)) == [0.0, 0.0, 0.0]
    noise = np.random.default_rng(0)
    noisy = [[float(x) for x in 1e-8 * noise.normal(size=3)] for _ in range(8)]
    assert ours(texts(noisy[:4]), texts(noisy[4:])) == [0.0, 0.0, 0.0]
    shared = [[0.3, 0.2], [0.3, 0.9]]  # models that differ, on the same texts
    assert ours(texts(shared), texts(shared)) == [0.0, 0.0]
    # The control: a student that errs on its own text only has an error that is no multiple of anything, and not 0.
    assert ours(texts([[0.0, 0.5]]), texts([[0.0, 0.0]])) == [0.0, None]


def test_padding_order_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(1)
    sides: list[tuple[list[list[float]], list[int]]] = []
    for _ in range(2):
        lengths = noise.integers(1, 6, size=30)
        sides.append(([list(map(float, noise.random(n))) for n in lengths], [b % 10 for b in range(30)]))
    plain = curve(*(texts(rows, prompts) for rows, prompts in sides))
    padded = curve(*(texts(rows, prompts, pad=2) for rows, prompts in sides))
    assert padded.pop("left_out") == plain.pop("left_out") + 2
    assert padded == plain
    turned = curve(*(texts(rows[::-1], prompts[::-1]) for rows, prompts in sides))
    np.testing.assert_allclose(turned["ex_acc_err"], plain["ex_acc_err"], atol=1e-9)
    np.testing.assert_allclose(np.array(turned["ci95"]), np.array(plain["ci95"]), atol=1e-9)
    monkeypatch.setattr("minillm.statistics.WEIGHTS_AT_ONCE", 70)
    assert curve(*(texts(rows, prompts) for rows, prompts in sides))["ci95"] == plain["ci95"]


def test_positions_that_few_live_to_are_left_out_and_counted() -> None:
    student = texts([[0.1] * 5] * 3 + [[0.1] * 2] * 20)
    teacher = texts([[0.1] * 7] * 19 + [[0.1] * 3] * 4)
    found = exposure_curve(student, teacher, prompts=1, resamples=0, seed=0, least_prompts=1)
    assert (found["positions"], found["left_out"]) == (2, 5)
    assert exposure_curve(teacher, student, prompts=1, resamples=0, seed=0, least_prompts=1)["positions"] == 2
    assert found["alive"] == {"student": [23, 23], "teacher": [23, 23]}
    nothing = exposure_curve(student, teacher, prompts=1, resamples=3, seed=0, least_alive=24, least_prompts=1)
    assert (nothing["positions"], nothing["ex_acc_err"], nothing["ci95"], nothing["left_out"]) == (0, [], [], 7)


def two_kinds(prompts: int, *, seed: int) -> tuple[Texts, Texts]:
    """Two responses of each kind a prompt, all of a prompt's alike: hard prompts are hard in both kinds."""
    noise = np.random.default_rng(seed)
    hard_N = noise.gamma(1.0, size=prompts)
    names = [n for n in range(prompts) for _ in range(2)]

    def side(factor: float) -> Texts:
        rows = [list(map(float, hard_N[n] * factor * (1 + 0.1 * noise.random(4)))) for n in names]
        return texts(rows, names)

    return side(1.5), side(1.0)


def draws_by_loop(student: Texts, teacher: Texts, *, prompts: int, resamples: int, seed: int, apart: bool) -> Array:
    """The slow obvious bootstrap of the last length; ``apart`` draws the prompts of the two kinds separately."""
    generator, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(prompts, size=prompts)
        sums = []
        for each, names in ((student, drawn), (teacher, other.integers(prompts, size=prompts) if apart else drawn)):
            rows = [b for n in names for b in np.flatnonzero(each.prompt_B == n)]
            alive_BT = each.alive_BT[rows]
            means_T = np.where(alive_BT, each.kl_BT[rows], 0.0).sum(axis=0) / alive_BT.sum(axis=0)
            sums.append(means_T.sum())
        found.append(100 * (sums[0] - sums[1]) / sums[1])
    return np.array(found)


def test_intervals_resample_prompts_with_both_kinds_together() -> None:
    student, teacher = two_kinds(25, seed=3)
    found = curve(student, teacher, resamples=300, seed=5)
    together, apart = (
        np.percentile(draws_by_loop(student, teacher, prompts=25, resamples=300, seed=5, apart=apart), (2.5, 97.5))
        for apart in (False, True)
    )
    np.testing.assert_allclose(found["ci95"][-1], together, atol=1e-9)
    assert apart[1] - apart[0] > 5 * (together[1] - together[0])  # the control: what pairing is for
    low, high = found["ci95"][-1]
    assert low < found["ex_acc_err"][-1] < high


def test_a_draw_in_which_nobody_lives_that_long_is_counted() -> None:
    student = texts([[0.1, 0.2], [0.1], [0.1]], [0, 1, 2])
    teacher = texts([[0.1, 0.1]] * 3, [0, 1, 2])
    found = curve(student, teacher, resamples=500)
    assert found["undefined_resamples"] == pytest.approx(500 * (2 / 3) ** 3, abs=50)
    assert found["ci95"][-1] == pytest.approx([50.0, 50.0])


def test_numbers_that_are_none_and_shapes_that_differ_are_refused() -> None:
    with pytest.raises(NonFinite, match="response 1 at position 0 is inf"):
        texts([[0.1], [float("inf")]])
    with pytest.raises(ShapeMismatch):
        Texts(kl_BT=np.zeros((2, 3)), alive_BT=np.zeros((2, 2), dtype=bool), prompt_B=np.zeros(2, dtype=np.int64))
    with pytest.raises(AssertionError, match="came back"):
        Texts(kl_BT=np.zeros((1, 3)), alive_BT=np.array([[True, False, True]]), prompt_B=np.zeros(1, dtype=np.int64))


def test_many_responses_to_few_prompts_are_no_position() -> None:
    """Twenty samples of one prompt live on: enough responses, and all of one prompt."""
    rows, names = [[0.1] * (30 if n == 0 else 5) for n in range(12) for _ in range(20)], [n // 20 for n in range(240)]
    found = curve(texts(rows, names), texts(rows, names), least_alive=20, least_prompts=10)
    assert (found["positions"], found["left_out"]) == (5, 25)
    assert found["prompts_alive"] == {"student": [12] * 5, "teacher": [12] * 5}
    # Control: counted by responses alone, it went on, with an interval of no width at its end.
    old = curve(texts(rows, names), texts(rows, names), least_alive=20, least_prompts=1)
    assert old["positions"] == 30 and old["prompts_alive"]["student"][-1] == 1


@pytest.mark.parametrize("few", ["student", "teacher"])
def test_either_kind_ends_the_curve(few: str) -> None:
    long, short = [[0.1] * 4] * 30, [[0.1] * (4 if n < 9 else 2) for n in range(30)]
    sides = {"student": long, "teacher": long} | {few: short}
    student, teacher = (texts(sides[side], range(30)) for side in ("student", "teacher"))
    assert curve(student, teacher, least_prompts=10)["positions"] == 2
    assert curve(student, teacher, least_prompts=9)["positions"] == 4  # control

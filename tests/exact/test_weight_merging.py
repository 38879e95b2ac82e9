"""Merging in weights: figures of WARP's specification, closed forms, and what breaks where they are not kept.

Oracle numbers are those of the paper's lemmas, or derived on paper in the test that has them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from minillm.errors import ConfigError, ModelError
from minillm.weight_merging import (
    PARALLEL,
    WIDE,
    ZERO,
    Method,
    Mix,
    angles,
    combined,
    gram,
    lerp,
    liti,
    mix,
    nlerp,
    normalised,
    norms,
    sequential,
    slerp,
    task_vector,
)

TIGHT = 1e-12
METHODS: tuple[Method, ...] = ("lerp", "slerp", "nlerp")


def vectors(models: int, size: int = 40, *, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=draw, dtype=WIDE) for _ in range(models)]


def apart(degrees: float, *, norm: float = 1.0) -> list[Tensor]:
    """Two vectors of one norm at an angle."""
    turn = math.radians(degrees)
    return [norm * torch.tensor(at, dtype=WIDE) for at in ((1.0, 0.0), (math.cos(turn), math.sin(turn)))]


def merge(deltas: Sequence[Tensor], found: Mix) -> Tensor:
    return combined(torch.zeros_like(deltas[0]), deltas, found.shares)


def by(method: Method, deltas: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    whole = gram(deltas)
    return merge(deltas, mix(whole, method=method, weights=normalised(weights, len(deltas)), start_norm=1.0))


def near(got: Tensor, wanted: object, atol: float = TIGHT) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted, dtype=WIDE), rtol=0, atol=atol)


# 1: identity, end points, symmetry


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("models", [1, 2, 3, 5])
def test_equal_models_are_merged_into_themselves(method: Method, models: int) -> None:
    start, model = vectors(2)
    start, model = start.float(), model.float()
    deltas = [task_vector(start, model)] * models
    found = mix(gram(deltas), method=method, weights=normalised(None, models), start_norm=1.0)
    assert torch.equal(combined(start, deltas, found.shares).float(), model)
    assert found.edges == ((PARALLEL,) if method == "slerp" and models > 1 else ())


@pytest.mark.parametrize("degrees", [0.0, 40.0, 90.0, 179.0, 180.0])
def test_the_ends_are_the_models_bit_by_bit_at_any_angle(degrees: float) -> None:
    start = vectors(1, 2)[0].float()
    models = [(start + delta).float() for delta in apart(degrees)]
    deltas = [task_vector(start, model) for model in models]
    for share, wanted in zip((0.0, 1.0), models, strict=True):
        assert torch.equal(combined(start, deltas, slerp(gram(deltas), share).shares).float(), wanted)


def test_turned_round_it_is_the_same_from_the_other_end() -> None:
    one, other = vectors(2)
    for share in (0.1, 0.5, 0.8):
        there = merge([one, other], slerp(gram([one, other]), share))
        back = merge([other, one], slerp(gram([other, one]), 1 - share))
        near(there, back)
    forgot = merge([other, one], slerp(gram([other, one]), 0.8))  # the control
    assert float((merge([one, other], slerp(gram([one, other]), 0.8)) - forgot).norm()) > 1


# 2: the lemmas on norms


@pytest.mark.parametrize("degrees", [5.0, 60.0, 90.0, 150.0])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_slerp_keeps_a_common_norm_and_lerp_shrinks_it_by_the_closed_form(degrees: float, share: float) -> None:
    deltas = apart(degrees, norm=3.0)
    near(merge(deltas, slerp(gram(deltas), share)).norm(), 3.0)
    shrunk = 3.0 * math.sqrt(1 - 2 * (1 - math.cos(math.radians(degrees))) * (share - share**2))
    near(merge(deltas, lerp((1 - share, share))).norm(), shrunk)


def test_at_sixty_degrees_half_way_lerp_has_lost_an_eighth() -> None:
    deltas = apart(60.0)
    near(by("slerp", deltas).norm(), 1.0)
    near(by("lerp", deltas).norm(), 0.866025, atol=5e-7)


# 3: other norms


def test_of_unequal_norms_the_vectors_are_weighted_as_they_are() -> None:
    deltas = [torch.tensor((1.0, 0.0)), torch.tensor((0.0, 3.0))]
    near(by("slerp", deltas), (0.707107, 2.121320), atol=5e-7)
    near(by("slerp", deltas).norm(), math.sqrt(5))
    # The control: of normalised vectors, given the mean norm afterwards, it would have norm 2; that is nlerp.
    near(by("nlerp", deltas), (math.sqrt(2), math.sqrt(2)))
    near(by("nlerp", deltas).norm(), 2.0)


# 4: more than two


@pytest.mark.parametrize(
    ("models", "wanted"),
    [
        (3, (0.6124, 0.6124, 0.5)),
        (4, (0.5658, 0.5658, 0.4619, 0.3827)),
        (5, (0.538, 0.538, 0.439, 0.364, 0.309)),
    ],
)
def test_one_after_the_other_is_not_uniform(models: int, wanted: tuple[float, ...]) -> None:
    deltas = list(torch.eye(models, dtype=WIDE))
    near(by("slerp", deltas), wanted, atol=6e-4 if models == 5 else 6e-5)
    near(by("slerp", deltas).norm(), 1.0)


def test_three_at_right_angles_and_their_order() -> None:
    a, b, c = torch.eye(3, dtype=WIDE)
    root = math.sqrt(6) / 4
    near(by("slerp", [a, b, c]), (root, root, 0.5))
    near(by("slerp", [c, a, b]), (root, 0.5, root))


def test_nlerp_knows_no_order() -> None:
    deltas = vectors(4)
    first = by("nlerp", deltas)
    for order in itertools.permutations(deltas):
        near(by("nlerp", order), first)
    swapped = by("slerp", [*deltas[2:], *deltas[:2]])  # the control: the sequential one does
    assert float((swapped - by("slerp", deltas)).norm()) > 0.1


@pytest.mark.parametrize("degrees", [0.5, 30.0, 90.0, 170.0])
def test_of_two_with_one_norm_nlerp_is_slerp_half_way(degrees: float) -> None:
    deltas = apart(degrees, norm=2.0)
    near(by("nlerp", deltas), by("slerp", deltas))
    uneven = [deltas[0], 3 * deltas[1]]  # the control: one norm is needed
    assert float((by("nlerp", uneven) - by("slerp", uneven)).norm()) > 1e-3


def test_weights_are_the_share_of_two_and_count_in_all_methods() -> None:
    deltas = vectors(2)
    near(by("slerp", deltas, (3, 1)), merge(deltas, slerp(gram(deltas), 0.25)))
    near(by("lerp", deltas, (3, 1)), 0.75 * deltas[0] + 0.25 * deltas[1])
    for method in METHODS:
        near(by(method, deltas, (0, 2)), deltas[1])
        near(by(method, [*deltas, deltas[0]], (0, 2, 0)), deltas[1])


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0, 1.0), (0.0, 0.0), (2.0, -1.0), (math.nan, 1.0), (math.inf, 1)])
def test_weights_that_are_none_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="weights: got"):
        normalised(weights, 2)


# Edges


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_is_merged_on_the_line(method: Method) -> None:
    """mergekit's nuslerp reads a right angle there and gives sin(pi/4) of the other: 0.71 in place of 0.5."""
    moved = vectors(1)[0]
    for still in (torch.zeros_like(moved), 1e-14 * vectors(2)[1]):
        found = mix(gram([still, moved]), method=method, weights=(0.5, 0.5), start_norm=100.0)
        near(merge([still, moved], found), 0.5 * moved)
        assert found.edges == (() if method == "lerp" else (ZERO,))
    barely = 1e-9 * vectors(2)[1]  # the control: short, but with a direction
    assert mix(gram([barely, moved]), method=method, weights=(0.5, 0.5), start_norm=100.0).edges == ()


def test_one_direction_is_a_line_and_opposite_ones_are_refused() -> None:
    one = vectors(1)[0]
    found = slerp(gram([one, 2 * one]), 0.5)
    assert found == Mix(shares=(0.5, 0.5), edges=(PARALLEL,))
    with pytest.raises(ModelError, match="opposite directions"):
        slerp(gram([one, -2 * one]), 0.5)
    with pytest.raises(ModelError, match="cancel"):
        nlerp(gram([one, -2 * one]), (0.5, 0.5))
    star = [torch.tensor((math.cos(at), math.sin(at)), dtype=WIDE) for at in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    with pytest.raises(ModelError, match="cancel"):
        nlerp(gram(star), (1 / 3,) * 3)
    with pytest.raises(ModelError, match="opposite directions"):  # half way between two it meets the third's opposite
        sequential(gram(star), (1 / 3,) * 3)
    assert slerp(gram(apart(179.9)), 0.5).edges == ()


# 6: narrow arithmetic


def test_a_hundredth_of_the_way_is_a_step_and_in_bf16_it_is_none() -> None:
    """1,000 steps of a hundredth from 1.0 to 1.25 are 1.24999; in bf16 each rounds to no step."""
    target = torch.tensor([1.25], dtype=torch.bfloat16)
    ours, narrow = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    for _ in range(1000):
        ours = liti(ours, target, 0.01)
        narrow = narrow + 0.01 * (target - narrow)
    near(ours, [1.25 - 0.25 * 0.99**1000])
    near(ours, [1.24999], atol=5e-6)
    assert narrow.item() == 1.0


def test_merging_stored_bf16_rounds_once() -> None:
    draw = torch.Generator().manual_seed(3)
    start = torch.randn(4096, generator=draw).bfloat16()
    models = [(start.float() + 0.02 * torch.randn(4096, generator=draw)).bfloat16() for _ in range(2)]
    deltas = [task_vector(start, model) for model in models]
    found = slerp(gram(deltas), 0.5)
    exact = start.double() + sum(c * (m.double() - start.double()) for c, m in zip(found.shares, models, strict=True))
    assert torch.equal(combined(start, deltas, found.shares).bfloat16(), exact.bfloat16())
    narrow = start + sum(c * (model - start) for c, model in zip(found.shares, models, strict=True))  # the control
    assert narrow.dtype == torch.bfloat16 and not torch.equal(narrow, exact.bfloat16())


def test_dot_products_of_float32_weights_have_all_their_digits() -> None:
    """Of many small numbers and one large: a sum in 32 bits loses the small ones."""
    many = torch.cat([torch.full((1,), 4096.0), torch.full((20_000,), 1.0)])
    assert norms(gram([many]))[0] ** 2 == pytest.approx(4096.0**2 + 20_000, abs=1e-6)
    alone = torch.tensor(4096.0) ** 2  # the control: 32 bits, one after the other
    for _ in range(100):
        alone = alone + 1.0
    assert alone.item() == 4096.0**2


# 7: LITI


def test_liti_leads_from_the_start_to_the_merged_and_its_norm_is_linear() -> None:
    start, merged = (each.float() for each in vectors(2))
    assert torch.equal(liti(start, merged, 0.0).float(), start)
    assert torch.equal(liti(start, merged, 1.0).float(), merged)
    whole = task_vector(start, merged).norm()
    for eta in (0.1, 0.25, 0.3, 0.9):
        near((liti(start, merged, eta) - start.double()).norm(), eta * whole)
        turned = (1 - eta) * merged.double() + eta * start.double()  # the control: eta the wrong way round
        assert abs(float((turned - start.double()).norm() - eta * whole)) > 0.1


# 8: one group at a time


def test_what_happens_in_one_group_changes_no_other() -> None:
    """And an angle of all groups together, which mergers of whole models have, fails this."""
    groups = [vectors(2, seed=1), vectors(2, seed=2)]
    scaled = [groups[0], [10 * groups[1][0], groups[1][1]]]

    def one_by_one(all_groups: list[list[Tensor]]) -> Tensor:
        return by("slerp", all_groups[0])

    def all_at_once(all_groups: list[list[Tensor]]) -> Tensor:
        whole = [torch.cat([group[model] for group in all_groups]) for model in range(2)]
        return by("slerp", whole)[: len(all_groups[0][0])]

    assert torch.equal(one_by_one(groups), one_by_one(scaled))
    assert float((all_at_once(groups) - all_at_once(scaled)).abs().max()) > 1e-3


def test_a_group_in_pieces_is_the_group() -> None:
    deltas = vectors(3, 60)
    pieces = [gram([delta[at : at + 7] for delta in deltas]) for at in range(0, 60, 7)]
    near(torch.stack(pieces).sum(0), gram(deltas))
    found = angles(gram(deltas))
    assert len(found) == 3 and all(0 < each < math.pi for each in found if each is not None)
    assert angles(gram([deltas[0], torch.zeros(60, dtype=WIDE)])) == (None,)
    near(torch.tensor(angles(gram(apart(60.0))), dtype=WIDE), [math.pi / 3])

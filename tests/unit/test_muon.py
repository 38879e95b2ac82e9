"""Muon: against singular values taken apart (float64), and against torch's own, which rounds to bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minillm import muon
from minillm.muon import Muon, orthogonalised

SHAPES = [(6, 6), (4, 9), (9, 4), (1, 5)]


def by_singular_values(matrix: Tensor) -> Tensor:
    """The slow obvious twin: the quintic applied to each singular value, five times."""
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    a, b, c = muon.QUINTIC
    for _ in range(muon.ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_go_through_the_quintic(shape: tuple[int, int]) -> None:
    matrices = noise(3, *shape)
    got = orthogonalised(matrices)
    for matrix, mine in zip(matrices, got, strict=True):
        assert torch.allclose(mine, by_singular_values(matrix), atol=1e-10)


def test_another_quintic_is_another_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the comparison."""
    got = orthogonalised(noise(1, 6, 6))
    monkeypatch.setattr(muon, "QUINTIC", (3.4445, -4.7750, 2.0))
    assert not torch.allclose(got[0], by_singular_values(noise(1, 6, 6)[0]), atol=1e-3)


def test_singular_values_come_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalised(noise(4, 16, 64)))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3


def test_a_gradient_of_nothing_moves_nothing() -> None:
    assert torch.equal(orthogonalised(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def weights() -> list[nn.Parameter]:
    """Two of one shape, which are stepped together, and one by itself."""
    return [
        nn.Parameter(noise(*shape, seed=seed).float())
        for seed, shape in enumerate([(12, 8), (12, 8), (8, 24)], start=5)
    ]


def moves(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], *, steps: int = 3) -> list[Tensor]:
    parameters = weights()
    optimiser = make(parameters)
    for step in range(steps):
        for index, parameter in enumerate(parameters):
            parameter.grad = noise(*parameter.shape, seed=100 * step + index).float()
        optimiser.step()
    return [parameter.detach() - start.detach() for parameter, start in zip(parameters, weights(), strict=True)]


def gap(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest relative difference of two lists of moves."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


def torchs(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(parameters, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")


def ours(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Muon(parameters, lr=1e-2, weight_decay=0.3)


def test_steps_are_those_of_torchs_own_to_its_rounding() -> None:
    assert 0.0 < gap(moves(ours), moves(torchs)) < 0.02


def test_another_momentum_decay_or_size_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: each part of a step, changed, is further away than rounding is."""
    assert gap(moves(lambda p: Muon(p, lr=1e-2, weight_decay=0.0)), moves(torchs)) > 0.02
    assert gap(moves(lambda p: Muon(p, lr=1.1e-2, weight_decay=0.3)), moves(torchs)) > 0.05
    monkeypatch.setattr(muon, "MOMENTUM", 0.8)
    assert gap(moves(ours), moves(torchs)) > 0.05


def test_matrices_of_one_shape_do_not_mix() -> None:
    """Stepped together or each by itself: the same."""
    together = moves(ours)
    for index in range(3):
        alone = moves(lambda parameters, index=index: ours([parameters[index]]))  # type: ignore[misc]
        assert torch.allclose(alone[index], together[index], atol=1e-6)
        assert all(torch.equal(move, torch.zeros_like(move)) for i, move in enumerate(alone) if i != index)


def test_a_matrix_without_a_gradient_stays() -> None:
    parameters = weights()
    parameters[0].grad = torch.ones_like(parameters[0])
    before = [parameter.detach().clone() for parameter in parameters]
    ours(parameters).step()
    assert [torch.equal(a, b) for a, b in zip(parameters, before, strict=True)] == [False, True, True]

"""Ridge regression with every fold predicted from the others: against least squares written out, and what it ignores.

Legend: N tokens, D features, F folds.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm.errors import ShapeMismatch
from minillm.ridge import FOLDS, cross_fitted, projected
from tests.exact.tabular import assert_close


def tokens(seed: int = 0, *, count: int = 60, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features, targets that follow them with noise, and folds."""
    noise = torch.Generator().manual_seed(seed)
    features_ND = (
        torch.randn(count, width, generator=noise, dtype=torch.float64) * torch.logspace(-2, 3, width).double()
    )
    target_N = features_ND @ torch.linspace(-1, 1, width).double() + 3.0
    target_N += torch.randn(count, generator=noise, dtype=torch.float64)
    return features_ND, target_N, torch.randint(0, FOLDS, (count,), generator=noise)


def slow(features_ND: Tensor, target_N: Tensor, fold_N: Tensor, *, strength: float) -> Tensor:
    """Least squares with a row of its own for each penalty, on standardised features."""
    result_N = torch.zeros_like(target_N)
    for fold in range(FOLDS):
        train_N = fold_N != fold
        mean_D, spread_D = features_ND[train_N].mean(0), features_ND[train_N].std(0, correction=0)
        x_ND, y_N = (features_ND[train_N] - mean_D) / spread_D, target_N[train_N]
        penalties_DD = (strength * x_ND.shape[1]) ** 0.5 * torch.eye(x_ND.shape[1], dtype=x_ND.dtype)
        rows = torch.cat([x_ND, penalties_DD]), torch.cat([y_N - y_N.mean(), torch.zeros_like(penalties_DD[0])])
        slope_D = torch.linalg.lstsq(rows[0], rows[1][:, None]).solution[:, 0]
        result_N[~train_N] = y_N.mean() + (features_ND[~train_N] - mean_D) / spread_D @ slope_D
    return result_N


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_it_is_penalised_least_squares_on_the_other_folds(strength: float) -> None:
    for seed in range(4):
        features_ND, target_N, fold_N = tokens(seed)
        got_N = cross_fitted(features_ND, target_N, fold_N, strength=strength)
        assert_close(got_N, slow(features_ND, target_N, fold_N, strength=strength), atol=1e-8)


def test_a_fit_that_saw_the_row_itself_is_noticed() -> None:
    """Negative control: every token once more in another fold, so that each is predicted by a fit on itself."""
    features_ND, target_N, fold_N = tokens()
    twice_N = cross_fitted(
        features_ND.repeat(2, 1), target_N.repeat(2), torch.cat([fold_N, (fold_N + 1) % FOLDS]), strength=1.0
    )
    with pytest.raises(AssertionError):
        assert_close(twice_N[: len(target_N)], slow(features_ND, target_N, fold_N, strength=1.0), atol=1e-3)


def test_a_row_has_no_say_in_its_own_prediction() -> None:
    """Changing what happens in one fold moves no prediction there, to the last bit."""
    features_ND, target_N, fold_N = tokens()
    want_N = cross_fitted(features_ND, target_N, fold_N)
    mine_N = fold_N == 2
    got_N = cross_fitted(features_ND, torch.where(mine_N, 1e6 * target_N, target_N), fold_N)
    assert torch.equal(got_N[mine_N], want_N[mine_N])
    assert not torch.equal(got_N[~mine_N], want_N[~mine_N])


def test_ranks_fit_together() -> None:
    """Sums of both halves make the fit of the whole."""
    features_ND, target_N, fold_N = tokens()
    seen: list[Tensor] = []
    want_N = cross_fitted(features_ND, target_N, fold_N, total=lambda sums: (seen.append(sums), sums)[1])
    for rows in (slice(0, 20), slice(20, 60)):
        replies = iter(seen)
        got_N = cross_fitted(
            features_ND[rows], target_N[rows], fold_N[rows], total=lambda _, replies=replies: next(replies)
        )  # type: ignore[misc]
        assert_close(got_N, want_N[rows])


def test_features_that_say_nothing_change_nothing() -> None:
    features_ND, target_N, fold_N = tokens()
    constant_ND = torch.cat([features_ND, torch.full((60, 2), 7.3, dtype=torch.float64)], dim=1)
    strength = 0.5
    got_N = cross_fitted(constant_ND, target_N, fold_N, strength=strength * 5 / 7)  # the penalty counts features
    assert_close(got_N, cross_fitted(features_ND, target_N, fold_N, strength=strength), atol=1e-8)


def test_without_other_folds_the_prediction_is_zero() -> None:
    features_ND, target_N, _ = tokens()
    one_N = torch.ones(60, dtype=torch.long)
    assert torch.equal(cross_fitted(features_ND, target_N, one_N), torch.zeros_like(target_N))
    nobody = cross_fitted(features_ND[:0], target_N[:0], one_N[:0])
    assert nobody.shape == (0,)


def test_fewer_tokens_than_features_are_enough() -> None:
    features_ND, target_N, fold_N = tokens(count=12, width=40)
    assert bool(cross_fitted(features_ND, target_N, fold_N).isfinite().all())


def test_wide_states_are_projected_the_same_way_everywhere() -> None:
    noise = torch.Generator().manual_seed(1)
    wide_NH = torch.randn(7, 300, generator=noise)
    assert torch.equal(projected(wide_NH[:, :256]), wide_NH[:, :256])
    few_NP = projected(wide_NH, widest=256)
    assert few_NP.shape == (7, 256) and few_NP.dtype == wide_NH.dtype
    assert torch.equal(projected(wide_NH), few_NP)
    lengths = few_NP.norm(dim=1) / wide_NH.norm(dim=1)
    assert 0.7 < float(lengths.mean()) < 1.2


def test_other_shapes_are_refused() -> None:
    features_ND, target_N, fold_N = tokens()
    with pytest.raises(ShapeMismatch, match="targets"):
        cross_fitted(features_ND, target_N[:-1], fold_N)
    with pytest.raises(ShapeMismatch, match="folds"):
        cross_fitted(features_ND, target_N, fold_N[:-1])

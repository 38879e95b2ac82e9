"""The cache that grows in place holds what transformers' own holds, copies rarely, and never changes what it gave out.

Legend: B rows, K heads, S new positions, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache

from minillm import cache as cache_module
from minillm.cache import GrowingLayer, growing_cache
from tests import tiny

SIZES = (5, 1, 1, 70, 1, 64, 1, 1, 300, 1)
"""New positions of each forward: within the spare room, just beyond it and far beyond it."""


def states(seed: int, *, rows: int, positions: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, 2, positions, width, generator=noise) for width in (3, 4))
    return keys, values


def play(cache: Cache, *, rows: int = 6) -> list[tuple[Tensor, ...]]:
    """Everything that two layers give out over some forwards, with rows taken out twice."""
    given = []
    for step, positions in enumerate(SIZES):
        if step in {3, 6}:
            cache.batch_select_indices(torch.arange(rows - 1, 0, -1))
            rows -= 1
        for layer in range(2):
            given.append(cache.update(*states(10 * step + layer, rows=rows, positions=positions), layer))
        assert cache.get_seq_length() == sum(SIZES[: step + 1])
        assert cache.get_mask_sizes(3, 0) == (sum(SIZES[: step + 1]) + 3, 0)
    return given


def same(one: list[tuple[Tensor, ...]], other: list[tuple[Tensor, ...]]) -> bool:
    return all(
        torch.equal(a, b) for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)
    )


def test_it_gives_out_what_transformers_cache_does_and_never_changes_it_later() -> None:
    assert same(play(growing_cache()), play(DynamicCache()))


@pytest.mark.parametrize("fault", ["late", "unordered", "in place"])
def test_a_cache_that_is_wrong_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that loses the last position; rows that stay where they were; room that is used again for other rows."""
    copy: Callable[..., Tensor] = cache_module._wider
    if fault == "late":
        monkeypatch.setattr(
            cache_module,
            "_wider",
            # Overwritten, not left out: new memory may happen to hold what is left out.
            lambda room, *, held, wanted: copy(room, held=held, wanted=wanted).index_fill_(
                2, torch.arange(max(held - 1, 0), held), 7.0
            ),
        )
    elif fault == "unordered":
        monkeypatch.setattr(
            GrowingLayer, "batch_select_indices",
            lambda self, indices: setattr(self, "_key_room", self._key_room[: len(indices)])
            or setattr(self, "_value_room", self._value_room[: len(indices)]),
        )  # fmt: skip
    else:
        monkeypatch.setattr(GrowingLayer, "_show", lambda self, held: self.__dict__.update(
            _held=held, keys=self._key_room[:, :, :held].mul_(1.001), values=self._value_room[:, :, :held]
        ))  # fmt: skip
    assert not same(play(growing_cache()), play(DynamicCache()))


def test_a_token_at_a_time_copies_only_when_the_room_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    copy: Callable[..., Tensor] = cache_module._wider
    monkeypatch.setattr(cache_module, "_wider", lambda room, **how: copies.append(how["wanted"]) or copy(room, **how))
    layer = GrowingLayer()
    for step in range(1000):
        layer.update(*states(step, rows=1, positions=1))
    assert layer.get_seq_length() == 1000
    assert len(copies) <= 2 * 12, copies  # of keys and of values


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_says_the_same_with_either_cache(family: str, tmp_path: object) -> None:
    folder = tiny.save_model(tmp_path / "m", family, seed=3)  # type: ignore[operator]
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    ids_BL = torch.randint(2, 20, (4, 24), generator=torch.Generator().manual_seed(1))
    mask_BL = torch.arange(24) >= torch.tensor([[0], [3], [7], [1]])
    found = []
    for cache in (growing_cache(), DynamicCache()):
        rows, said = torch.arange(4), []
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, 20), (20, 24)):
            if start == 10:
                rows = torch.tensor([3, 1])
                cache.batch_select_indices(rows)
            position_RL = (mask_BL[rows, :stop].long().cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                said.append(
                    model(
                        input_ids=ids_BL[rows, start:stop], attention_mask=mask_BL[rows, :stop].long(),
                        position_ids=position_RL[:, start:], past_key_values=cache, use_cache=True,
                    ).logits[mask_BL[rows, start:stop]]
                )  # fmt: skip
        found.append(torch.cat(said))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)

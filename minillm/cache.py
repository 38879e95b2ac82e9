"""A key-value cache that grows in place: a token is written into spare room, and what attention reads is a view.

transformers' own cache concatenates at every token, which copies the whole cache each time. This one keeps room for
more tokens than it holds and copies only when that is used up: about log(T) times in T tokens.

Legend: B rows, K key-value heads, S new positions, C positions there is room for, D width of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

LEAST_SPARE = 64
"""Positions of spare room at least."""
SPARE_SHARE = 4
"""Spare room is 1/4 of what is held: memory beyond what is needed against copies."""


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one attention layer, every position kept (a sliding window is a matter of the mask)."""

    is_sliding = False
    is_croppable = False
    keys: Tensor | None
    """[B, K, positions held, D], a view of the room; so are the values."""
    values: Tensor | None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for the first positions, of the dtype and on the device of these states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._held = 0
        self._key_room = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self._value_room = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds S positions [B, K, S, D] and returns all that are held, as views that later tokens do not change."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, total = self._held, self._held + key_states.shape[2]
        if total > self._key_room.shape[2]:
            self._key_room, self._value_room = (
                _wider(room, held=held, wanted=total) for room in (self._key_room, self._value_room)
            )
        self._key_room[:, :, held:total] = key_states
        self._value_room[:, :, held:total] = value_states
        self._show(total)
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(Positions that a forward of ``query_length`` more attends to, position of the first of them)."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Positions held."""
        return self._held if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only these rows, in this order."""
        if self.is_initialized:
            self._key_room, self._value_room = (
                room.index_select(0, indices) for room in (self._key_room, self._value_room)
            )
            self._show(self._held)

    def _show(self, held: int) -> None:
        self._held = held
        self.keys, self.values = self._key_room[:, :, :held], self._value_room[:, :, :held]


def growing_cache() -> Cache:
    """An empty cache for any model whose layers all attend."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def _wider(room_BKCD: Tensor, *, held: int, wanted: int) -> Tensor:
    """New room for ``wanted`` positions and some more, with what is held in it."""
    rows, heads, _, width = room_BKCD.shape
    new = room_BKCD.new_empty(rows, heads, wanted + max(LEAST_SPARE, wanted // SPARE_SHARE), width)
    new[:, :, :held] = room_BKCD[:, :, :held]
    return new

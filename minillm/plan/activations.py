"""What a training forward keeps for its backward pass, counted on a model without weights.

Legend: R lines, W the length of a line (``packing``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from minillm.meta_models import meta_model

_LINE = 97
"""Tokens of the line that is counted; no width of a model, or states would be taken for attention's matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Bytes for each token of a line."""

    layer: int
    """What one layer keeps."""
    outside: int
    """What is kept outside of the layers: embeddings, final norm."""
    entry: int
    """The state that enters a layer: all that is kept of it where activations are recomputed."""
    widest: int
    """The largest single tensor of a layer."""
    matrices: int
    """What a layer keeps besides for each token and each token of its line: the mask, or attention's matrices."""


def kept_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> Kept:
    """Counted on models of one layer and of two, by their saved tensors; each storage once, weights left out.

    Fused attention, which most architectures have, keeps its inputs, its output and the mask of the line as numbers.
    """
    one, two = _saved(_with_layers(config, 1), dtype), _saved(_with_layers(config, 2), dtype)
    layer = two.states - one.states
    return Kept(
        layer=layer // _LINE,
        outside=max(0, one.states - layer) // _LINE,
        entry=int(config.get_text_config().hidden_size) * dtype.itemsize,
        widest=one.widest // _LINE,
        matrices=(two.matrices - one.matrices) // _LINE**2,
    )


class _Saved(NamedTuple):
    states: int
    matrices: int
    widest: int


def _with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    less = copy.deepcopy(config)
    kinds: Sequence[str] | None = getattr(less, "layer_types", None)
    less.num_hidden_layers = layers
    if kinds is not None:
        less.layer_types = [*kinds][:1] * layers
    return less


def _saved(config: PreTrainedConfig, dtype: torch.dtype) -> _Saved:
    """Bytes kept for backward of a forward over one line."""
    model: nn.Module = meta_model(config)
    backbone: nn.Module = model.to(dtype).base_model.eval()  # type: ignore[union-attr]
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(1, _LINE, dtype=torch.int64, device="meta"),
        "position_ids": torch.zeros(1, _LINE, dtype=torch.int64, device="meta"),
        "attention_mask": torch.ones(1, 1, _LINE, _LINE, dtype=torch.bool, device="meta"),
        "use_cache": False,
    }
    fused = torch.nn.functional.scaled_dot_product_attention
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.nn.functional.scaled_dot_product_attention = _fused  # type: ignore[assignment]
        try:
            backbone(**inputs)
        finally:
            torch.nn.functional.scaled_dot_product_attention = fused
    sizes = {True: 0, False: 0}
    widest = 0
    for tensor in found.values():
        square, size = tensor.shape[-2:] == (_LINE, _LINE), tensor.untyped_storage().nbytes()
        sizes[square] += size
        widest = max(widest, 0 if square else size)
    return _Saved(states=sizes[False], matrices=sizes[True], widest=widest)


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    """In place of torch's own, which on no device takes attention apart."""
    out: Tensor = _Fused.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
    return out


class _Fused(torch.autograd.Function):
    """Fused attention as far as memory goes: what it saves, and no numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, tokens, _ = query.shape
        # Tokens before heads, as fused kernels lay it out: putting the heads together again copies nothing.
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # True and false become numbers to add, in each layer again.
        bias = None if mask is None else query.new_empty(mask.shape)
        ctx.save_for_backward(query, key, value, out, sums, bias)
        return out

"""Readers for tests of the decode loop: a language model that is a table, tiny transformers models, and a recorder.

Legend: B rows, L positions in the attention mask, S new positions, N rows, H hidden width, V ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from minillm.types import PromptBatch
from tests.tiny import SIZES

FAMILIES = ("gpt2", "opt", "llama", "qwen2")
VOCABULARY = 19
EOS, PAD = 1, 1
"""The pad is the EOS, as with GPT-2: a mask made from ids would go wrong."""

_EXTRA = {
    "gpt2": {"n_positions": 64, "tie_word_embeddings": False},
    "opt": {"max_position_embeddings": 64, "tie_word_embeddings": False},
    "llama": {"max_position_embeddings": 64},
    "qwen2": {"max_position_embeddings": 64, "intermediate_size": 24, "tie_word_embeddings": False},
}


@functools.cache
def _model(family: str, seed: int, sharpness: float) -> Any:
    """Made once for all readers of it, which only read."""
    sizes = {**SIZES[family], **_EXTRA[family]}
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, bos_token_id=EOS, eos_token_id=EOS, pad_token_id=PAD, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).double().eval()
        for weight in model.parameters():  # the usual 0.02 would make every next token nearly uniform
            if weight.dim() > 1:
                weight.data.normal_(std=sharpness)
            else:  # biases and norms, so that none of them is 0 or 1 exactly
                weight.data.add_(torch.randn_like(weight), alpha=0.1)
    return model


class TinyReader:
    """A ``reading.Reader`` over a tiny transformers model in float64, random weights of a seed."""

    def __init__(self, family: str, *, seed: int, lockstep: bool = False, sharpness: float = 0.5) -> None:
        self.model = _model(family, seed, sharpness)
        self.device = torch.device("cpu")
        self.lockstep = lockstep

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: DynamicCache | None) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache() if cache is None else cache
        position_BL = (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
        output = self.model.base_model(
            input_ids=ids_BS,
            attention_mask=mask_BL.long(),
            position_ids=position_BL[:, -ids_BS.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, output.past_key_values

    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.extend(ids_BL, mask_BL, None)[0] * mask_BL[:, :, None]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(hidden_NH)
        return logits

    def select_rows(self, cache: DynamicCache, index: Tensor) -> DynamicCache:
        cache.batch_select_indices(index)
        return cache


class TableReader:
    """A language model that is a list: the logits after every response prefix of up to ``depth`` tokens.

    A prompt is one token; it leads to the root, node 0, and token v after node n to node n V + v + 1. The hidden state
    of a position is the number of its node (H = 1), so a test can see which prefix a state belongs to.
    """

    def __init__(self, *, vocabulary: int, depth: int, seed: int, lockstep: bool = False) -> None:
        nodes = sum(vocabulary**n for n in range(depth))
        noise = torch.Generator().manual_seed(seed)
        self.table_XV = 1.5 * torch.randn(nodes, vocabulary, generator=noise, dtype=torch.float64)
        self.device = torch.device("cpu")
        self.lockstep = lockstep

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        new_BS = mask_BL[:, -ids_BS.shape[1] :]
        node_B = torch.full((len(ids_BS),), -1) if cache is None else cache
        nodes = []
        for ids_B, real_B in zip(ids_BS.unbind(1), new_BS.unbind(1), strict=True):
            child_B = torch.where(node_B < 0, 0, node_B * self.table_XV.shape[1] + ids_B + 1)
            node_B = torch.where(real_B, child_B, node_B)
            nodes.append(node_B)
        return torch.stack(nodes, dim=1)[:, :, None].double(), node_B

    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return self.extend(ids_BL, mask_BL, None)[0] * mask_BL[:, :, None]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        return self.table_XV[hidden_NH[:, 0].long().clamp(0, len(self.table_XV) - 1)]

    def select_rows(self, cache: Tensor, index: Tensor) -> Tensor:
        return cache[index]


class Recorder:
    """Any reader, with ``told`` called with the name of each call that ranks in lockstep must share."""

    def __init__(self, reader: Any, told: Callable[[str], None], *, name: str, lockstep: bool | None = None) -> None:
        self.reader, self.told, self.name = reader, told, name
        self.device = reader.device
        self.lockstep = reader.lockstep if lockstep is None else lockstep

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Any) -> tuple[Tensor, Any]:
        assert ids_BS.numel() > 0 and mask_BL.shape[1] >= ids_BS.shape[1]
        self.told(f"{self.name}.extend")
        hidden_BSH, cache = self.reader.extend(ids_BS, mask_BL, cache)
        return hidden_BSH, cache

    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        assert ids_BL.numel() > 0 and mask_BL.shape == ids_BL.shape
        self.told(f"{self.name}.read")
        hidden_BLH: Tensor = self.reader.read(ids_BL, mask_BL)
        return hidden_BLH

    def logits(self, hidden_NH: Tensor) -> Tensor:
        self.told(f"{self.name}.logits")
        logits_NV: Tensor = self.reader.logits(hidden_NH)
        return logits_NV

    def select_rows(self, cache: Any, index: Tensor) -> Any:
        return self.reader.select_rows(cache, index)


def batch_of(
    prompts: Sequence[tuple[int, ...]], *, uids: Sequence[str], samples: Sequence[int] | None = None
) -> PromptBatch:
    """Prompts left-padded side by side, the mask from their lengths."""
    width = max((len(prompt) for prompt in prompts), default=1)
    ids_BP = torch.full((len(prompts), width), PAD)
    mask_BP = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids_BP[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BP[row, width - len(prompt) :] = True
    sample_B = tuple(samples) if samples is not None else (0,) * len(prompts)
    return PromptBatch(uid_B=tuple(uids), sample_B=sample_B, ids_BP=ids_BP, mask_BP=mask_BP)


def some_prompts(count: int, *, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of 1 to 7 ids, pad and EOS among them, at the ends too."""
    noise = torch.Generator().manual_seed(seed)
    length_B = torch.randint(1, 8, (count,), generator=noise).tolist()
    prompts = [tuple(torch.randint(0, VOCABULARY, (length,), generator=noise).tolist()) for length in length_B]
    return [(*prompt[:-1], EOS) if row % 3 == 0 else prompt for row, prompt in enumerate(prompts)]

"""Models of four families: what a batch of left-padded rows says, row by row and token by token.

Legend: B rows, L positions, S new positions, N tokens, V ids.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from minillm.batches import prompt_batch
from minillm.models import CausalLM, ModelReader
from minillm.probes import probe_packing
from minillm.selftest.check import Check, Found, device, gap, worst
from minillm.selftest.tiny import FAMILIES, tiny
from minillm.types import Prompt

LENGTHS = (9, 2, 6)
LAST = 3
"""Tokens of each batch that are read one by one, after the cache holds the others."""


def rows_of(eos: int) -> list[Prompt]:
    """Three texts, one of which begins with the end-of-text id and holds the pad id."""
    texts = [tuple(5 + 7 * (n + 3 * row) % 200 for n in range(length)) for row, length in enumerate(LENGTHS)]
    texts[2] = (eos, 0, *texts[2][2:])
    return [Prompt(uid=str(row), text="", ids=ids) for row, ids in enumerate(texts)]


@torch.no_grad()
def alignment(family: str) -> Found:
    """Log-probabilities after every token of a left-padded batch, read whole, through a cache and packed, are those of
    transformers' own forward of each row by itself."""
    made, at = tiny(family), device()
    model = made.load(seed=1).eval().to(at)
    root, rows = CausalLM(model), rows_of(made.eos)
    reader = ModelReader(root, device=at, lockstep=False)
    want_NV = torch.cat([model(torch.tensor([row.ids], device=at)).logits[0] for row in rows]).log_softmax(-1)
    batch = prompt_batch(rows, [0] * len(rows), pad_id=0, device=at)
    found = [by_cache(reader, batch.ids_BP, batch.mask_BP), torch.cat([by_token(reader, row) for row in rows])]
    found.append(reader.read(batch.ids_BP, batch.mask_BP)[batch.mask_BP])
    probe_packing(root, name=family)
    assert root.packs != "no", "rows of this family are packed"
    found.append(reader.read(batch.ids_BP, batch.mask_BP)[batch.mask_BP])
    return Found(worst(*(gap(reader.logits(hidden_NH).log_softmax(-1), want_NV) for hidden_NH in found)), 1e-5)


def by_cache(reader: ModelReader, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """States of the kept tokens, [N, H]: most read at once, the last ones one by one."""
    first = ids_BL.shape[1] - LAST
    hidden_BSH, cache = reader.extend(ids_BL[:, :first], mask_BL[:, :first], None)
    states = [hidden_BSH]
    for t in range(first, ids_BL.shape[1]):
        hidden_BSH, cache = reader.extend(ids_BL[:, t : t + 1], mask_BL[:, : t + 1], cache)
        states.append(hidden_BSH)
    return torch.cat(states, dim=1)[mask_BL]


def by_token(reader: ModelReader, row: Prompt) -> Tensor:
    """States of one row by itself, one token at a time, without padding, [S, H]."""
    cache, states = None, []
    ids_1L = torch.tensor([row.ids], device=reader.device)
    for t in range(len(row.ids)):
        hidden_1SH, cache = reader.extend(ids_1L[:, t : t + 1], torch.ones_like(ids_1L[:, : t + 1]).bool(), cache)
        states.append(hidden_1SH[0])
    return torch.cat(states)


CHECKS = tuple(
    Check(name=f"models: {family}, batch against rows", run=partial(alignment, family)) for family in FAMILIES
)

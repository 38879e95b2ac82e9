"""Prompts side by side as tensors: left-padded to be continued, right-padded to be learnt from.

Legend: B rows, P prompt positions (left-padded), L positions of prompt and response (right-padded). Masks
come from lengths, never from ids: the pad id may also be a real token (GPT-2 pads with its EOS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.types import Example, Prompt, PromptBatch, require_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleBatch:
    """Prompts with their reference responses, right-padded.

    Example: prompt ids (5, 6), response ids (7, 2) beside a longer row give ids [5, 6, 7, 2, pad], mask
    [1, 1, 1, 1, 0] and target [0, 0, 1, 1, 0].
    """

    uid_B: tuple[str, ...]
    ids_BL: Tensor
    mask_BL: Tensor
    """True on every real token."""
    target_BL: Tensor
    """True on response tokens, the closing EOS included: the token *at* this column is to be predicted."""

    def __post_init__(self) -> None:
        shape = tuple(self.ids_BL.shape)
        require_shape("example mask", self.mask_BL, shape)
        require_shape("example targets", self.target_BL, shape)
        require_shape("example rows", self.uid_B, shape[:1])


def prompt_batch(
    prompts: Sequence[Prompt], samples: Sequence[int], *, pad_id: int, device: torch.device | str
) -> PromptBatch:
    """The prompts left-padded to the longest of them; ``samples`` says which sample of its prompt each row is.

    A rank that has no row gets a batch of none, one column wide.
    """
    ids_BP, mask_BP = _padded([prompt.ids for prompt in prompts], pad_id=pad_id, left=True)
    return PromptBatch(
        uid_B=tuple(prompt.uid for prompt in prompts),
        sample_B=tuple(samples),
        ids_BP=ids_BP.to(device),
        mask_BP=mask_BP.to(device),
    )


def example_batch(rows: Sequence[Example], *, pad_id: int, device: torch.device | str) -> ExampleBatch:
    """What is read and what is learnt of each row in one right-padded tensor; every row must have ``response_ids``."""
    assert len(rows) > 0, "a batch needs at least one row"
    bare = [row.uid for row in rows if not row.response_ids]
    assert not bare, f"rows without response ids cannot be learnt from: {bare[:3]}"
    ids_BL, mask_BL = _padded([row.ids + row.response_ids for row in rows], pad_id=pad_id, left=False)
    prompt_length_B1 = torch.tensor([[len(row.ids)] for row in rows])
    target_BL = mask_BL & (torch.arange(ids_BL.shape[1]) >= prompt_length_B1)
    return ExampleBatch(
        uid_B=tuple(row.uid for row in rows),
        ids_BL=ids_BL.to(device),
        mask_BL=mask_BL.to(device),
        target_BL=target_BL.to(device),
    )


def _padded(rows: Sequence[tuple[int, ...]], *, pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    """int64 ids and their mask, both ``[rows, longest row]``, on the CPU."""
    longest = max((len(row) for row in rows), default=1)
    # Padded as lists: writing a row at a time into a tensor takes ten times as long.
    pads = [[pad_id] * (longest - len(row)) for row in rows]
    lines = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads, strict=True)]
    ids_BL = torch.tensor(lines, dtype=torch.int64).reshape(len(rows), longest)
    length_B1 = torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]
    column_L = torch.arange(longest)
    return ids_BL, column_L >= longest - length_B1 if left else column_L < length_B1

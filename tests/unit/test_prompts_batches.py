"""Prompts as tensors. Masks come from lengths: a prompt may hold the pad id, the EOS id, or nothing else."""

from __future__ import annotations

import pytest
import torch

from minillm.batches import ExampleBatch, example_batch, prompt_batch
from minillm.errors import ShapeMismatch
from minillm.types import Prompt

PAD = EOS = 2  # as with GPT-2


def prompt(uid: str, ids: tuple[int, ...], response: tuple[int, ...] = ()) -> Prompt:
    return Prompt(uid=uid, text=uid, ids=ids, response_ids=response)


def test_prompts_are_padded_on_the_left() -> None:
    batch = prompt_batch([prompt("x", (5,)), prompt("y", (6, 7, 8))], [0, 1], pad_id=PAD, device="cpu")
    assert (batch.uid_B, batch.sample_B) == (("x", "y"), (0, 1))
    assert batch.ids_BP.tolist() == [[PAD, PAD, 5], [6, 7, 8]] and batch.ids_BP.dtype == torch.int64
    assert batch.mask_BP.tolist() == [[False, False, True], [True] * 3] and batch.mask_BP.dtype == torch.bool


def test_examples_are_padded_on_the_right_and_only_responses_are_targets() -> None:
    batch = example_batch([prompt("x", (5, 6), (7, EOS)), prompt("y", (5,), (8, 9, 9, EOS))], pad_id=PAD, device="cpu")
    assert batch.uid_B == ("x", "y")
    assert batch.ids_BL.tolist() == [[5, 6, 7, EOS, PAD], [5, 8, 9, 9, EOS]]
    assert batch.mask_BL.tolist() == [[True, True, True, True, False], [True] * 5]
    assert batch.target_BL.tolist() == [[False, False, True, True, False], [False, True, True, True, True]]


def test_pad_and_eos_ids_inside_a_prompt_are_not_masked() -> None:
    rows = [prompt("x", (PAD, 5, PAD), (7, EOS)), prompt("y", (PAD, PAD), (EOS,))]
    prompts = prompt_batch(rows, [0, 0], pad_id=PAD, device="cpu")
    examples = example_batch(rows, pad_id=PAD, device="cpu")
    assert prompts.mask_BP.sum(1).tolist() == [3, 2]
    assert examples.mask_BL.sum(1).tolist() == [5, 3]
    assert examples.target_BL.sum(1).tolist() == [2, 1]
    # The control: the mask that the ids alone would give is another one.
    assert not torch.equal(prompts.ids_BP != PAD, prompts.mask_BP)
    assert not torch.equal(examples.ids_BL != PAD, examples.mask_BL)


def test_a_longer_mate_changes_only_the_padding() -> None:
    row, long = prompt("x", (5, 6), (7, EOS)), prompt("y", (3,) * 20, (4,) * 20)
    alone, beside = (example_batch(rows, pad_id=PAD, device="cpu") for rows in ([row], [row, long]))
    for name in ("ids_BL", "mask_BL", "target_BL"):
        assert torch.equal(getattr(beside, name)[0, :4], getattr(alone, name)[0])
    assert not beside.mask_BL[0, 4:].any() and not beside.target_BL[0, 4:].any()


def test_a_row_without_a_response_is_our_fault() -> None:
    with pytest.raises(AssertionError, match="rows without response ids"):
        example_batch([prompt("x", (5,))], pad_id=PAD, device="cpu")


def test_tensors_of_different_shapes_are_refused() -> None:
    ids_BL = torch.zeros(2, 3, dtype=torch.int64)
    mask_BL = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ShapeMismatch, match="example targets"):
        ExampleBatch(uid_B=("x", "y"), ids_BL=ids_BL, mask_BL=mask_BL, target_BL=mask_BL[:, :2])

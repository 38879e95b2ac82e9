"""Where responses end: EOS counted once, the limit, empty responses, and prompts that hold EOS and pad ids."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from minillm.decode import roll_out
from minillm.types import Decoding, DrawKey, Purpose, Rollout, Stop
from tests.readers import TableReader, TinyReader, batch_of

EOS, OTHER_EOS, PAD = 1, 4, 1
KEY = DrawKey(seed=0, stage="minillm", purpose=Purpose.TOKEN, rollout=0)


class Scripted(TableReader):
    """Says a fixed text after each prompt: the hidden state counts response tokens, and holds the prompt's last id."""

    SCRIPTS: ClassVar = {
        2: [5, 6, EOS, 7, 7, 7],
        3: [EOS, 5, 5, 5, 5, 5],
        EOS: [5, 5, 5, 5, 5, 5],
        6: [6, 6, OTHER_EOS, 6, 6, 6],
    }

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: Tensor | None) -> tuple[Tensor, Tensor]:
        state_B2 = torch.zeros(len(ids_BS), 2, dtype=torch.long) if cache is None else cache
        if cache is None:
            state_B2[:, 1] = ids_BS[:, -1]  # left padding: the last id is the prompt's own
        else:
            state_B2 = state_B2 + torch.tensor([ids_BS.shape[1], 0])
        return state_B2[:, None].expand(-1, ids_BS.shape[1], -1).double(), state_B2

    def logits(self, hidden_NH: Tensor) -> Tensor:
        logits_NV = torch.full((len(hidden_NH), 8), -torch.inf)
        for row, (count, last) in enumerate(hidden_NH.long().tolist()):
            logits_NV[row, self.SCRIPTS[last][count]] = 0.0
        return logits_NV


def say(limit: int = 6, *, eos_ids: tuple[int, ...] = (EOS,), drop: bool = True) -> Rollout:
    return roll_out(
        batch_of([(2,), (5, PAD, 3), (EOS, PAD, EOS, EOS), (EOS, 6)], uids=["a", "b", "c", "d"]),
        student=Scripted(vocabulary=8, depth=1, seed=0),
        decoding=Decoding(max_new_tokens=limit),
        key=KEY,
        eos_ids=eos_ids,
        pad_id=PAD,
        drop_finished=drop,
    )


@pytest.mark.parametrize("drop", [True, False])
def test_the_first_sampled_eos_counts_once_and_nothing_after_it(drop: bool) -> None:
    """Also where the prompt holds or ends with EOS and pad ids: they end nothing."""
    got = say(drop=drop)
    assert got.response_BT.tolist() == [
        [5, 6, EOS, PAD, PAD, PAD],
        [EOS, PAD, PAD, PAD, PAD, PAD],
        [5, 5, 5, 5, 5, 5],
        [6, 6, OTHER_EOS, 6, 6, 6],
    ]
    assert got.mask_BT.sum(dim=1).tolist() == got.length_B.tolist() == [3, 1, 6, 6]
    assert got.mask_BT.tolist() == [[t < n for t in range(6)] for n in (3, 1, 6, 6)]
    assert got.stop_B == (Stop.EOS, Stop.EMPTY, Stop.LENGTH, Stop.LENGTH)
    assert got.prompts.mask_BP.sum(dim=1).tolist() == [1, 3, 4, 2]


def test_a_mask_made_from_ids_would_lose_the_eos() -> None:
    """Negative control: the pad is the EOS here."""
    got = say()
    assert not torch.equal(got.response_BT != PAD, got.mask_BT)


def test_an_unfinished_response_counts_every_token_and_an_eos_at_the_limit_is_an_eos() -> None:
    got = say(3)
    assert got.length_B.tolist() == [3, 1, 3, 3]
    assert got.stop_B == (Stop.EOS, Stop.EMPTY, Stop.LENGTH, Stop.LENGTH)
    assert say(2).stop_B == (Stop.LENGTH, Stop.EMPTY, Stop.LENGTH, Stop.LENGTH)
    assert say(1).stop_B[1] is Stop.EMPTY and say(1).mask_BT.shape == (4, 1)


def test_any_of_several_eos_ids_ends_a_response_and_none_ends_none() -> None:
    got = say(eos_ids=(EOS, OTHER_EOS))
    assert got.stop_B == (Stop.EOS, Stop.EMPTY, Stop.LENGTH, Stop.EOS)
    assert got.length_B.tolist() == [3, 1, 6, 3]
    assert say(eos_ids=()).stop_B == (Stop.LENGTH,) * 4


def test_responses_are_as_wide_as_the_longest_of_them() -> None:
    got = roll_out(
        batch_of([(2,), (3,)], uids=["a", "b"]),
        student=Scripted(vocabulary=8, depth=1, seed=0),
        decoding=Decoding(max_new_tokens=6),
        key=KEY,
        eos_ids=(EOS,),
        pad_id=PAD,
        anyone=lambda alive: True,  # other ranks go on to the limit
    )
    assert got.mask_BT.tolist() == [[True, True, True], [True, False, False]]
    assert got.support_BTC is None and got.student_hidden_BTH is None


def test_off_the_mask_numbers_are_zero() -> None:
    got = roll_out(
        batch_of([(2, 9), (3,), (7, 7, 7)] * 4, uids=[str(n) for n in range(12)]),
        student=TinyReader("llama", seed=1),
        teacher=TinyReader("llama", seed=2),
        teacher_mix=0.5,
        decoding=Decoding(max_new_tokens=12),
        key=KEY,
        eos_ids=(1, 2, 3),
        pad_id=PAD,
        keep_hidden=True,
        drop_finished=False,  # finished rows are read on, and what is read of them must not show
    )
    assert got.student_hidden_BTH is not None and got.teacher_hidden_BTH is not None
    assert bool((~got.mask_BT).any())
    for value in (got.logq_BT, got.teacher_drew_BT, got.student_hidden_BTH, got.teacher_hidden_BTH):
        assert not bool(value[~got.mask_BT].any())
    assert bool((got.response_BT[~got.mask_BT] == PAD).all())
    assert bool(got.student_hidden_BTH[got.mask_BT].any(dim=-1).all())
    assert bool(got.teacher_hidden_BTH[got.mask_BT].any(dim=-1).all())


def test_an_eos_that_was_not_recognised_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the mask comes from the sampled EOS and from nothing else."""
    monkeypatch.setattr(torch, "isin", lambda ids, eos: torch.zeros_like(ids, dtype=torch.bool))
    assert say().stop_B == (Stop.LENGTH,) * 4


def test_no_rows_make_an_empty_rollout_of_the_right_widths() -> None:
    got = roll_out(
        batch_of([], uids=[]),
        student=TinyReader("gpt2", seed=1),
        teacher=TinyReader("gpt2", seed=2),
        teacher_mix=0.5,
        coin_groups=3,
        decoding=Decoding(max_new_tokens=5, top_k=4),
        key=KEY,
        eos_ids=(EOS,),
        pad_id=PAD,
        keep_hidden=True,
    )
    assert got.response_BT.shape == got.mask_BT.shape == got.logq_BT.shape == (0, 1)
    assert got.student_hidden_BTH is not None and got.student_hidden_BTH.shape == (0, 1, 16)
    assert got.teacher_hidden_BTH is not None and got.teacher_hidden_BTH.shape == (0, 1, 16)
    assert got.support_BTC is not None and got.support_BTC.shape == (0, 1, 3)
    assert got.stop_B == ()


def test_mixing_without_a_teacher_and_a_token_key_for_coins_are_our_mistakes() -> None:
    options = {"decoding": Decoding(max_new_tokens=2), "eos_ids": (EOS,), "pad_id": PAD}
    student = TinyReader("gpt2", seed=1)
    with pytest.raises(AssertionError, match="needs a teacher"):
        roll_out(batch_of([(2,)], uids=["a"]), student=student, key=KEY, teacher_mix=0.5, **options)  # type: ignore[arg-type]
    coin = DrawKey(seed=0, stage="minillm", purpose=Purpose.COIN, rollout=0)
    with pytest.raises(AssertionError, match="share its random number"):
        roll_out(batch_of([(2,)], uids=["a"]), student=student, key=coin, **options)  # type: ignore[arg-type]
    student.lockstep = True
    with pytest.raises(AssertionError, match="denied"):
        roll_out(batch_of([(2,)], uids=["a"]), student=student, key=KEY, anyone=lambda alive: False, **options)  # type: ignore[arg-type]

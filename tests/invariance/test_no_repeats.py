"""Models that go round in circles say no n-gram twice where that is forbidden, prompt included, and still end.

Legend: B rows, S new positions, N rows, L positions, V ids.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minillm import decode
from minillm.decode import roll_out
from minillm.repetition import Held, held_back
from minillm.types import Decoding, DrawKey, Purpose, Rollout, Stop
from tests.readers import PAD, batch_of

V, EOS, LONGEST = 8, 0, 40
KEY = DrawKey(seed=1, stage="", purpose=Purpose.EVALUATION, rollout=0)
PROMPTS = [(2,), (3, 4, 5, 6, 7, 3), (5, 5, 5), (6, 7), (2, 3, 4, 5, 6, 7, 2, 3), (4, EOS, 4)]
UIDS = [f"row-{n}" for n in range(len(PROMPTS))]


class Loop:
    """Says after each id almost surely the next one, round and round through 2 to V - 1; ends hardly ever."""

    def __init__(self, *, step: int = 1) -> None:
        self.device, self.lockstep, self.step = torch.device("cpu"), False, step

    def extend(self, ids_BS: Tensor, mask_BL: Tensor, cache: None) -> tuple[Tensor, None]:
        return ids_BS[:, :, None].double(), None

    def read(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        return ids_BL[:, :, None].double() * mask_BL[:, :, None]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        last_N = hidden_NH[:, 0].long()
        logits_NV = 0.1 * torch.arange(V, dtype=torch.float64).repeat(len(last_N), 1)
        logits_NV[torch.arange(len(last_N)), 2 + (last_N - 2 + self.step) % (V - 2)] += 20.0
        return logits_NV

    def select_rows(self, cache: None, index: Tensor) -> None:
        return None


def said(ngram: int, *, mix: float = 0.0, longest: int = LONGEST) -> Rollout:
    return roll_out(
        batch_of(PROMPTS, uids=UIDS), student=Loop(), teacher=Loop(step=2), teacher_mix=mix, coin_groups=2,
        decoding=Decoding(max_new_tokens=longest, no_repeat_ngram_size=ngram), key=KEY, eos_ids=(EOS,), pad_id=PAD,
    )  # fmt: skip


def returning(rollout: Rollout, ngram: int) -> int:
    """n-grams that stand twice in prompt and response of a row and end in the response, end tokens aside."""
    found = 0
    for prompt, ids_T, length in zip(PROMPTS, rollout.response_BT.tolist(), rollout.length_B.tolist(), strict=True):
        text = [*prompt, *ids_T[:length]]
        runs = [tuple(text[at : at + ngram]) for at in range(len(text) - ngram + 1)]
        own = range(max(len(prompt) - ngram + 1, 0), len(runs))
        found += sum(runs[at] in runs[:at] and runs[at][-1] != EOS for at in own)
    return found


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ngram", [2, 3, 4])
def test_a_looping_model_never_repeats_an_n_gram(ngram: int, mix: float) -> None:
    assert returning(said(ngram, mix=mix), ngram) == 0
    assert returning(said(0, mix=mix), ngram) > 50  # without the ban it does nothing else


def test_with_no_id_twice_every_row_ends_by_itself() -> None:
    """When all other ids are used up the end token is left: it is never banned, not even where the prompt holds it."""
    got = said(1)
    assert got.stop_B == (Stop.EOS,) * len(PROMPTS)
    assert returning(got, 1) == 0
    assert max(got.length_B.tolist()) <= V


def test_rows_end_at_different_tokens_and_the_others_go_on_undisturbed() -> None:
    got = said(1)
    assert len(set(got.length_B.tolist())) > 2
    for row in range(len(PROMPTS)):
        alone = roll_out(
            batch_of([PROMPTS[row]], uids=[UIDS[row]]), student=Loop(), key=KEY, eos_ids=(EOS,), pad_id=PAD,
            decoding=Decoding(max_new_tokens=LONGEST, no_repeat_ngram_size=1),
        )  # fmt: skip
        length = int(got.length_B[row])
        assert alone.response_BT[0].tolist() == got.response_BT[row, :length].tolist()


def test_without_an_end_token_a_row_that_has_used_everything_starts_to_repeat() -> None:
    """A row always has an id to draw."""
    got = roll_out(
        batch_of(PROMPTS, uids=UIDS), student=Loop(), key=KEY, eos_ids=(), pad_id=PAD,
        decoding=Decoding(max_new_tokens=LONGEST, no_repeat_ngram_size=1),
    )  # fmt: skip
    assert got.stop_B == (Stop.LENGTH,) * len(PROMPTS) and bool(got.logq_BT.isfinite().all())
    for prompt, ids in zip(PROMPTS, got.response_BT.tolist(), strict=True):
        fresh = V - len(set(prompt))
        assert len({*prompt, *ids[:fresh]}) == V, "first the ids that were not used"


BROKEN: dict[str, Callable[..., Held]] = {
    "prompt ignored": lambda ids_NL, real_NL, **more: held_back(ids_NL[:, 8:], real_NL[:, 8:], **more),
    "off by one": lambda *past, ngram, **more: held_back(*past, ngram=ngram + 1, **more),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_ban_repeats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls."""
    monkeypatch.setattr(decode, "held_back", BROKEN[name])
    assert returning(said(2), 2) > 0

"""What a row's past holds back, against transformers' processors row by row, and which tokens repeat an n-gram.

Legend: N rows, L positions of prompt and response, V ids, B responses, T response positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from minillm.decode import _mix
from minillm.errors import ShapeMismatch
from minillm.reading import Asked
from minillm.repetition import banned_ids, held_back, penalised, repetition_rewards
from minillm.sampling import support_mask
from minillm.text_measures import repetition_3
from minillm.types import Decoding

V, L = 6, 14
NOBODY = torch.tensor([], dtype=torch.int64)
NGRAMS = [1, 2, 3, 4]


def rows_of(seed: int, *, rows: int = 40, width: int = L) -> tuple[Tensor, Tensor]:
    """Rows of one id to the whole width, of an alphabet of two ids to all, left-padded with ids that could be real."""
    noise = torch.Generator().manual_seed(seed)
    ids_NL = torch.randint(0, V, (rows, width), generator=noise) % (V - torch.arange(rows) % (V - 1))[:, None]
    length_N1 = torch.randint(1, width + 1, (rows, 1), generator=noise)
    return ids_NL, torch.arange(width) >= width - length_N1


def logits_of(rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(ids_NL: Tensor, real_NL: Tensor, *, ngram: int) -> Tensor:
    """Transformers' ban on each row without its padding."""
    rule = NoRepeatNGramLogitsProcessor(ngram)
    banned = [rule(ids_L[real_L][None], torch.zeros(1, V)) for ids_L, real_L in zip(ids_NL, real_NL, strict=True)]
    return torch.cat(banned) == -torch.inf


def ours(ids_NL: Tensor, real_NL: Tensor, *, ngram: int, eos_E: Tensor = NOBODY) -> Tensor:
    return banned_ids(ids_NL, real_NL, vocabulary=V, ngram=ngram, eos_E=eos_E)


@pytest.mark.parametrize("ngram", NGRAMS)
def test_the_ban_is_that_of_transformers_on_each_row_without_padding(ngram: int) -> None:
    for seed in range(5):
        ids_NL, real_NL = rows_of(seed)
        want_NV = theirs(ids_NL, real_NL, ngram=ngram)
        assert torch.equal(ours(ids_NL, real_NL, ngram=ngram), want_NV)
        assert bool(want_NV.any()) and not bool(want_NV.all())


@pytest.mark.parametrize("width", [1, 2, 3])
def test_rows_shorter_than_an_n_gram_ban_nothing(width: int) -> None:
    ids_NL, real_NL = rows_of(0, width=width)
    for ngram in range(width + 1, 6):
        assert not bool(ours(ids_NL, real_NL, ngram=ngram).any())
    assert bool(ours(ids_NL, real_NL, ngram=1).any())  # the control


BROKEN: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "padding counts": lambda ids_NL, real_NL, ngram: ours(ids_NL, torch.ones_like(real_NL), ngram=ngram),
    "n too large by one": lambda ids_NL, real_NL, ngram: ours(ids_NL, real_NL, ngram=ngram + 1),
    "the last six ids only": lambda ids_NL, real_NL, ngram: ours(ids_NL[:, -6:], real_NL[:, -6:], ngram=ngram),
}


@pytest.mark.parametrize("ngram", [1, 2])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_ban_is_not_that_of_transformers(name: str, ngram: int) -> None:
    """Negative controls of the comparison."""
    ids_NL, real_NL = rows_of(0)
    assert not torch.equal(BROKEN[name](ids_NL, real_NL, ngram), theirs(ids_NL, real_NL, ngram=ngram))


def test_an_eos_is_never_banned_and_nothing_else_changes() -> None:
    """Here we leave transformers, where a prompt that holds an EOS may keep the response from ever ending."""
    ids_NL, real_NL = rows_of(3)
    for ngram in NGRAMS:
        plain_NV = theirs(ids_NL, real_NL, ngram=ngram)
        got_NV = ours(ids_NL, real_NL, ngram=ngram, eos_E=torch.tensor([0, 4]))
        assert not bool(got_NV[:, [0, 4]].any()) and bool(plain_NV[:, [0, 4]].any())
        assert torch.equal(got_NV[:, [1, 2, 3, 5]], plain_NV[:, [1, 2, 3, 5]])


def test_ids_beyond_the_vocabulary_ban_nothing() -> None:
    ids_NL, real_NL = rows_of(1)
    got_NV = banned_ids(ids_NL, real_NL, vocabulary=4, ngram=2, eos_E=torch.tensor([V]))
    assert torch.equal(got_NV, ours(ids_NL, real_NL, ngram=2)[:, :4])
    seen_NV = held_back(ids_NL, real_NL, vocabulary=4, ngram=0, penalty=2.0, eos_E=NOBODY).seen_NV
    assert seen_NV is not None and seen_NV.shape == (40, 4)


def test_where_a_ban_leaves_no_id_it_is_lifted() -> None:
    """Not where an EOS is left, unless the model itself forbids that."""
    row_NL = torch.arange(V)[None]
    everything_NV = ours(row_NL, row_NL >= 0, ngram=1)
    assert bool(everything_NV.all())
    logits_NV = logits_of(1)
    kept_NV = support_mask(logits_NV, top_k=0, top_p=1.0, banned_BV=everything_NV)
    assert kept_NV is not None and bool(kept_NV.all())
    top_NV = support_mask(logits_NV, top_k=2, top_p=1.0, banned_BV=everything_NV)
    assert top_NV is not None and int(top_NV.sum()) == 2
    but_eos_NV = ours(row_NL, row_NL >= 0, ngram=1, eos_E=torch.tensor([2]))
    kept_NV = support_mask(logits_NV, top_k=0, top_p=1.0, banned_BV=but_eos_NV)
    assert kept_NV is not None and kept_NV[0].nonzero()[:, 0].tolist() == [2]
    logits_NV[:, 2] = -torch.inf
    kept_NV = support_mask(logits_NV, top_k=0, top_p=1.0, banned_BV=but_eos_NV)
    assert kept_NV is not None and kept_NV[0].nonzero()[:, 0].tolist() == [0, 1, 3, 4, 5]


def test_a_ban_that_hits_nothing_is_a_support_all_the_same() -> None:
    logits_NV = logits_of(3)
    nothing_NV = torch.zeros(3, V, dtype=torch.bool)
    kept_NV = support_mask(logits_NV, top_k=0, top_p=1.0, banned_BV=nothing_NV)
    assert kept_NV is not None and bool(kept_NV.all())
    assert support_mask(logits_NV, top_k=0, top_p=1.0) is None


@pytest.mark.parametrize("penalty", [0.7, 1.3, 4.0])
def test_the_penalty_is_that_of_transformers(penalty: float) -> None:
    """To the bit, padding left out; -inf stays."""
    ids_NL, real_NL = rows_of(2)
    logits_NV = logits_of(len(ids_NL))
    logits_NV[::3, 2] = -torch.inf
    held = held_back(ids_NL, real_NL, vocabulary=V, ngram=0, penalty=penalty, eos_E=NOBODY)
    assert held.banned_NV is None
    got_NV = penalised(logits_NV, held.seen_NV, penalty)
    theirs = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=(~real_NL).sum(dim=1))
    assert torch.equal(got_NV, theirs(ids_NL, logits_NV))
    padding_too = held_back(ids_NL, real_NL | True, vocabulary=V, ngram=0, penalty=penalty, eos_E=NOBODY)
    assert not torch.equal(penalised(logits_NV, padding_too.seen_NV, penalty), got_NV)  # negative control
    assert not torch.equal(torch.where(logits_NV < 0, logits_NV / penalty, logits_NV * penalty), got_NV)


def test_what_is_off_is_not_looked_at() -> None:
    ids_NL, real_NL = rows_of(0)
    held = held_back(ids_NL, real_NL, vocabulary=V, ngram=0, penalty=1.0, eos_E=NOBODY)
    assert held.seen_NV is None and held.banned_NV is None
    logits_NV = logits_of(40)
    assert penalised(logits_NV, held.seen_NV, 1.0) is logits_NV


ALL: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "temperature": 0.7,
    "top_k": 4,
    "top_p": 0.8,
}
ORDER = [
    "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper",
    "TopPLogitsWarper",
]  # fmt: skip


def processors(**settings: Any) -> LogitsProcessorList:
    """As ``generate`` makes them for a decoder without padding."""
    model: Any = GenerationMixin()
    model.config = GenerationConfig(is_encoder_decoder=False)
    made: LogitsProcessorList = model._get_logits_processor(
        GenerationConfig(do_sample=True, **settings), input_ids_seq_length=L
    )
    return made


def by_transformers(ids_NL: Tensor, real_NL: Tensor, logits_NV: Tensor, chain: LogitsProcessorList) -> Tensor:
    rows = zip(ids_NL, real_NL, logits_NV, strict=True)
    return torch.cat([chain(ids_L[real_L][None], logits_V[None].clone()) for ids_L, real_L, logits_V in rows])


def test_the_whole_chain_is_that_of_transformers_in_its_order() -> None:
    ids_NL, real_NL = rows_of(5, rows=200)
    logits_NV, chain = logits_of(200, seed=5), processors(**ALL)
    assert [type(step).__name__ for step in chain] == ORDER
    decoding = Decoding(max_new_tokens=1, **ALL)
    held = held_back(
        ids_NL, real_NL, vocabulary=V, ngram=decoding.no_repeat_ngram_size, penalty=decoding.repetition_penalty,
        eos_E=NOBODY,
    )  # fmt: skip
    assert held.banned_NV is not None
    some_N = ~held.banned_NV.all(dim=1)  # transformers forbids everything there
    assert int(some_N.sum()) > 190
    got_NV, _, support_NV = _mix(Asked(torch.arange(200), logits_NV), [], decoding=decoding, held=held)
    want_NV = by_transformers(ids_NL, real_NL, logits_NV, chain)
    assert support_NV is not None and torch.equal(support_NV[some_N], (want_NV > -torch.inf)[some_N])
    torch.testing.assert_close(got_NV.softmax(-1)[some_N], want_NV.softmax(-1)[some_N], rtol=0, atol=1e-12)
    # Negative control: the ban after top-k is another chain, since top-k then spends its places on what is banned.
    last = LogitsProcessorList([*(chain[place] for place in (0, 2, 3, 4)), chain[1]])
    other_NV = by_transformers(ids_NL, real_NL, logits_NV, last)
    assert not torch.equal((other_NV > -torch.inf)[some_N], (want_NV > -torch.inf)[some_N])


def slow_repeats(ids: list[int], ngram: int) -> list[bool]:
    """One token after the other."""
    found = []
    for end in range(1, len(ids) + 1):
        own = ids[end - ngram : end] if end >= ngram else None
        found.append(own is not None and any(ids[at : at + ngram] == own for at in range(end - ngram)))
    return found


def responses_of(seed: int) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    response_BT = torch.randint(0, 3, (50, 12), generator=noise)
    return response_BT, torch.arange(12) < torch.randint(0, 13, (50, 1), generator=noise)


@pytest.mark.parametrize("ngram", [1, 2, 3, 5, 12, 13])
def test_a_token_repeats_where_its_n_gram_stands_earlier_in_its_response(ngram: int) -> None:
    for seed in range(4):
        response_BT, mask_BT = responses_of(seed)
        got_BT = repetition_rewards(response_BT, mask_BT, ngram=ngram)
        for got_T, ids_T, kept_T in zip(got_BT, response_BT, mask_BT, strict=True):
            assert got_T[kept_T].tolist() == slow_repeats(ids_T[kept_T].tolist(), ngram)
        assert not bool(got_BT[~mask_BT].any())
        assert bool(got_BT.any()) is (ngram <= 5)
        garbage_BT = torch.where(mask_BT, response_BT, 1 << 40)
        assert torch.equal(repetition_rewards(garbage_BT, mask_BT, ngram=ngram), got_BT)


def test_golden_repetitions() -> None:
    row = torch.tensor([[7, 8, 7, 8, 8, 8, 8]])
    kept = torch.ones_like(row, dtype=torch.bool)
    for ngram, want in {1: [0, 0, 1, 1, 1, 1, 1], 2: [0, 0, 0, 1, 0, 1, 1], 3: [0, 0, 0, 0, 0, 0, 1]}.items():
        assert repetition_rewards(row, kept, ngram=ngram)[0].int().tolist() == want


def test_a_response_with_a_repetition_is_one_that_the_measure_of_text_finds() -> None:
    """Ids as words: the definition of ``text_measures.repetition_3``."""
    response_BT, mask_BT = responses_of(9)
    got_B = repetition_rewards(response_BT, mask_BT, ngram=3).any(dim=1)
    texts = [" ".join(map(str, ids_T[kept_T].tolist())) for ids_T, kept_T in zip(response_BT, mask_BT, strict=True)]
    assert got_B.tolist() == [repetition_3(text) for text in texts]
    assert 5 < int(got_B.sum()) < 45
    other_B = repetition_rewards(response_BT, mask_BT, ngram=2).any(dim=1)  # negative control
    assert not torch.equal(got_B, other_B)


def test_large_ids_do_not_run_into_each_other() -> None:
    """Numbers of n-grams are made of ids by one multiplication: with ids of 2^31 and 20 of them nothing overflows."""
    noise = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, 1 << 31, (4, 40), generator=noise).repeat(1, 2)
    got_BT = repetition_rewards(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), ngram=20)
    assert got_BT.tolist() == [[False] * 59 + [True] * 21] * 4


def test_no_row_and_a_mask_of_another_shape() -> None:
    empty = torch.zeros(0, 1, dtype=torch.int64)
    assert repetition_rewards(empty, empty > 0, ngram=3).shape == (0, 1)
    with pytest.raises(ShapeMismatch):
        repetition_rewards(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), ngram=1)


def test_the_first_of_equals_is_no_repetition_only_because_the_sort_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: an order that puts the last of equals first marks other tokens."""
    response_BT, mask_BT = responses_of(1)
    want_BT = repetition_rewards(response_BT, mask_BT, ngram=1)
    plain = Tensor.sort

    def backwards(self: Tensor, dim: int, stable: bool) -> tuple[Tensor, Tensor]:
        value_BT, order_BT = plain(self.flip(1), dim=dim, stable=stable)
        return value_BT, self.shape[1] - 1 - order_BT

    monkeypatch.setattr(Tensor, "sort", backwards)
    assert not torch.equal(repetition_rewards(response_BT, mask_BT, ngram=1), want_BT)

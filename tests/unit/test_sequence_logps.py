"""Promises: the sum over each response's tokens that plain forwards give, in the rows' order; neither batches nor rows
beside it change one; what is no number is refused.

That two ranks agree is held in ``dist/test_preferences`` (slow), and of a reference
that is sharded in ``dist/test_preference_stages``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm.cards import Card
from minillm.errors import NonFinite
from minillm.loading import inspect, load
from minillm.micro_batches import Limits
from minillm.ranks import Ranks
from minillm.sequence_logps import pair_logps, sequence_logps
from minillm.teacher_engine import Teacher
from minillm.types import Ids
from tests import tiny

REAL, EOS = len(tiny.WORDS), tiny.WORDS.index(tiny.EOS)
IDS = Ids(eos=(EOS,), pad=EOS)
RANKS, NONE = Ranks(), Limits()
ROWS = [((5, 6, 7, 8), (9, 10, 11, EOS)), ((5, 6), (EOS,)), ((7, 8, 9), (3, EOS)), ((5, 6, 7, 8), (12, EOS))]


def made(folder: Path) -> Teacher:
    card = Card(name="teacher", model=str(folder))
    return Teacher(
        lambda: load(card, inspect(card), seed=0), ranks=RANKS, placement="replicated", precision="fp32", real_ids=REAL
    )


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head has four rows more than there are real ids."""
    return tiny.save_model(tmp_path_factory.mktemp("m") / request.param, request.param, seed=3, rows=REAL + 4)


def asked(
    model: Teacher, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = ROWS, *, limits: Limits = NONE
) -> list[float]:
    return sequence_logps(rows, model=model, ids=IDS, ranks=RANKS, limits=limits)


@torch.no_grad()
def plainly(folder: Path, *, columns: int = REAL) -> list[float]:
    """Row by row with transformers alone, one forward for each token."""
    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for ids, response in ROWS:
        total = 0.0
        for place, token in enumerate(response):
            logits_V = model(torch.tensor([[*ids, *response[:place]]])).logits[0, -1, :columns]
            total += float(logits_V.double().log_softmax(-1)[token])
        found.append(total)
    return found


def test_each_is_the_sum_over_its_tokens_that_plain_forwards_give(folder: Path) -> None:
    found = asked(made(folder))
    assert found == pytest.approx(plainly(folder), abs=1e-4)
    # Negative controls: rows that mean nothing would be seen in the softmax, and so would a missing end.
    assert found != pytest.approx(plainly(folder, columns=REAL + 4), abs=1e-3)
    assert found[:1] != pytest.approx(asked(made(folder), [(ROWS[0][0], ROWS[0][1][:-1])]), abs=1e-2)


def test_neither_batches_nor_rows_beside_it_change_one(folder: Path) -> None:
    model = made(folder)
    whole = asked(model)
    for limits in (Limits(rows=1), Limits(rows=3), Limits(places=7)):
        assert asked(model, limits=limits) == pytest.approx(whole, abs=1e-4), limits
    assert asked(model, [ROWS[2], ROWS[0]]) == pytest.approx([whole[2], whole[0]], abs=1e-4)
    assert asked(model, []) == []


def test_a_pair_has_those_of_its_two_rows_in_their_order(folder: Path) -> None:
    model = made(folder)
    pairs = [(ROWS[0][0], ROWS[0][1], ROWS[3][1]), (ROWS[2][0], ROWS[2][1], ROWS[1][1])]
    found = pair_logps(iter(pairs), model=model, ids=IDS, ranks=RANKS, limits=NONE)
    single = asked(model, [(prompt, response) for prompt, *both in pairs for response in both])
    assert found == [(single[0], single[1]), (single[2], single[3])] and len(set(single)) == 4
    assert pair_logps([], model=model, ids=IDS, ranks=RANKS, limits=NONE) == []


def test_what_is_no_number_is_refused_by_the_place_of_its_row(folder: Path) -> None:
    model = made(folder)
    with torch.no_grad():
        model.root.head.weight[12] = torch.inf
    with pytest.raises(NonFinite, match="row 0 of 4: its response has a log-probability of nan"):
        asked(model)

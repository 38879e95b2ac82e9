"""Promises: a record for each prompt, in order, with the log-probs of plain forwards; batches and shares change none.

That the sum is what transformers gives is held in ``test_families``, and that two ranks agree in ``dist/test_parity``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import gold as module
from minillm.gold import Gold, read_gold, reference_loss
from minillm.micro_batches import Limits
from minillm.models import CausalLM, ModelReader
from minillm.ranks import Ranks
from minillm.types import Prompt
from tests import tiny

REAL, EOS = len(tiny.WORDS), tiny.WORDS.index(tiny.EOS)
PROMPTS = [
    Prompt(uid="long", text="", ids=(5, 6, 7, 8), responses=("x",), response_ids=(9, 10, 11, 12, EOS)),
    Prompt(uid="none", text="", ids=(5, 6)),
    Prompt(uid="end", text="", ids=(7,), responses=("",), response_ids=(EOS,)),
    Prompt(uid="short", text="", ids=(3, 4, 5), responses=("x", "y"), response_ids=(20, EOS)),
]


class Half:
    """One of two ranks, whose lists are put together by the test."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size, self.said = rank, 2, list[Any]()

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        self.said = mine
        return mine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny.save_model(tmp_path_factory.mktemp("gold") / "m", "llama", seed=3)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def reader(model: Any) -> ModelReader:
    root = CausalLM(model)
    root.head.real_ids = REAL
    return ModelReader(root.eval(), device=torch.device("cpu"), lockstep=False)


@torch.no_grad()
def plainly(model: Any, prompt: Prompt) -> list[float]:
    """Row by row, unpadded, one forward for each token."""
    found = []
    for place, token in enumerate(prompt.response_ids):
        ids = [*prompt.ids, *prompt.response_ids[:place]]
        found.append(float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token]))
    return found


def read(reader: ModelReader, *, limits: Limits = Limits(), ranks: Any = None) -> list[Gold | None]:  # noqa: B008
    return read_gold(reader, PROMPTS, pad_id=0, limits=limits, ranks=ranks or Ranks())


@pytest.mark.parametrize("limits", [Limits(rows=1), Limits(rows=2), Limits(places=10), Limits()])
def test_each_token_has_the_log_prob_of_a_plain_forward(limits: Limits, model: Any, reader: ModelReader) -> None:
    for prompt, found in zip(PROMPTS, read(reader, limits=limits), strict=True):
        if not prompt.response_ids:
            assert found is None
            continue
        assert found is not None and found.uid == prompt.uid
        assert found.logq == pytest.approx(plainly(model, prompt), abs=1e-5)
        assert found.nats == pytest.approx(-sum(plainly(model, prompt)), abs=1e-5)


def test_two_ranks_share_the_prompts_and_read_the_same(reader: ModelReader) -> None:
    halves = [Half(rank) for rank in range(2)]
    for half in halves:
        read(reader, ranks=half)
    assert [len(half.said) for half in halves] == [2, 1]
    together = dict([*halves[0].said, *halves[1].said])
    for place, found in enumerate(read(reader)):
        other = together.get(place)
        assert (found is None) == (other is None)
        if found is not None:
            assert other.uid == found.uid and other.logq == pytest.approx(found.logq, abs=1e-6)


def test_the_loss_is_the_mean_over_all_tokens(reader: ModelReader) -> None:
    there = [found for found in read(reader) if found is not None]
    want = sum(found.nats for found in there) / sum(len(found.logq) for found in there)
    got = reference_loss(reader, PROMPTS, pad_id=0, limits=Limits(rows=2), ranks=Ranks())
    assert got == pytest.approx(want, abs=1e-6)
    assert got != pytest.approx(sum(found.nats / len(found.logq) for found in there) / len(there), abs=1e-3)


def test_control_a_reference_without_its_end_is_seen(
    model: Any, reader: ModelReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.example_batch

    def endless(rows: Any, **options: Any) -> Any:
        batch = real(rows, **options)
        batch.target_BL[batch.ids_BL == EOS] = False
        return batch

    monkeypatch.setattr(module, "example_batch", endless)
    found = read(reader)[0]
    assert found is not None and found.logq == pytest.approx(plainly(model, PROMPTS[0])[:-1], abs=1e-5)
    assert found.nats != pytest.approx(-sum(plainly(model, PROMPTS[0])), abs=1e-3)

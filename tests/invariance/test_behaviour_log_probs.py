"""Before the first update q_theta / q_old is 1 at every token, whatever the sampler's chain.

q_old is what the sampler wrote down, from its cache, one token at a time, and what scoring makes of the kept hidden
states. q_theta comes out of the training forward as ``Minillm.learning`` calls it: whole rows, packed, tile by tile.
The student here is a bare root module in the engine's place, so that it can be in float64 as well as in fp32.

Legend: N tokens of a micro-batch, in the order of its rows.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import decode, objectives, scoring
from minillm.cards import Card
from minillm.config import MinillmStage, OptimiserConfig
from minillm.loading import inspect, load
from minillm.models import CausalLM, ModelReader
from minillm.objectives import Collected, Minillm, rollout_inputs
from minillm.packing import Reads, pack
from minillm.probes import probe_packing
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights
from minillm.types import Decoding, Ids, Prompt, Rollout
from minillm.updates import in_step, limits_of
from tests import tiny

REAL = len(tiny.WORDS)
ROWS, LONGEST = 16, 10
RANKS = Ranks()
IDS = Ids(eos=tuple(range(1, REAL, 3)), pad=0)
CHAINS = {
    "plain": Decoding(max_new_tokens=LONGEST),
    "temperature": Decoding(max_new_tokens=LONGEST, temperature=0.7),
    "top-k": Decoding(max_new_tokens=LONGEST, top_k=6),
    "top-p": Decoding(max_new_tokens=LONGEST, top_p=0.8),
    "no-repeat": Decoding(max_new_tokens=LONGEST, no_repeat_ngram_size=1),
    "all": Decoding(max_new_tokens=LONGEST, temperature=0.7, top_k=8, top_p=0.9),
    "all-no-repeat": Decoding(max_new_tokens=LONGEST, temperature=0.7, top_k=8, top_p=0.9, no_repeat_ngram_size=1),
}
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
APART = 1e-2
WIDE, NARROW = torch.float64, torch.float32


@functools.cache
def root_of(folder: Path, dtype: torch.dtype) -> CausalLM:
    """The model of a folder; whoever may change it takes a copy."""
    card = Card(name=folder.name, model=str(folder))
    root = CausalLM(load(card, inspect(card), seed=0, dtype=dtype)).eval()
    root.head.real_ids = REAL
    probe_packing(root, name=folder.name)
    return root


class Bare:
    """A root module as student and as teacher of an objective. ``said`` holds the training forwards' log-probs."""

    def __init__(self, folder: Path, *, dtype: torch.dtype) -> None:
        self.root = copy.deepcopy(root_of(folder, dtype))
        self.reader = ModelReader(self.root, device=RANKS.device, lockstep=False)
        self.updates_done = 0
        self.said: list[Tensor] = []

    @contextlib.contextmanager
    def whole(self) -> Iterator[ModelReader]:
        yield self.reader

    @contextlib.contextmanager
    def head(self) -> Iterator[HeadWeights]:
        yield self.root.head.weights()

    def loss(self, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, numbers = self.root("train", **inputs)
        self.said.append(numbers["logq"])
        return loss, numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of each family, with more rows in its head than there are ids, and a teacher beside it."""
    top = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.save_model(top / f"student-{family}", family, seed=2, rows=30)
        tiny.save_model(top / f"teacher-{family}", family, seed=1, rows=32)
    return top


def prompts() -> list[Prompt]:
    """Of one to four tokens."""
    return [Prompt(uid=f"row-{n}", text="", ids=tuple(range(4 + n, 5 + n + n % 4))) for n in range(ROWS)]


@dataclasses.dataclass
class Case:
    """One rollout, and the micro-batches of its first update."""

    student: Bare
    objective: Minillm
    collected: Collected

    @property
    def rollout(self) -> Rollout:
        return self.collected.targets.scored.rollout

    def learn(self) -> Tensor:
        """Log-probs [B, T] that the first update's training forwards give; 0 off the mask."""
        self.student.said.clear()
        losses: list[Tensor] = []
        with self.objective.learning(self.collected, self.student) as (update, *_):  # type: ignore[arg-type]
            losses += [loss_of() for loss_of in update.losses]
        assert all(loss.requires_grad for loss in losses)
        # Tokens come micro-batch by micro-batch, row by row.
        length_B = self.rollout.prompts.mask_BP.sum(dim=1) + self.rollout.length_B
        cuts = in_step(
            length_B.tolist(),
            limits=limits_of(self.objective._stage),
            student=self.student,
            ranks=RANKS,  # type: ignore[arg-type]
        )
        logq_BT = torch.zeros_like(self.rollout.logq_BT)
        logq_N = iter(torch.cat(self.student.said).tolist())
        for row in (row for rows in cuts for row in rows):
            for t in range(int(self.rollout.length_B[row])):
                logq_BT[row, t] = next(logq_N)
        assert next(logq_N, None) is None
        return logq_BT

    def ratio_gap(self) -> float:
        """The largest distance of q_theta / q_old from 1, with q_old as sampled and as scored."""
        old = (self.rollout.logq_BT, self.collected.targets.scored.logq_BT)
        new_BT, kept_BT = self.learn(), self.rollout.mask_BT
        return max(float(((new_BT - old_BT)[kept_BT].exp() - 1).abs().max()) for old_BT in old)


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(
        family: str, chain: str, *, mix: float = 0.3, drop: bool = True, micro_batch: int = 0,
        dtype: torch.dtype = WIDE,
    ) -> Case:  # fmt: skip
        monkeypatch.setattr(
            scoring, "WORKING_BYTES", {"cpu": 0}
        )  # the fewest tokens a tile: 16, so that there are several
        monkeypatch.setattr(objectives, "roll_out", functools.partial(decode.roll_out, drop_finished=drop))
        student, teacher = (Bare(folder / f"{who}-{family}", dtype=dtype) for who in ("student", "teacher"))
        stage = MinillmStage(
            steps=1, prompts=ROWS, teacher_mix=mix, coin_groups=2, micro_batch=micro_batch, inner_epochs=2,
            optimiser=OptimiserConfig(lr=1e-3),
        )  # fmt: skip
        objective = Minillm(
            stage, prompts=prompts(), decoding=CHAINS[chain], teacher=teacher, ids=IDS, ranks=RANKS, seed=5,  # type: ignore[arg-type]
        )  # fmt: skip
        collected, _ = objective.collect(0, student)  # type: ignore[arg-type]
        return Case(student, objective, collected)

    return make


@pytest.mark.parametrize("dtype", [WIDE, NARROW], ids=["float64", "fp32"])
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_ratio_is_one_before_the_first_update(family: str, chain: str, dtype: torch.dtype, make: Any) -> None:
    case: Case = make(family, chain, dtype=dtype)
    assert case.ratio_gap() < CLOSE[dtype]
    assert case.rollout.logq_BT.dtype is case.student.said[0].dtype is dtype
    lengths = case.rollout.length_B.tolist()
    assert len(set(lengths)) > 2 and sum(lengths) > 16  # more than one tile
    inputs = rollout_inputs(case.rollout, range(ROWS))
    assert (
        case.student.root.packs != "no"
        and len(pack(inputs["ids_BL"], inputs["mask_BL"], reads=Reads(hidden=16)).ids_RW) < ROWS
    )
    assert bool(case.rollout.teacher_drew_BT.any())
    assert (case.rollout.support_BTC is None) == (chain in {"plain", "temperature"})


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch", [0, 1, 5])
@pytest.mark.parametrize("chain", ["plain", "all", "no-repeat"])
def test_neither_dropping_nor_mixing_nor_micro_batches_change_that(
    chain: str, micro_batch: int, mix: float, drop: bool, make: Any
) -> None:
    case: Case = make("llama", chain, mix=mix, drop=drop, micro_batch=micro_batch)
    assert case.ratio_gap() < CLOSE[WIDE]
    assert len(case.student.said) == {0: 1, 1: ROWS, 5: 4}[micro_batch]
    assert bool(case.rollout.teacher_drew_BT.any()) == (mix > 0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_rows_in_place_of_packed_ones_change_nothing_either(family: str, make: Any) -> None:
    case: Case = make(family, "all")
    case.student.root.packs = "no"
    assert case.ratio_gap() < CLOSE[WIDE]


def without_support(case: Case) -> None:
    """As if the record of the support had not been handed on to learning."""
    practice = dataclasses.replace(case.collected.practice, support_BTC=None)
    case.collected = dataclasses.replace(case.collected, practice=practice)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_forgotten_temperature_is_seen(family: str, make: Any) -> None:
    """Negative control: learning at another temperature than sampling; at temperature 1 there is nothing to forget."""
    for chain, seen in {"temperature": True, "all": True, "top-k": False}.items():
        case: Case = make(family, chain)
        case.objective._decoding = dataclasses.replace(CHAINS[chain], temperature=1.0)
        assert (case.ratio_gap() > APART) is seen, chain


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_forgotten_support_is_seen(family: str, make: Any) -> None:
    """Negative control: learning over all ids what was sampled from some; without truncation nothing is lost."""
    for chain, seen in {"top-k": True, "top-p": True, "no-repeat": True, "all": True, "temperature": False}.items():
        case: Case = make(family, chain)
        without_support(case)
        assert (case.ratio_gap() > APART) is seen, chain


def test_a_training_forward_that_packs_rows_without_telling_them_apart_is_seen(make: Any) -> None:
    """Negative control: rows of a line that see each other."""
    case: Case = make("opt", "plain")
    case.student.root.packs = "positions"  # an OPT tells rows apart by its mask alone
    assert case.ratio_gap() > APART


def test_the_ratio_is_not_one_after_an_update(make: Any) -> None:
    """Negative control: weights that moved by a little."""
    case: Case = make("qwen2", "all")
    with torch.no_grad():
        for weight in case.student.root.parameters():
            weight.mul_(1.001)
    assert case.ratio_gap() > 1e-4

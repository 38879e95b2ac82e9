"""A whole MiniLLM step against the sum of its bare parts, written as plainly as transformers allows.

The parts: a cached decode loop with multinomial sampling, one forward of the teacher over the finished rows, and a
forward and backward of the student with whole logits for each inner update. What a step costs beyond them is ours:
keyed sampling, bookkeeping, credit, the engine, the optimiser.

Legend: B rows, P prompt tokens, T new tokens, L = P + T, N = B T, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.bench.loss import whole_logits_loss
from minillm.bench.pairs import Spread, in_turns, ratio, spread_of
from minillm.cards import load_card
from minillm.engines import Student, Teacher
from minillm.models import inspect, load
from minillm.objectives import Minillm
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights, TeacherView
from minillm.stage_config import MinillmStage, OptimiserConfig
from minillm.types import Decoding, Ids, Prompt

PARTS = ("decode", "teacher", "update")
UPDATES = 10**6
"""Length of the learning-rate schedule: longer than any benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """Which models, and how many tokens."""

    teacher: str
    student: str
    rows: int
    prompt_tokens: int
    new_tokens: int
    inner_updates: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """Seconds of the whole step and of each bare part, and what follows from them."""

    case: StepCase
    parameters: dict[str, int]
    seconds: dict[str, Spread]
    over_parts: Spread
    """The step over decode + teacher + inner updates, turn by turn."""
    tokens_per_s: float
    """New tokens in a step over its median seconds."""

    def as_json(self) -> dict[str, Any]:
        """Nested plain values."""
        return asdict(self)


def measure_step(case: StepCase, *, repeats: int) -> StepFigures:
    """Both in turns, in one process. No row ends early, so that every step has the same tokens."""
    ranks = Ranks(threads=case.threads)
    ours, bare = Ours(case, ranks=ranks), Bare(case, device=ranks.device)
    try:
        seconds = in_turns(
            {"step": ours.step, **{part: getattr(bare, part) for part in PARTS}}, repeats=repeats, device=ranks.device
        )
        parameters = {"teacher": ours.teacher.parameters, "student": ours.student.parameters}
    finally:
        ours.close()
    updates = [case.inner_updates * one for one in seconds["update"]]
    parts = [sum(turn) for turn in zip(seconds["decode"], seconds["teacher"], updates, strict=True)]
    whole = spread_of(seconds["step"])
    return StepFigures(
        case=case,
        parameters=parameters,
        seconds={name: spread_of(values) for name, values in seconds.items()},
        over_parts=ratio(seconds["step"], parts),
        tokens_per_s=case.rows * case.new_tokens / whole.median,
    )


class Ours:
    """The objective, student and teacher of a run, over random prompts that no response ends."""

    def __init__(self, case: StepCase, *, ranks: Ranks) -> None:
        stage = MinillmStage(
            steps=1,
            prompts=case.rows,
            inner_updates=case.inner_updates,
            teacher_mix=0.0,
            length_norm=True,
            optimiser=OptimiserConfig(lr=1e-5),
        )
        teacher, student = (_loader(case.teacher, "teachers"), _loader(case.student, "students"))
        self.teacher = Teacher(teacher, ranks=ranks, placement="replicated", precision="fp32")
        self.student = Student(
            student, ranks=ranks, settings="zero0", precision="fp32", optimiser=stage.optimiser, updates=UPDATES
        )
        ids_BP = _random_ids(case.rows, case.prompt_tokens, vocabulary=self.student.config.vocab_size, seed=0)
        self._objective = Minillm(
            stage,
            prompts=[Prompt(uid=f"row-{row}", text="", ids=tuple(ids.tolist())) for row, ids in enumerate(ids_BP)],
            decoding=Decoding(max_new_tokens=case.new_tokens),
            teacher=self.teacher,
            ids=Ids(eos=(), pad=0),
            ranks=ranks,
            seed=0,
        )
        self._done = 0

    def step(self) -> None:
        """What the loop does in a step, the log and the progress bar left out."""
        collected, _ = self._objective.collect(self._done, self.student)
        with self._objective.learning(collected, self.student) as updates:
            for update in updates:
                self.student.update(update.losses)
                update.figures()
        self._done += 1

    def close(self) -> None:
        """Frees both engines."""
        self.student.close()
        self.teacher.close()


class Bare:
    """The parts, each by itself."""

    def __init__(self, case: StepCase, *, device: torch.device) -> None:
        self._case = case
        self._teacher = _loader(case.teacher, "teachers")().to(device).eval()  # type: ignore[arg-type]
        self._student = _loader(case.student, "students")().to(device).eval()  # type: ignore[arg-type]
        vocabulary = self._student.config.vocab_size
        self._ids_BP = _random_ids(case.rows, case.prompt_tokens, vocabulary=vocabulary, seed=0).to(device)
        more_BT = _random_ids(case.rows, case.new_tokens, vocabulary=vocabulary, seed=1).to(device)
        noise = torch.Generator().manual_seed(2)
        self._ids_BL = torch.cat([self._ids_BP, more_BT], dim=1)
        self._advantage_N = torch.randn(more_BT.numel(), generator=noise).to(device)
        states_NH = torch.randn(more_BT.numel(), self._teacher.config.hidden_size, generator=noise).to(device)
        self._view = TeacherView(head=_head(self._teacher), hidden_NH=states_NH)

    @torch.no_grad()
    def decode(self) -> Tensor:
        """Ids of the new tokens, [B, T]."""
        ids_BS, cache, drawn = self._ids_BP, None, []
        for _ in range(self._case.new_tokens):
            output = self._student(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids_BS = torch.multinomial(output.logits[:, -1].softmax(dim=-1), 1)
            drawn.append(ids_BS)
        return torch.cat(drawn, dim=1)

    @torch.no_grad()
    def teacher(self) -> Tensor:
        """Hidden states [B, L, H]; its logits belong to the update that needs them."""
        states_BLH: Tensor = self._teacher.base_model(input_ids=self._ids_BL, use_cache=False).last_hidden_state
        return states_BLH

    def update(self) -> Tensor:
        """Loss and gradient of the student, both models' logits whole; no optimiser."""
        self._student.zero_grad()
        first = self._case.prompt_tokens
        states_BLH = self._student.base_model(input_ids=self._ids_BL, use_cache=False).last_hidden_state
        loss = whole_logits_loss(
            states_BLH[:, first - 1 : -1].flatten(0, 1),
            head=_head(self._student),
            teacher=self._view,
            taken_N=self._ids_BL[:, first:].flatten(),
            advantage_N=self._advantage_N,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def _loader(name: str, kind: Any) -> Callable[[], PreTrainedModel]:
    card = load_card(name, kind=kind)
    facts = inspect(card)
    return lambda: load(card, facts, seed=0, dtype=torch.float32)


def _random_ids(rows: int, columns: int, *, vocabulary: int, seed: int) -> Tensor:
    return torch.randint(1, vocabulary, (rows, columns), generator=torch.Generator().manual_seed(seed))


def _head(model: PreTrainedModel) -> HeadWeights:
    projection = model.get_output_embeddings()
    return HeadWeights(weight_VH=projection.weight, bias_V=projection.bias)

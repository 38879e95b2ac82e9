"""What shared coins cost: the variance of a batch's gradient by how many groups of rows toss coins of their own.

Teacher mixing shares the coin of a position among the rows of a group (design D4): fewer groups, fewer calls of the
teacher; but the noise of a shared coin does not shrink with the batch. Here whole rollouts with fresh coins and tokens
are drawn, the gradient of MiniLLM's loss is taken of each, and its variance is summed over all parameters.

Legend: B rows, R rollouts, D parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.bare_student import BareStudent
from minillm.bench.bare import Sizes, check_pair, model_loader, random_prompts
from minillm.bench.pairs import threads
from minillm.cards import Kind, load_card
from minillm.loading import inspect
from minillm.models import CausalLM
from minillm.objectives import Minillm
from minillm.prompts import prepare, read_rows
from minillm.ranks import Ranks
from minillm.sampling import INDEPENDENT
from minillm.stage_base import OptimiserConfig
from minillm.stage_config import MinillmStage
from minillm.teacher_engine import Teacher
from minillm.types import Decoding, Ids, Prompt
from minillm.vocabulary import eos_ids

SHARPNESS = 2.0
"""Standard deviation of the logits of random models, nats: they then disagree about as trained ones do."""
MOST_TOKENS = 4096
"""Of a prompt, where the model sets no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoinCase:
    """Two models, and batches of some sizes from them; the models are made sharp if they are random."""

    teacher: str = "bench-world"
    student: str = "micro-world-16x1"
    sharpness: float | None = SHARPNESS
    """None leaves the models as they are."""
    prompt_tokens: int = 8
    new_tokens: int = 24
    teacher_mix: float = 0.2
    batches: tuple[int, ...] = (16, 64, 256)
    groups: tuple[int, ...] = (1, 4)
    """Besides independent coins."""
    rollouts: int = 24
    importance: str = "coin"
    baseline: str = "position_mean"
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CoinFigures:
    """Variances of the gradient, over that with independent coins of the same batch size."""

    case: CoinCase
    variance: dict[int, dict[str, float]]
    """By batch size and by groups ("1" is shared, "independent" is 1)."""
    error: dict[int, dict[str, float]]
    """Standard error of each of them, as if the two variances were of other rollouts."""
    absolute: dict[int, float]
    """With independent coins: summed over parameters, times the batch size."""


def measure_coins(
    case: CoinCase, *, prompts: Sequence[Prompt] | None = None, ends: tuple[int, ...] = ()
) -> CoinFigures:
    """Gradients of ``rollouts`` rollouts for each size and number of groups.

    ``prompts`` are drawn from in the order of a run; by default they are random, and no response ends early.
    """
    ranks = Ranks()
    with threads(case.threads):
        work = CoinWork(case, ranks=ranks, prompts=prompts, ends=ends)
        try:
            variance, error, absolute = {}, {}, {}
            for rows in case.batches:
                found = {name: work.variance(rows, groups) for name, groups in _groups_of(case, rows).items()}
                own, own_error = found["independent"]
                variance[rows] = {name: value / own for name, (value, _) in found.items()}
                error[rows] = {
                    name: value / own * ((of / value) ** 2 + (own_error / own) ** 2) ** 0.5
                    for name, (value, of) in found.items()
                    if name != "independent"
                }
                absolute[rows] = own * rows
        finally:
            work.close()
    return CoinFigures(case=case, variance=variance, error=error, absolute=absolute)


def spread_of_vectors(rows_RD: Tensor) -> tuple[float, float]:
    """Summed variance over D of R vectors, unbiased, and the standard error of it (by leaving one out, R > 2)."""
    count = len(rows_RD)
    assert count > 2, "a variance and its error need three rollouts"
    square_R = (rows_RD - rows_RD.mean(dim=0)).square().sum(dim=1)
    total = square_R.sum()
    # Without row r the sum of squares around the mean falls by square_r R / (R - 1).
    without_R = (total - square_R * count / (count - 1)) / (count - 2)
    error = ((count - 1) / count * (without_R - without_R.mean()).square().sum()).sqrt()
    return float(total / (count - 1)), float(error)


def prompts_of(source: str, *, student: str) -> tuple[list[Prompt], tuple[int, ...]]:
    """The rows of a file or split as prompts for a student, and the ids that end a response of it."""
    card = load_card(student, kind="students")
    facts = inspect(card)
    rows, _ = read_rows(source)
    most = facts.positions or MOST_TOKENS
    prompts, _ = prepare(
        rows, tokenizer=facts.tokenizer, template=card.template or "plain", max_prompt_tokens=most,
        over_long="error", max_response_tokens=most, eos_id=facts.tokenizer.eos_token_id,
        need_response=False, name=source,
    )  # fmt: skip
    return prompts, eos_ids(facts.tokenizer, facts.generation)


class CoinWork:
    """Both models, and gradients of whole rollouts."""

    def __init__(
        self, case: CoinCase, *, ranks: Ranks, prompts: Sequence[Prompt] | None, ends: tuple[int, ...]
    ) -> None:
        self._case, self._ranks, self._ends = case, ranks, ends
        self._optimiser = OptimiserConfig(lr=1e-5)
        longest = max([case.prompt_tokens, *(len(prompt.ids) for prompt in prompts or ())])
        sizes = Sizes(
            teacher=case.teacher, student=case.student, rows=max(case.batches), prompt_tokens=longest,
            new_tokens=case.new_tokens,
        )  # fmt: skip
        check_pair(sizes)
        for rows in case.batches:
            for groups in _groups_of(case, rows).values():
                self._stage(rows, groups)  # what cannot be combined is refused before anything is loaded
        self._teacher = Teacher(
            self._loader(case.teacher, "teachers"), ranks=ranks, placement="replicated", precision="fp32"
        )
        student: Any = self._loader(case.student, "students")()
        self._student = BareStudent(CausalLM(student.to(ranks.device).eval()), ranks=ranks)
        self._prompts = prompts or random_prompts(sizes, vocabulary=self._student.root.head.real_ids)

    def variance(self, rows: int, groups: int) -> tuple[float, float]:
        """Of the gradient of batches of this many rows, and its standard error; the same rollouts for each call."""
        case = self._case
        objective = Minillm(
            self._stage(rows, groups),
            prompts=self._prompts,
            decoding=Decoding(max_new_tokens=case.new_tokens),
            teacher=self._teacher,
            ids=Ids(eos=self._ends, pad=0),
            ranks=self._ranks,
            seed=0,
        )  # fmt: skip
        return spread_of_vectors(torch.stack([self._gradient(objective, step) for step in range(case.rollouts)]))

    def close(self) -> None:
        """Frees the teacher."""
        self._teacher.close()

    def _stage(self, rows: int, groups: int) -> MinillmStage:
        case = self._case
        return MinillmStage(
            steps=case.rollouts,
            prompts=rows,
            teacher_mix=case.teacher_mix,
            coin_groups=groups,
            importance=case.importance,  # type: ignore[arg-type]
            baseline=case.baseline,  # type: ignore[arg-type]
            optimiser=self._optimiser,
        )

    def _gradient(self, objective: Minillm, step: int) -> Tensor:
        """Of the loss of one rollout, all parameters side by side, [D]."""
        student: Any = self._student
        collected, _ = objective.collect(step, student)
        weights = list(self._student.root.parameters())
        with objective.learning(collected, student) as updates:
            (update,) = updates
            grads = [torch.autograd.grad(loss_of(), weights) for loss_of in update.losses]
        return torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]).sum(dim=0).double()

    def _loader(self, name: str, kind: Kind) -> Callable[[], PreTrainedModel]:
        load = model_loader(name, kind, dtype=torch.float32)
        sharpness = self._case.sharpness
        return load if sharpness is None else lambda: _sharpened(load(), sharpness)


def _groups_of(case: CoinCase, rows: int) -> dict[str, int]:
    few = {str(groups): groups for groups in case.groups if groups < rows}
    return {**few, "independent": INDEPENDENT * rows}


@torch.no_grad()
def _sharpened(model: Any, sharpness: float) -> PreTrainedModel:
    """The model with its output weights scaled so that logits have this standard deviation over random tokens."""
    projection = model.get_output_embeddings()
    if projection.weight is model.get_input_embeddings().weight:
        projection.weight = torch.nn.Parameter(projection.weight.clone())
    ids_BL = torch.arange(64).view(4, 16) % model.config.vocab_size
    hidden_BLH = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
    deviation = (hidden_BLH @ projection.weight.T).std(dim=-1).mean()
    projection.weight.mul_(sharpness / deviation)
    sharp: PreTrainedModel = model
    return sharp

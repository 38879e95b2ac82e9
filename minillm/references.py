"""Learning from given text: fine-tuning on reference responses, and the language-model loss beside another objective.

Legend: B rows, L positions, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.batches import ExampleBatch, example_batch
from minillm.config import SftStage
from minillm.engines import Student
from minillm.micro_batches import Limits
from minillm.order import WindowedOrder, share
from minillm.ranks import Ranks
from minillm.scoring import HeadWeights, TeacherView
from minillm.types import Example, Ids, Prompt
from minillm.updates import Loss, Sums, Update, in_step, limits_of, nobody


class Sft:
    """Cross-entropy on reference responses, averaged over the kept tokens of the whole step."""

    def __init__(self, stage: SftStage, *, prompts: Sequence[Prompt], ids: Ids, ranks: Ranks, seed: int) -> None:
        self._stage, self._prompts, self._ids, self._ranks = stage, prompts, ids, ranks
        lengths = [len(prompt.ids) + len(prompt.response_ids) for prompt in prompts]
        self._order = WindowedOrder(
            lengths, batch=stage.batch, window=stage.length_window, seed=seed, purpose=f"{stage.name}/rows"
        )

    def collect(self, step: int, student: Student) -> tuple[list[Prompt], dict[str, float]]:
        """The step's rows, the same list on every rank."""
        rows = [self._prompts[index] for index in self._order.batch(step)]
        return rows, {"tokens": float(sum(len(row.ids) + len(row.response_ids) for row in rows))}

    @contextmanager
    def learning(self, collected: list[Prompt], student: Student) -> Iterator[list[Update]]:
        """One step on them."""
        losses, sums = lm_losses(
            collected,
            student=student,
            ids=self._ids,
            ranks=self._ranks,
            limits=limits_of(self._stage),
            weight=1.0,
        )
        yield [Update(losses, lambda: {"loss": sums.over_ranks(self._ranks)["lm"]})]


@dataclass(frozen=True, slots=True)
class SoftLabels:
    """A teacher whose distribution takes a share of the reference's place."""

    read: Callable[[Tensor, Tensor], Tensor]
    head: HeadWeights
    share: float


def lm_losses(
    rows: Sequence[Example], *, student: Student, ids: Ids, ranks: Ranks, limits: Limits, weight: float,
    soft: SoftLabels | None = None,
) -> tuple[list[Loss], Sums]:  # fmt: skip
    """Micro-batch losses of this rank's share of ``rows``: cross-entropy over the kept tokens of *all* rows, times
    ``weight``; with ``soft`` partly the forward KL from its teacher (cross-entropy less the teacher's entropy).

    The sums hold the unweighted loss under ``lm``.
    """
    tokens = sum(len(row.response_ids) for row in rows)
    lengths = [len(row.ids) + len(row.response_ids) for row in rows]
    mine = share(range(len(rows)), lengths=lengths, rank=ranks.rank, ranks=ranks.size)
    sums = Sums({"lm": 0.0})

    def loss_of(indices: Sequence[int]) -> Tensor:
        inputs = nobody(ranks.device)
        if indices:
            inputs = _example_inputs(example_batch([rows[i] for i in indices], pad_id=ids.pad, device=ranks.device))
        loss, _ = student.loss(**inputs, **_against(soft, inputs, tokens=max(tokens, 1)))
        sums.add(lm=loss.detach())
        return weight * loss

    cuts = in_step([lengths[i] for i in mine], limits=limits, student=student, ranks=ranks)
    return [lambda picked=picked: loss_of([mine[at] for at in picked]) for picked in cuts], sums  # type: ignore[misc]


def _against(soft: SoftLabels | None, inputs: Mapping[str, Tensor], *, tokens: int) -> dict[str, Any]:
    """What a forward over references asks of the loss core."""
    if soft is None:
        return {"wanted": ("logq",), "loss": lambda of, _: -of["logq"].sum() / tokens}
    with torch.no_grad():
        hidden_BLH = soft.read(inputs["ids_BL"], inputs["mask_BL"])
    view = TeacherView(head=soft.head, hidden_NH=hidden_BLH[inputs["predict_BL"].roll(-1, dims=1)])

    def loss(of: Mapping[str, Tensor], _: slice) -> Tensor:
        return (soft.share * of["forward_kl"] - (1.0 - soft.share) * of["logq"]).sum() / tokens

    return {"wanted": ("logq", "forward_kl"), "teacher": view, "loss": loss}


def _example_inputs(batch: ExampleBatch) -> dict[str, Tensor]:
    return {"ids_BL": batch.ids_BL, "mask_BL": batch.mask_BL, "predict_BL": batch.target_BL}

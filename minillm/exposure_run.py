"""A student and its teacher each continue the prompts, and both are heard on both kinds of text.

Legend: B rows of a batch, T response positions, N tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minillm.batches import prompt_batch
from minillm.decode import roll_out
from minillm.errors import DataError
from minillm.evaluation import Judge, batches_of_rank
from minillm.exposure import LEAST_ALIVE, LEAST_PROMPTS, Texts, exposure_curve
from minillm.models import ModelReader
from minillm.ranks import Ranks
from minillm.scored_rows import spread
from minillm.scoring import TeacherView
from minillm.sweep import in_batches
from minillm.teacher_engine import Teacher
from minillm.types import Decoding, DrawKey, Prompt, PromptBatch, Purpose, Rollout
from minillm.unfinished import Keeper, Key

Heard = tuple[list[float], list[float]]
"""The KL before each token of the student's response to a prompt, and of the teacher's: as it is kept, too."""


def require_responses(prompts: Sequence[Prompt], *, samples: int) -> None:
    """Raise ``DataError`` where there are too few responses for even the first position of a curve."""
    if len(prompts) * samples < LEAST_ALIVE:
        raise DataError(
            f"evaluation.exposure.samples {samples} with {len(prompts)} test prompts: {len(prompts) * samples} "
            f"responses of each model, wanted at least {LEAST_ALIVE} at each position\n"
            "  raise samples, or give more prompts"
        )
    if len(prompts) < LEAST_PROMPTS:
        raise DataError(
            f"evaluation.exposure with {len(prompts)} test prompts, wanted at least {LEAST_PROMPTS} at each position\n"
            "  give more prompts; more samples of these say nothing of others"
        )


def measure_exposure(
    reader: ModelReader,
    judge: Judge,
    *,
    teacher: Teacher,
    samples: int,
    resamples: int,
    ranks: Ranks,
    title: str = "",
    keeper: Keeper | None = None,
) -> dict[str, Any]:
    """The curve of ``exposure.exposure_curve`` from ``samples`` continuations of each prompt by each of the two models.

    Both draw from their own distribution as it is (temperature 1, nothing truncated), as far as
    ``judge.decoding.max_new_tokens``, with the same random numbers: two equal models write the same text. Neither batch
    size nor ranks change a token. With a ``title`` there is a progress bar. A ``keeper`` has what an earlier process
    read, which is not read again, and keeps what this one reads.
    """
    batches = batches_of_rank(judge, numbers=range(samples), ranks=ranks)

    def hear(_: int, cells: Sequence[Key]) -> list[Heard]:
        return _hear(reader, judge, cells, teacher=teacher, ranks=ranks)

    # In one order, whatever the ranks: sums of floats depend on it.
    heard = in_batches(batches, hear, part="exposure", ranks=ranks, keeper=keeper, title=title)
    found = exposure_curve(
        _texts([(place, kl_T) for (place, _), (kl_T, _) in heard]),
        _texts([(place, kl_T) for (place, _), (_, kl_T) in heard]),
        prompts=len(judge.prompts),
        resamples=resamples,
        seed=judge.seed,
    )
    return {"samples": samples, "temperature": 1.0, **found}


def _hear(reader: ModelReader, judge: Judge, cells: Sequence[Key], *, teacher: Teacher, ranks: Ranks) -> list[Heard]:
    """What each (place of a prompt, which sample of it) brings."""
    rows = [judge.prompts[place] for place, _ in cells]
    batch = prompt_batch(rows, [sample for _, sample in cells], pad_id=judge.ids.pad, device=reader.device)
    sides = []
    for by_teacher in (False, True):
        rollout = _draw(batch, reader, judge, teacher=teacher, by_teacher=by_teacher, ranks=ranks)
        # The rollout calls whoever drew the student.
        student_BTH, teacher_BTH = rollout.student_hidden_BTH, rollout.teacher_hidden_BTH
        assert student_BTH is not None and teacher_BTH is not None
        if by_teacher:
            student_BTH, teacher_BTH = teacher_BTH, student_BTH
        sides.append(_forward_kl(rollout, reader, teacher, student_BTH=student_BTH, teacher_BTH=teacher_BTH))
    return list(zip(*sides, strict=True))


def _draw(
    batch: PromptBatch, reader: ModelReader, judge: Judge, *, teacher: Teacher, by_teacher: bool, ranks: Ranks
) -> Rollout:
    """Responses of one model, which the other one has read."""
    drawing, reading = (teacher.reader, reader) if by_teacher else (reader, teacher.reader)
    return ranks.together(
        lambda: roll_out(
            batch,
            student=drawing,
            teacher=reading,
            decoding=Decoding(max_new_tokens=judge.decoding.max_new_tokens),
            key=DrawKey(seed=judge.seed, stage="", purpose=Purpose.EXPOSURE, rollout=0),
            eos_ids=judge.ids.eos,
            pad_id=judge.ids.pad,
            keep_hidden=True,
            anyone=ranks.anyone if reader.lockstep or teacher.reader.lockstep else bool,
        )
    )


@torch.no_grad()
def _forward_kl(
    rollout: Rollout, reader: ModelReader, teacher: Teacher, *, student_BTH: Tensor, teacher_BTH: Tensor
) -> list[list[float]]:
    """KL(teacher || student) at the state before each token of each row, without padding."""
    mask_BT = rollout.mask_BT
    with teacher.head() as head, reader.scoring():
        kl_N = reader.statistics(
            student_BTH[mask_BT],
            taken_N=rollout.response_BT[mask_BT],
            wanted=("forward_kl",),
            teacher=TeacherView(head=head, hidden_NH=teacher_BTH[mask_BT]),
        )["forward_kl"]
    kl_BT = spread(kl_N.double(), mask_BT).tolist()
    return [row_T[:length] for row_T, length in zip(kl_BT, rollout.length_B.tolist(), strict=True)]


def _texts(heard: Sequence[tuple[int, Sequence[float]]]) -> Texts:
    """Responses, each with the place of its prompt, side by side and right-padded."""
    width = max(len(kl_T) for _, kl_T in heard)
    kl_BT, alive_BT = np.zeros((len(heard), width)), np.zeros((len(heard), width), dtype=bool)
    for row, (_, kl_T) in enumerate(heard):
        kl_BT[row, : len(kl_T)], alive_BT[row, : len(kl_T)] = kl_T, True
    return Texts(kl_BT=kl_BT, alive_BT=alive_BT, prompt_B=np.array([place for place, _ in heard], dtype=np.int64))

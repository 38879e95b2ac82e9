"""Whole optimiser steps in DeepSpeed's engine, in this one process, against plain torch.

Legend: B rows, L positions, T response positions, V ids.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minillm import objectives, references, student_engine, teacher_engine
from minillm.cards import Card
from minillm.config import MinillmStage, OptimiserConfig
from minillm.loading import inspect, load, quiet_transformers
from minillm.micro_batches import Limits
from minillm.models import CausalLM
from minillm.ranks import Ranks
from minillm.selftest.check import Check, Found, worst
from minillm.selftest.tiny import Tiny, tiny
from minillm.types import Decoding, Ids, Prompt, Rollout

UPDATES = 2
# At a large eps the size of a gradient counts, and noise where it ought to be 0 does not become a whole step.
OPTIMISER = OptimiserConfig(lr=0.05, eps=1e-2, weight_decay=0.1, warmup_steps=UPDATES)
DECODING = Decoding(max_new_tokens=6, temperature=0.9)
CLOSE = 1e-4
"""Limit of the largest difference of a weight, as a share of the largest step of one, in float32."""
STUDENT, TEACHER = 1, 2


def prompts(eos: int) -> list[Prompt]:
    """Five texts of several lengths with references."""
    texts = [tuple(5 + 13 * (n + 5 * row) % 200 for n in range(2 + row)) for row in range(5)]
    return [Prompt(uid=str(row), text="", ids=ids, response_ids=(*ids[:2], eos)) for row, ids in enumerate(texts)]


class Trained:
    """A tiny student in an engine; its twin beside it takes the same steps in plain torch."""

    def __init__(self, *, settings: str) -> None:
        self.made: Tiny = tiny("gpt2")
        self.ranks = Ranks()
        self.ids = Ids(eos=(self.made.eos,), pad=self.made.eos)
        self.student = student_engine.Student(
            lambda: self.made.load(STUDENT), ranks=self.ranks, settings=settings, precision="fp32",
            optimiser=OPTIMISER, updates=UPDATES, real_ids=self.made.ids, from_files=False,
        )  # fmt: skip
        self.twin = self.made.load(STUDENT).eval().to(self.ranks.device)
        matrices, vectors = ([p for p in self.twin.parameters() if (p.dim() > 1) is flat] for flat in (True, False))
        self._adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": OPTIMISER.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=OPTIMISER.lr, betas=OPTIMISER.betas, eps=OPTIMISER.eps,
        )  # fmt: skip

    def __enter__(self) -> Trained:
        return self

    def __exit__(self, *_: object) -> None:
        self.student.close()

    def step_twin(self, loss: Tensor, *, rate: float) -> tuple[float, float]:
        """One plain step: gradient, clip by its norm, AdamW; the loss and the norm."""
        self._adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.twin.parameters(), OPTIMISER.clip_grad)
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        return float(loss.detach()), float(norm)

    def apart(self) -> float:
        """The largest difference of a weight between the two, over the largest step that one has made."""
        mine = self.student.state()
        begun, ended = (dict(CausalLM(model).named_parameters()) for model in (self.made.load(STUDENT), self.twin))
        assert mine.keys() >= ended.keys()
        gaps = [(mine[name] - ended[name].detach().cpu()).abs().max() for name in ended]
        moves = [(ended[name].detach().cpu() - begun[name].detach()).abs().max() for name in ended]
        return worst(*gaps) / worst(*moves)


def rate(update: int) -> float:
    """Of the warm-up: half of it, then all."""
    return OPTIMISER.lr * (update + 1) / UPDATES


def fine_tuning(settings: str, *, rows_at_once: int = 0) -> Found:
    """Two steps of cross-entropy on references, each the mean over the tokens of all rows."""
    with Trained(settings=settings) as work:
        rows, errors = prompts(work.made.eos), []
        for update in range(UPDATES):
            losses, _ = references.text_losses(
                rows, references.likelihood(), denominator=references.learnt_tokens(rows), student=work.student,
                ids=work.ids, ranks=work.ranks, limits=Limits(rows=rows_at_once),
            )  # fmt: skip
            got = work.student.update(losses)
            want = work.step_twin(cross_entropy(work.twin, rows), rate=rate(update))
            errors += [abs(mine - theirs) for mine, theirs in zip(got, want, strict=True)]
        return Found(worst(work.apart(), *errors), CLOSE)


def cross_entropy(model: PreTrainedModel, rows: Sequence[Prompt]) -> Tensor:
    """The mean over all reference tokens, row by row, without padding."""
    total = torch.zeros((), device=model.device)
    for row in rows:
        ids_1L = torch.tensor([row.ids + row.response_ids], device=model.device)
        at = len(row.ids)
        logits_SV = model(ids_1L).logits[0, at - 1 : -1]
        total = total + nn.functional.cross_entropy(logits_SV, ids_1L[0, at:], reduction="sum")
    return total / sum(len(row.response_ids) for row in rows)


def minillm_step(settings: str, *, placement: str = "replicated", rows_at_once: int = 0) -> Found:
    """A rollout mixed with the teacher, its scores and credit, and two passes over it, each one update."""
    chosen = MinillmStage(
        steps=1, prompts=5, optimiser=OPTIMISER, teacher_mix=0.3, importance="coin", baseline="none",
        inner_epochs=UPDATES, micro_batch=rows_at_once,
    )  # fmt: skip
    with Trained(settings=settings) as work, saved(work.made, TEACHER) as load_teacher:
        teacher = teacher_engine.Teacher(
            load_teacher, ranks=work.ranks, placement=placement, precision="fp32", real_ids=work.made.ids
        )
        objective = objectives.Minillm(
            chosen, prompts=prompts(work.made.eos), decoding=DECODING, teacher=teacher, ids=work.ids, ranks=work.ranks,
            seed=3,
        )  # fmt: skip
        guide, old = load_teacher().eval().to(work.ranks.device), list[Tensor]()
        collected, _ = objective.collect(0, work.student)
        errors: list[float] = []
        with objective.learning(collected, work.student) as updates:
            for number, update in enumerate(updates):
                got = work.student.update(update.losses)
                loss = reverse_kl(work.twin, guide, collected.targets.scored.rollout, old, clip=chosen.clip or 0.0)
                want = work.step_twin(loss, rate=rate(number))
                errors += [abs(mine - theirs) for mine, theirs in zip(got, want, strict=True)]
        found = Found(worst(work.apart(), *errors), CLOSE)
        teacher.close()
        return found


@contextlib.contextmanager
def saved(made: Tiny, seed: int) -> Iterator[Callable[[], PreTrainedModel]]:
    """A model in a folder, and how to load it from there while the block lasts: shards are made of what is read."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        made.load(seed).save_pretrained(folder)
        made.facts.tokenizer.save_pretrained(folder)
        card = Card(name="saved", model=folder)
        facts = inspect(card)
        yield lambda: load(card, facts, seed=0)


def reverse_kl(
    model: PreTrainedModel, guide: PreTrainedModel, rollout: Rollout, old: list[Tensor], *, clip: float
) -> Tensor:
    """MiniLLM's loss written out, row by row from whole logits: the KL at each state, and the clipped policy gradient
    with minus the KL of all later states as credit, weighted by coin.

    ``old`` keeps the log-probabilities and credit of the first call, which is at the weights that sampled.
    """
    first, rows = not old, len(rollout.stop_B)
    total = torch.zeros((), device=model.device)
    for row in range(rows):
        prompt = rollout.prompts.ids_BP[row][rollout.prompts.mask_BP[row]]
        kept_T = rollout.mask_BT[row]
        response = rollout.response_BT[row][kept_T]
        ids_1L = torch.cat([prompt, response])[None]
        both = [each(ids_1L).logits[0, len(prompt) - 1 : -1] / DECODING.temperature for each in (model, guide)]
        logq_TV, logp_TV = both[0].log_softmax(-1), both[1].detach().log_softmax(-1)
        kl_T = (logq_TV.exp() * (logq_TV - logp_TV)).sum(-1)
        logq_T = logq_TV.gather(1, response[:, None])[:, 0]
        if first:
            value_T = kl_T.detach()
            old.append(torch.stack([logq_T.detach(), value_T - value_T.flip(0).cumsum(0).flip(0)]))
        old_T, credit_T = old[row]
        ratio_T = (logq_T - old_T).exp()
        weight_T = torch.where(rollout.teacher_drew_BT[row][kept_T], 0.0, 1.0 / 0.7)
        gain_T = torch.minimum(ratio_T * credit_T, ratio_T.clamp(1 - clip, 1 + clip) * credit_T)
        total = total + kl_T.sum() - (weight_T * gain_T).sum()
    return total / (rows * DECODING.max_new_tokens)


CHECKS = (
    Check(name="step: cross-entropy, ZeRO 0, against AdamW", run=partial(fine_tuning, "zero0")),
    Check(name="step: cross-entropy, ZeRO 2, against AdamW", run=partial(fine_tuning, "zero2")),
    Check(name="step: cross-entropy in micro-batches", run=partial(fine_tuning, "zero2", rows_at_once=2)),
    Check(name="step: MiniLLM, ZeRO 0, against AdamW", run=partial(minillm_step, "zero0")),
    Check(name="step: MiniLLM, ZeRO 3, sharded teacher", run=partial(minillm_step, "zero3", placement="zero3")),
    Check(name="step: MiniLLM in micro-batches, ZeRO 2", run=partial(minillm_step, "zero2", rows_at_once=2)),
)

"""Objectives: from prompts to losses that an engine can step on. Each is assembled from plugs and knows nothing of
the others.

Legend: B this rank's rows, A all ranks' rows, P prompt positions, T response positions, L = P + T, N kept tokens of a
micro-batch.

An objective has two halves. ``collect`` does everything that needs no gradient (for MiniLLM: prompts -> rollout ->
scored -> targets). ``learning`` turns the result into optimiser steps, each a list of micro-batch losses divided by
*global* denominators (design D7), so that ranks, micro-batches and padding change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minillm import phases
from minillm.advantages import RowNames, targets_of
from minillm.batches import prompt_batch
from minillm.config import MinillmStage
from minillm.decode import roll_out
from minillm.errors import NonFinite
from minillm.left_out import LeftOut
from minillm.models import ModelReader
from minillm.order import GlobalOrder, occurrences, parts, share
from minillm.policy_loss import clipped_surrogate
from minillm.practice import Practice, rollout_inputs
from minillm.prompt_table import answered
from minillm.ranks import Ranks
from minillm.references import Lesson, TeacherText, learnt_tokens, likelihood, soft_labels, text_losses
from minillm.rollout_figures import rollout_figures, text_figures
from minillm.scored_rows import prompts_of, shown
from minillm.scoring import HeadWeights, TeacherView, score
from minillm.shadow import Held, Shadow, anchor_scores
from minillm.state import State, States, together
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.types import (
    Decoding,
    DrawKey,
    Example,
    Examples,
    Ids,
    Prompt,
    PromptBatch,
    Purpose,
    Rollout,
    Scored,
    Targets,
)
from minillm.updates import Loss, News, Sums, Update, in_step, limits_of

_TEACHER_ROWS = 64
"""Responses of all ranks, at most, from which the teacher's own level of repetition and length is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What one MiniLLM rollout left behind: what its passes read, and rows for the language-model anchor if there is
    one."""

    practice: Practice
    anchor: list[Example]
    """Those of all updates, one after the other; where there are fewer, each pass takes the same again."""
    step: int
    mine: list[int]
    """This rank's rows among those of all ranks."""
    sequences: int
    """Rows of all ranks, those that are gone included."""
    gone: frozenset[int]
    """Rows of all ranks that were left out."""
    judged: Targets | None
    """All that is known of the rollout; None in one that was taken up again."""

    @property
    def targets(self) -> Targets:
        """All that is known of a rollout of this process's own."""
        assert self.judged is not None, "a step that was taken up again has what its passes read, and no more"
        return self.judged


class Minillm:
    """MiniLLM (Gu et al., ICLR 2024): exact single-step reverse KL plus a long-horizon policy gradient on the
    student's own text."""

    def __init__(
        self, stage: MinillmStage, *, prompts: Sequence[Prompt], decoding: Decoding, teacher: Teacher,
        ids: Ids, ranks: Ranks, seed: int, corpus: Examples | None = None,
    ) -> None:  # fmt: skip
        """``corpus`` is what the language-model loss learns from: the prompts' own responses where it is None."""
        assert decoding.repetition_penalty == 1.0, "the run's check refuses it"
        self._stage, self._prompts, self._decoding = stage, prompts, decoding
        self._teacher, self._ids, self._ranks, self._seed = teacher, ids, ranks, seed
        self._order = GlobalOrder(len(prompts), seed, f"{stage.name}/rows")
        self._left_out = LeftOut(stage, ranks)
        self._shadow = None if stage.anchor is None else Shadow(rate=stage.anchor.rate)
        self._constant = stage.expected_length or float(decoding.max_new_tokens)
        self._anchor_order = None
        if stage.lm_coefficient > 0.0:
            self._anchored: Examples = answered(prompts) if corpus is None else corpus
            self._anchor_order = GlobalOrder(
                len(self._anchored), seed, f"{stage.name}/{'anchor' if corpus is None else 'corpus'}"
            )
            # Of a corpus every update takes other text; the run's own rows stay those of a rollout.
            updates = stage.inner_batches if corpus is None else stage.updates_per_step
            self._anchor_rows = stage.lm_batch * updates

    def collect(self, step: int, student: Student) -> tuple[Collected, dict[str, float]]:
        """Prompts -> rollout -> scored -> targets, without gradient."""
        stage = self._stage
        rows, mine = self._rows(step)
        if self._shadow is not None:
            self._shadow.begin(student)
        with student.whole() as reader, self._teacher.head() as head:
            own = [rows[i] for i in mine]
            rollout = self._ranks.together(
                lambda: self._roll_out(
                    reader, own, purpose=Purpose.TOKEN, rollout=step, teacher=self._teacher.reader,
                    teacher_mix=stage.teacher_mix, coin_groups=stage.coin_groups, keep_hidden=True,
                    policy_step=student.updates_done,
                )
            )  # fmt: skip
            phases.enter("scoring")
            with reader.scoring(), self._held(student) as anchor:
                kept = self._ranks.together(
                    lambda: self._left_out.scored(rollout, lambda left: self._scores(left, reader, head, anchor))
                )
            level = dict[str, float]()
            if step == 0 and stage.alarms.repetition is not None:
                some = [rows[i] for i in mine if i < _TEACHER_ROWS]
                level = self._left_out.spared(lambda: self._teacher_level(some), level, what="the teacher's own level")
        gone = self._left_out.agreed(kept, mine=mine, uid_B=rollout.prompts.uid_B, sequences=len(rows))
        mine, (scored, reward_logp_BT) = [mine[row] for row in kept.rows], kept.scores
        names = RowNames.of(kept.rollout, prompt=[rows[i][0] for i in mine], row=mine, coin_groups=stage.coin_groups)
        targets = targets_of(
            scored, stage, names=names, ranks=self._ranks, longest=self._decoding.max_new_tokens,
            reward_logp_BT=reward_logp_BT,
        )  # fmt: skip
        collected = Collected(
            practice=Practice.of(targets), anchor=self._anchor(step), step=step, mine=mine, sequences=len(rows),
            gone=gone, judged=targets,
        )  # fmt: skip
        return collected, {**rollout_figures(targets, sequences=len(rows) - len(gone), ranks=self._ranks), **level}

    def hear(self, measured: Mapping[str, float]) -> None:
        """Validation changes nothing here."""

    def news(self) -> list[News]:
        """Rows that were left out."""
        return self._left_out.news()

    def shown(self, collected: Collected) -> State:
        """This rank's rows, and what is learnt of each token."""
        practice = collected.practice
        names = ("logq_BT", "advantage_BT", "importance_BT")
        return shown(practice.prompts, practice, {name: getattr(practice, name) for name in names})

    def state(self) -> State:
        """How many rows were left out, and the anchor; what else a step does is a function of its number and the
        student's weights."""
        left = self._left_out.state()
        return left if self._shadow is None else together({"rows": left, "anchor": self._shadow.state()})

    def restore(self, state: State) -> None:
        """Takes that up."""
        if self._shadow is not None:
            self._shadow.restore(state.part("anchor").tensors, device=self._ranks.device)
            state = state.part("rows")
        self._left_out.restore(state)

    def pack(self, collected: Collected) -> States:
        """This rank's rows, as its passes read them; the rest a step has by its number."""
        gone = {"gone": sorted(collected.gone)} if collected.gone else {}
        return States(State(gone), collected.practice.state())

    def unpack(self, states: States, *, step: int) -> Collected:
        """The same rows again; the teacher and the student are not asked."""
        rows, mine = self._rows(step)
        gone = frozenset(states.shared.record.get("gone", ()))
        left = [at for at, row in enumerate(mine) if row not in gone]
        prompts = prompts_of(self._prompt_batch([rows[row] for row in mine]), left)  # as wide as they were
        practice, mine = Practice.from_state(states.own, prompts=prompts), [mine[at] for at in left]
        return Collected(
            practice=practice, anchor=self._anchor(step), step=step, mine=mine, sequences=len(rows), gone=gone,
            judged=None,
        )  # fmt: skip

    @contextmanager
    def learning(self, collected: Collected, student: Student, *, made: int = 0) -> Iterator[Iterator[Update]]:
        """The passes over the same rollout; the teacher's head is gathered once for all of them."""
        with self._teacher.head() as head:
            yield self._updates(collected, student=student, head=head, made=made)

    def _rows(self, step: int) -> tuple[list[tuple[int, int]], list[int]]:
        """A step's rows, by prompt and sample, and which of them are this rank's."""
        stage = self._stage
        indices = self._order.take(step * stage.prompts, stage.prompts)
        # A prompt that stands twice where epochs meet gets other samples, not the same ones again.
        rows = [
            (index, again * stage.samples_per_prompt + sample)
            for index, again in zip(indices, occurrences(indices), strict=True)
            for sample in range(stage.samples_per_prompt)
        ]
        lengths = [len(self._prompts[index].ids) for index, _ in rows]
        return rows, share(range(len(rows)), lengths=lengths, rank=self._ranks.rank, ranks=self._ranks.size)

    def _anchor(self, step: int) -> list[Example]:
        if self._anchor_order is None:
            return []
        return [self._anchored[index] for index in self._anchor_order.take(step * self._anchor_rows, self._anchor_rows)]

    def _updates(self, collected: Collected, *, student: Student, head: HeadWeights, made: int) -> Iterator[Update]:
        """Every part of the rollout in every pass, until the student has moved too far from the one that sampled."""
        stage, practice = self._stage, collected.practice
        length_B = practice.prompts.mask_BP.sum(dim=1) + practice.mask_BT.sum(dim=1)
        for epoch in range(stage.inner_epochs):
            dealt = parts(
                collected.sequences, stage.inner_batches, seed=self._seed, purpose=f"{stage.name}/inner",
                epoch=collected.step * stage.inner_epochs + epoch,
            )  # fmt: skip
            for number, numbers in enumerate(dealt):
                if epoch * stage.inner_batches + number < made:
                    continue
                part = {*numbers} - collected.gone
                if not part:
                    raise NonFinite("no row is left of an update: all of its rows were left out; none was made")
                rows = [at for at, row in enumerate(collected.mine) if row in part]
                cuts = in_step(length_B[rows].tolist(), limits=limits_of(stage), student=student, ranks=self._ranks)
                anchor = _in_turn(collected.anchor, epoch * stage.inner_batches + number, size=stage.lm_batch)
                batches = [[rows[at] for at in cut] for cut in cuts]
                shared = float(len(part)) * self._constant
                if stage.published.token_mean:
                    shared = max(1.0, float(self._ranks.sum([float(practice.mask_BT[rows].sum())])[0]))
                sums = Sums(dict.fromkeys(("single", "long", "clipped", "clamped", "drift", "kept"), 0.0))
                yield self._update(collected, batches, anchor, shared=shared, student=student, head=head, sums=sums)
                if stage.inner_kl is not None:
                    total = sums.over_ranks(self._ranks)
                    if total["drift"] > stage.inner_kl * total["kept"]:
                        return

    def _update(
        self, collected: Collected, batches: Sequence[Sequence[int]], anchor: Sequence[Example], *, shared: float,
        student: Student, head: HeadWeights, sums: Sums,
    ) -> Update:  # fmt: skip
        """One step on these micro-batches of the rollout, and on these rows of the anchor.

        ``shared`` is the denominator of the policy gradient, from the rows of all ranks (design D7).
        """

        def loss_on(rows: Sequence[int]) -> Loss:
            return lambda: self._loss(rows, collected, shared=shared, student=student, head=head, sums=sums)

        losses, anchor_sums = [loss_on(rows) for rows in batches], Sums({"lm": 0.0})
        if anchor:
            more, anchor_sums = text_losses(
                anchor, self._anchor_lesson(head), denominator=learnt_tokens(anchor), student=student, ids=self._ids,
                ranks=self._ranks, limits=limits_of(self._stage), weight=self._stage.lm_coefficient, name="lm",
            )  # fmt: skip
            losses += more
        figures = partial(self._update_figures, sums, anchor_sums)
        largest = ("clipped_share", "clamped_share")
        if self._shadow is None:
            return Update(losses, figures, largest=largest)
        return Update(losses, figures, largest=largest, follow=partial(self._shadow.follow, student))

    def _anchor_lesson(self, head: HeadWeights) -> Lesson:
        if self._stage.lm_teacher_share == 0:
            return likelihood()
        return soft_labels(TeacherText(self._teacher.reader.read, head), share=self._stage.lm_teacher_share)

    def _teacher_level(self, rows: Sequence[tuple[int, int]]) -> dict[str, float]:
        """How long the teacher's own responses to some of the first prompts are, and how much they repeat: grammar
        repeats itself too, so the student's repetition says something beside the teacher's only."""
        text = self._ranks.together(
            lambda: self._roll_out(self._teacher.reader, rows, purpose=Purpose.VALIDATION, rollout=0)
        )
        return {f"teacher_{name}": value for name, value in text_figures(text, ranks=self._ranks).items()}

    def _held(self, student: Student) -> AbstractContextManager[Held | None]:
        return nullcontext() if self._shadow is None else self._shadow.reading(student)

    def _scores(
        self, rollout: Rollout, reader: ModelReader, head: HeadWeights, anchor: Held | None
    ) -> tuple[Scored, Tensor | None]:
        """Of a rollout, or a part of it; and what stands in for the teacher's log-probabilities in rewards."""
        temperature = self._decoding.temperature
        scored = score(rollout, student=reader, teacher_head=head, temperature=temperature)
        if anchor is not None:
            said = anchor_scores(rollout, anchor=anchor, student=reader, temperature=temperature)
            scored = replace(scored, anchor=said)
        if not self._stage.published.untempered_reward or temperature == 1.0:
            return scored, None
        return scored, score(rollout, student=reader, teacher_head=head, temperature=1.0).logp_BT

    def _prompt_batch(self, rows: Sequence[tuple[int, int]]) -> PromptBatch:
        return prompt_batch(
            [self._prompts[index] for index, _ in rows],
            [sample for _, sample in rows],
            pad_id=self._ids.pad,
            device=self._ranks.device,
        )

    def _roll_out(
        self, reader: ModelReader, rows: Sequence[tuple[int, int]], *, purpose: Purpose, rollout: int, **more: Any
    ) -> Rollout:
        """Responses to these rows; a ``NonFinite`` brings their prompts."""
        prompts = self._prompt_batch(rows)
        try:
            return roll_out(
                prompts,
                student=reader,
                decoding=self._decoding,
                key=DrawKey(seed=self._seed, stage=self._stage.name, purpose=purpose, rollout=rollout),
                eos_ids=self._ids.eos,
                pad_id=self._ids.pad,
                # Ranks need not stay in step token by token unless weights are shared among them.
                anyone=self._ranks.anyone if reader.lockstep or self._teacher.reader.lockstep else bool,
                **more,
            )
        except NonFinite as error:
            error.batch = shown(prompts, None, {})
            raise

    def _loss(
        self,
        rows: Sequence[int],
        collected: Collected,
        *,
        shared: float,
        student: Student,
        head: HeadWeights,
        sums: Sums,
    ) -> Tensor:
        """One micro-batch: (single-step KL + long-horizon surrogate) / ``shared``."""
        stage, practice = self._stage, collected.practice
        keep_BT = _kept_rows(practice.mask_BT, rows)
        logq_N = _pick(practice.logq_BT, rows, keep_BT)
        advantage_N = _pick(practice.advantage_BT, rows, keep_BT)
        importance_N = _pick(practice.importance_BT, rows, keep_BT)
        single_N = None if practice.single_weight_BT is None else _pick(practice.single_weight_BT, rows, keep_BT)

        def loss_of(numbers: Mapping[str, Tensor], here: slice) -> Tensor:
            surrogate = clipped_surrogate(
                numbers["logq"], logq_N[here], advantage=advantage_N[here], importance=importance_N[here],
                clip=stage.clip, max_log_ratio=stage.max_log_ratio, dual_clip=stage.dual_clip,
                weight_in_clip=stage.published.weight_in_clip,
            )  # fmt: skip
            kl_N = numbers["reverse_kl"] if single_N is None else numbers["reverse_kl"] * single_N[here]
            single, long = kl_N.sum() / shared, surrogate.loss.sum() / shared
            sums.add(
                single=single.detach(), long=long.detach(), kept=len(surrogate.loss),
                clipped=surrogate.clipped.sum(), clamped=surrogate.clamped.sum(), drift=surrogate.drift.sum(),
            )  # fmt: skip
            return stage.single_weight * single + stage.long_weight * long

        loss, _ = student.loss(
            **rollout_inputs(practice, rows),
            wanted=("logq", "reverse_kl"),
            temperature=self._decoding.temperature,
            teacher=TeacherView(head=head, hidden_NH=_pick(practice.teacher_hidden_BTH, rows, keep_BT)),
            support_NC=None if practice.support_BTC is None else _pick(practice.support_BTC, rows, keep_BT),
            loss=loss_of,
        )
        return loss

    def _update_figures(self, sums: Sums, anchor: Sums) -> dict[str, float]:
        total = sums.over_ranks(self._ranks)
        stage, kept = self._stage, max(total["kept"], 1.0)
        figures = {
            "single_loss": total["single"],
            "long_loss": total["long"],
            "clipped_share": total["clipped"] / kept,
            "clamped_share": total["clamped"] / kept,
            "drift": total["drift"] / kept,
        }
        loss = stage.single_weight * total["single"] + stage.long_weight * total["long"]
        if self._anchor_order is not None:
            figures["lm_loss"] = anchor.over_ranks(self._ranks)["lm"]
            loss += stage.lm_coefficient * figures["lm_loss"]
        if self._shadow is not None:
            figures["anchor_drift"] = self._shadow.drift
        return {"loss": loss, **figures}


def _in_turn(rows: Sequence[Example], update: int, *, size: int) -> Sequence[Example]:
    """The ``size`` rows of an update, counted from 0; from the first again where they have all been taken."""
    first = update * size % max(len(rows), 1)
    return rows[first : first + size]


def _kept_rows(mask_BT: Tensor, rows: Sequence[int]) -> Tensor:
    return mask_BT[torch.as_tensor(rows, dtype=torch.long, device=mask_BT.device)]


def _pick(value_BTX: Tensor, rows: Sequence[int], keep_BT: Tensor) -> Tensor:
    """The kept entries of some rows, [N, ...], in row order: the order in which a training forward returns them."""
    return value_BTX[torch.as_tensor(rows, dtype=torch.long, device=value_BTX.device)][keep_BT]

"""MiniLLM's neighbours as one objective: a divergence from the teacher at each token, on references and on the
student's own text.

Legend: B rows, T response positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from minillm.batches import prompt_batch
from minillm.decode import roll_out
from minillm.order import GlobalOrder, occurrences, share
from minillm.prompt_table import answered
from minillm.ranks import Ranks
from minillm.references import Lesson, TeacherText, text_losses
from minillm.scoring import TeacherView
from minillm.state import State, States, together
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.text_mix import FollowedShare, Replay, Source, Written, packed, sources, unpacked
from minillm.text_stages import DistilStage
from minillm.types import Decoding, DrawKey, Example, Ids, Prompt, Purpose, Rollout
from minillm.updates import News, Update, limits_of, shown_text


class Distil:
    """ImitKD, GKD, on-policy reverse KL and DistiLLM: one batch of text a step, one divergence, no credit.

    The loss is the sum over the batch's tokens by (rows x ``expected_length``): never by a sampled length, which would
    bend the gradient (design D7). Both models are read at ``decoding.temperature``, and over the whole vocabulary
    whatever ids sampling leaves out.
    """

    def __init__(
        self, stage: DistilStage, *, prompts: Sequence[Prompt], decoding: Decoding, teacher: Teacher, ids: Ids,
        ranks: Ranks, seed: int,
    ) -> None:  # fmt: skip
        self._stage, self._prompts, self._decoding = stage, prompts, decoding
        self._teacher, self._ids, self._ranks, self._seed = teacher, ids, ranks, seed
        self._answered = answered(prompts)
        self._order = GlobalOrder(len(prompts), seed, f"{stage.name}/rows")
        self._references = GlobalOrder(max(1, len(self._answered)), seed, f"{stage.name}/references")
        plan = stage.plan
        self._followed = FollowedShare(plan.student_share or 0.0, plan.share_step, plan.loss_rise)
        self._replay = Replay(plan.replay)

    def collect(self, step: int, student: Student) -> tuple[list[Example], dict[str, float]]:
        """The step's text, the same list on every rank."""
        stage, key = self._stage, f"{self._seed}/{self._stage.name}"
        # What is kept takes over from what is fresh as the stage goes on, but not before there is enough of it: after a
        # late rise of the student's share a few first rows would be learnt over and over.
        fresh_share = 1.0 - step / stage.steps if self._replay.full else 1.0
        chosen = sources(
            step, stage.batch, student_share=self._followed.share, fresh_share=fresh_share, key=f"{key}/text"
        )
        fresh = self._written(step, chosen, student)
        text: list[Example] = []
        own, kept = iter(fresh), iter(self._replay.draw(chosen.count("kept"), f"{key}/kept/{step}"))
        for row, source in enumerate(chosen):
            if source == "reference":
                text.append(self._answered[self._references.row(step * stage.batch + row)])
            else:
                text.append(next(own if source == "fresh" else kept))
        self._replay.add(fresh)
        sampled = sum(len(row.response_ids) for row in fresh)
        figures = {
            "tokens": float(sum(len(row.response_ids) for row in text)),
            "sampled_tokens": float(sampled),
            "student_rows": float(len(chosen) - chosen.count("reference")),
            "kept_rows": float(chosen.count("kept")),
            "student_share": self._followed.share,
        }
        if fresh:
            ended = sum(row.response_ids[-1] in self._ids.eos for row in fresh)
            figures |= {"mean_length": (sampled - ended) / len(fresh), "cut_share": 1.0 - ended / len(fresh)}
        return text, figures

    @contextmanager
    def learning(self, collected: Sequence[Example], student: Student, *, made: int = 0) -> Iterator[Iterator[Update]]:
        """The passes over the same text; the teacher reads it in the first one."""
        with self._teacher.head() as head:
            plan = self._stage.plan
            lesson = Lesson(
                wanted=(plan.divergence,), per_token=lambda of: of[plan.divergence],
                teacher=TeacherText(self._teacher.reader.read, head),
                settings={"temperature": self._decoding.temperature, **plan.settings},
            )  # fmt: skip
            yield self._updates(collected, lesson, student, made=made)

    def parting_words(self) -> list[str]:
        """What the stage should not end without saying."""
        if self._stage.plan.student_share is not None or self._followed.share > 0:
            return []
        return [
            f"stage {self._stage.name}: the share of the student's own text never left 0, since the validation loss "
            f"never rose by {self._stage.plan.loss_rise:g} nats a token; it learnt from references alone"
        ]

    def hear(self, measured: Mapping[str, float]) -> None:
        """The share of the student's own text may follow the validation loss."""
        if self._stage.plan.student_share is None:
            self._followed.hear(measured["loss"])

    def news(self) -> list[News]:
        """Nothing ever does."""
        return []

    def shown(self, collected: Sequence[Example]) -> State:
        """The step's text."""
        return shown_text(collected)

    def state(self) -> State:
        """How much of the text is the student's own by now, and what of it is kept to be learnt from again."""
        parts = {}
        if self._stage.plan.student_share is None:
            parts["followed"] = self._followed.state()
        if self._stage.plan.replay:
            parts["replay"] = self._replay.state()
        return together(parts)

    def restore(self, state: State) -> None:
        """Takes that up."""
        if self._stage.plan.student_share is None:
            self._followed.restore(state.part("followed"))
        if self._stage.plan.replay:
            self._replay.restore(state.part("replay"), self._prompts)

    def pack(self, collected: Sequence[Example]) -> States:
        """The step's text, which is the same on every rank."""
        return States(packed(collected), State())

    def unpack(self, states: States, *, step: int) -> list[Written]:
        """The same text again."""
        return unpacked(states.shared, self._prompts)

    def _updates(self, text: Sequence[Example], lesson: Lesson, student: Student, *, made: int) -> Iterator[Update]:
        constant = self._stage.expected_length or float(self._decoding.max_new_tokens)
        views: dict[int, TeacherView] = {}
        for _ in range(made, self._stage.inner_epochs):
            losses, sums = text_losses(
                text, lesson, denominator=len(text) * constant, student=student, ids=self._ids, ranks=self._ranks,
                limits=limits_of(self._stage), views=views if self._stage.inner_epochs > 1 else None,
            )  # fmt: skip
            yield Update(losses, lambda sums=sums: sums.over_ranks(self._ranks))  # type: ignore[misc]

    def _written(self, step: int, chosen: Sequence[Source], student: Student) -> list[Written]:
        """The student's responses for the fresh rows, in their order, on every rank."""
        at = [row for row, source in enumerate(chosen) if source == "fresh"]
        if not at:
            return []
        indices = self._order.take(step * self._stage.batch, self._stage.batch)
        again = occurrences(indices)
        prompts = [self._prompts[indices[row]] for row in at]
        samples = [again[row] for row in at]
        lengths = [len(prompt.ids) for prompt in prompts]
        mine = share(range(len(at)), lengths=lengths, rank=self._ranks.rank, ranks=self._ranks.size)
        batch = prompt_batch(
            [prompts[i] for i in mine], [samples[i] for i in mine], pad_id=self._ids.pad, device=self._ranks.device
        )
        with student.whole() as reader:
            rollout = self._ranks.together(
                lambda: roll_out(
                    batch, student=reader, teacher=None, decoding=self._decoding,
                    key=DrawKey(seed=self._seed, stage=self._stage.name, purpose=Purpose.TOKEN, rollout=step),
                    eos_ids=self._ids.eos, pad_id=self._ids.pad, policy_step=student.updates_done,
                    anyone=self._ranks.anyone if reader.lockstep else bool,
                )
            )  # fmt: skip
        rows = [(at[i], response) for i, response in zip(mine, _responses(rollout), strict=True)]
        everyone = sorted(self._ranks.gather_objects(rows))
        return [
            Written(prompt.uid, prompt.ids, response) for prompt, (_, response) in zip(prompts, everyone, strict=True)
        ]


def _responses(rollout: Rollout) -> list[tuple[int, ...]]:
    return [
        tuple(ids_T[:length].tolist())
        for ids_T, length in zip(rollout.response_BT, rollout.length_B.tolist(), strict=True)
    ]

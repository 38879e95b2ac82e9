"""A whole MiniLLM step against the sum of its bare parts.

The parts (``bare``): a cached decode loop with multinomial sampling, the teacher's forwards, and a forward and backward
of the student with whole logits for each inner update. What a step costs beyond them is ours: keyed sampling,
bookkeeping, credit, the engine, the optimiser. With teacher mixing the teacher's part is a cached forward at each
heads of the same coins.

Legend: B rows, T new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minillm.bench.bare import Bare, Case, model_loader, random_prompts
from minillm.bench.pairs import Spread, in_turns, ratio, spread_of, threads
from minillm.bench.peaks import Peaks, measure_peaks
from minillm.cards import load_card
from minillm.objectives import Minillm
from minillm.ranks import Ranks
from minillm.stage_base import OptimiserConfig
from minillm.stage_config import MinillmStage
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.types import Decoding, Ids

UPDATES = 10**6
"""Length of the learning-rate schedule: longer than any benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase(Case):
    """How responses are drawn and learnt from."""

    inner_updates: int
    settings: str = ""
    """A file of ds_configs for the student; none names the smallest ZeRO stage that the precision allows."""
    placement: str = "replicated"
    """Where the teacher lives."""
    micro_batch: int = 0
    """Rows of a training forward; 0: all."""


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
    decode_over_floor: float
    """Median seconds of a token's bare decoding over those to read the student's weights from memory once."""
    teacher_over_floor: float
    """Median seconds of the bare teacher over those of its products at the machine's peak."""
    peaks: Peaks


def measure_step(case: StepCase, *, repeats: int) -> StepFigures:
    """Both in turns, in one process. No row ends early, so that every step has the same tokens."""
    ranks = Ranks(threads=case.threads)
    ours, bare = Ours(case, ranks=ranks), Bare(case.sizes, device=ranks.device)
    turn = iter(range(repeats + 1))
    # The coins of a step are those of its number: the bare teacher reads at the same heads in the same turn.
    teacher: Callable[[], object] = (
        (lambda: bare.mixed_teacher(case.heads_GT(next(turn)))) if case.teacher_mix else bare.teacher
    )
    try:
        seconds = in_turns(
            {"step": ours.step, "decode": bare.decode, "teacher": teacher, "update": bare.update},
            repeats=repeats,
            device=ranks.device,
        )
        parameters = {"teacher": ours.teacher.parameters, "student": ours.student.parameters}
    finally:
        ours.close()
    with threads(case.threads):
        peaks = measure_peaks(ranks.device, case.sizes.dtype)
    sizes, updates = case.sizes, [case.inner_updates * one for one in seconds["update"]]
    parts = [sum(turn) for turn in zip(seconds["decode"], seconds["teacher"], updates, strict=True)]
    spread = {name: spread_of(values) for name, values in seconds.items()}
    weight_bytes = parameters["student"] * sizes.dtype.itemsize
    read_tokens = sizes.rows * (sizes.prompt_tokens + sizes.new_tokens)
    return StepFigures(
        case=case,
        parameters=parameters,
        seconds=spread,
        over_parts=ratio(seconds["step"], parts),
        tokens_per_s=sizes.rows * sizes.new_tokens / spread["step"].median,
        decode_over_floor=spread["decode"].median / sizes.new_tokens / peaks.seconds_to_read(weight_bytes),
        teacher_over_floor=spread["teacher"].median / peaks.seconds_to_multiply(parameters["teacher"], read_tokens),
        peaks=peaks,
    )


class Ours:
    """The objective, student and teacher of a run, over random prompts that no response ends."""

    def __init__(self, case: StepCase, *, ranks: Ranks) -> None:
        sizes = case.sizes
        stage = MinillmStage(
            steps=1,
            prompts=sizes.rows * ranks.size,
            inner_epochs=case.inner_updates,
            teacher_mix=case.teacher_mix,
            coin_groups=case.coin_groups,
            length_norm=True,
            micro_batch=case.micro_batch,
            optimiser=OptimiserConfig(lr=1e-5),
        )
        teacher = model_loader(sizes.teacher, "teachers", dtype=sizes.dtype, device=ranks.device)
        # As in a run: whole precision, from which the engine makes its own.
        whole = torch.promote_types(sizes.dtype, torch.float32)
        student = model_loader(sizes.student, "students", dtype=whole, device=ranks.device)
        self.teacher = Teacher(teacher, ranks=ranks, placement=case.placement, precision=sizes.precision)
        self.student = Student(
            student, ranks=ranks, settings=case.settings or ("zero1" if sizes.precision == "bf16" else "zero0"),
            precision=sizes.precision, optimiser=stage.optimiser, updates=UPDATES,
            from_files=load_card(sizes.student, kind="students").as_in_files,
        )  # fmt: skip
        self._objective = Minillm(
            stage,
            prompts=random_prompts(sizes, vocabulary=self.student.config.vocab_size, ranks=ranks.size),
            decoding=Decoding(max_new_tokens=sizes.new_tokens),
            teacher=self.teacher,
            ids=Ids(eos=(), pad=0),
            ranks=ranks,
            seed=0,
        )
        self._done = 0

    def step(self, *, between: Callable[[], object] = dict) -> dict[str, float]:
        """What the loop does in a step, the log and the progress bar left out; the rollout's figures. ``between`` is
        called before the first update."""
        collected, figures = self._objective.collect(self._done, self.student)
        between()
        with self._objective.learning(collected, self.student) as updates:
            for update in updates:
                self.student.update(update.losses)
                update.figures()
        self._done += 1
        return figures

    def close(self) -> None:
        """Frees both engines."""
        self.student.close()
        self.teacher.close()

"""The loop: the one place where a stage's steps happen, readable from top to bottom as the data flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minillm.alarms import Alarms, Raised
from minillm.engines import Student
from minillm.errors import Alarmed
from minillm.progress import Progress
from minillm.ranks import Ranks
from minillm.store import Clock, RunFolder
from minillm.updates import Objective, over_updates

Validate = Callable[[Student], dict[str, float]]
"""Measures of the student as it stands, on the validation prompts; the same numbers on every rank."""


@dataclass(slots=True, kw_only=True)
class Progressed:
    """Everything the loop itself knows: with the engine's state, what a resumed run would need (design D11)."""

    step: int = 0
    """Loop steps done (for MiniLLM: rollouts)."""
    best: float | None = None
    """Best value so far of the validation metric that decides which student is kept."""
    best_step: int = 0
    best_figures: dict[str, float] = field(default_factory=dict)
    stale: int = 0
    """Validations since the best."""
    seconds: float = 0.0
    stopped_early: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Which student is kept: the one with the best ``metric``."""

    metric: str
    highest: bool

    def better(self, value: float, best: float | None) -> bool:
        """Whether ``value`` beats ``best``; a NaN never does (and as ``best`` it could not be beaten)."""
        if math.isnan(value):
            return False
        return best is None or (value > best if self.highest else value < best)


def run_steps(
    objective: Objective,
    student: Student,
    *,
    stage: str,
    steps: int,
    ranks: Ranks,
    folder: RunFolder,
    headline: tuple[str, ...],
    validate: Validate | None,
    validate_every: int,
    keep: Keep,
    patience: int,
    publish: Callable[[Mapping[str, float]], None],
    alarms: Alarms | None = None,
) -> Progressed:
    """Runs a stage's steps and publishes its best student (its last, if there is no validation).

    ``headline`` names the figures beside the progress bar. ``publish`` is called on every rank, at each new best.
    Raises ``Alarmed`` where an alarm rings whose action is to stop.
    """
    done, clock = Progressed(), Clock()
    bar = Progress(stage, total=steps, shown=ranks.first)
    try:
        for step in range(done.step, steps):
            collected, figures = objective.collect(step, student)  # prompts -> (rollout -> scored -> targets)
            learnt, largest = [], {"grad_norm"}
            with objective.learning(collected, student) as updates:  # targets -> loss -> step
                for update in updates:
                    _, norm = student.update(update.losses)
                    learnt.append({**update.figures(), "grad_norm": norm})
                    largest.update(update.largest)
            figures.update(over_updates(learnt, largest=largest), lr=student.learning_rate)
            done.step, done.seconds = step + 1, clock()
            folder.log({"kind": "train", **_place(stage, done, student), **figures})
            bar.advance(done.step, {name: figures[name] for name in headline if name in figures})
            raised = [] if alarms is None else alarms.hear(figures)
            for one in raised:
                folder.log({"kind": "alarm", **_place(stage, done, student), **one._asdict()})
                bar.say(f"{stage} {done.step}/{steps}  {one.words}")
            if _ends(raised, done, stage=stage):
                done.stopped_early = True
                bar.say(f"{stage}: stopped at step {done.step}; the student of step {done.best_step} is handed on")
                break

            due = validate_every > 0 and (done.step % validate_every == 0 or done.step == steps)
            if validate is not None and due:
                measured = validate(student)
                done.seconds = clock()
                folder.log({"kind": "validation", **_place(stage, done, student), **measured})
                bar.say(f"{stage} {done.step}/{steps}  validation  " + _in_words(measured, metric=keep.metric))
                objective.hear(measured)
                if keep.better(measured[keep.metric], done.best):
                    done.best, done.best_step, done.stale = measured[keep.metric], done.step, 0
                    done.best_figures = measured
                    publish(measured)
                else:
                    done.stale += 1
                if patience and done.stale >= patience:
                    done.stopped_early = True
                    bar.say(f"{stage}: no better {keep.metric} in {patience} validations; stopped at step {done.step}")
                    break
        if done.best is None:
            if done.stale:
                which = f"the student of the last step, {done.step}, is handed on"
                bar.say(f"{stage}: no validation found a number for {keep.metric}; {which}")
            publish({})
    finally:
        bar.close()
    done.seconds = clock()
    return done


def _ends(raised: Sequence[Raised], done: Progressed, *, stage: str) -> bool:
    """Whether an alarm ends the stage with the best student so far; raises ``Alarmed`` where one ends the run, as a
    rollback does while no validation has found a student to go back to."""
    actions = {one.action for one in raised}
    if "stop" in actions:
        raise Alarmed(f"stage {stage} stopped at step {done.step}: an alarm rang whose action is stop")
    if "rollback" in actions and done.best is None:
        raise Alarmed(f"stage {stage} stopped at step {done.step}: an alarm rang, and no student is known to be better")
    return "rollback" in actions


def _place(stage: str, done: Progressed, student: Student) -> dict[str, Any]:
    """Where in the run a log line belongs."""
    return {"stage": stage, "step": done.step, "update": student.updates_done, "seconds": round(done.seconds, 3)}


def _in_words(measured: Mapping[str, float], *, metric: str) -> str:
    """The figures, and which of those that decide something (``metric``, and the loss that an objective may follow) are
    no numbers."""
    words = [f"{name} {value:.4g}" for name, value in measured.items()]
    broken = [name for name in dict.fromkeys((metric, "loss")) if math.isnan(measured.get(name, 0.0))]
    words += [f"({name} is no number here and decides nothing)" for name in broken]
    return "  ".join(words)

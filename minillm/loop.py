"""The loop: the one place where a stage's steps happen, readable from top to bottom as the data flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from minillm import phases
from minillm.alarms import Alarms, Raised
from minillm.bad_batches import written_down
from minillm.errors import Alarmed
from minillm.moments import Boundary, Progressed, Step, moment_at, never, taken_up
from minillm.progress import Progress
from minillm.ranks import Ranks
from minillm.speed import SPEED, Speedometer
from minillm.state import State, States
from minillm.store import Clock, RunFolder
from minillm.student_engine import Student
from minillm.updates import Objective, over_updates

Validate = Callable[[Student], dict[str, float]]
"""Measures of the student as it stands, on the validation prompts; the same numbers on every rank."""
Publish = Callable[[Mapping[str, float]], str]
"""Writes the student as it stands, with its figures, and gives ``publish.weights_sha256`` of it on every rank."""


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
    publish: Publish,
    alarms: Alarms | None = None,
    begin: States | None = None,
    boundary: Boundary = never,
    traffic: Callable[[], Mapping[str, float]] = dict,
) -> Progressed:
    """Runs a stage's steps and publishes its best student (its last, if there is no validation).

    ``headline`` names the figures beside the progress bar. ``publish`` is called on every rank, at each new best.
    ``begin`` is what ``Moment.state`` gave, for a student that stands as it stood then and an objective and alarms as
    they were made; None is the beginning. After every update ``boundary`` may save, and end the stage there: nothing is
    published then, and ``interrupted`` says so. ``traffic`` gives what was moved since it was last asked, for the log;
    it is of this process, not of the run, and decides nothing. Raises ``Alarmed`` where an alarm rings whose action is
    to stop.
    """
    done = Progressed()
    now = None if begin is None else taken_up(begin, done=done, objective=objective, alarms=alarms)
    bar = Progress(stage, total=steps, shown=ranks.first, before=done.step)
    tell = _Teller(
        stage=stage, steps=steps, done=done, student=student, ranks=ranks, folder=folder, bar=bar,
        clock=Clock(done.seconds),
    )  # fmt: skip

    speed = Speedometer(ranks.device)

    def ends(now: Step | None) -> bool:
        done.seconds = tell.clock()
        done.interrupted = boundary(moment_at(now, tell.place(), done=done, objective=objective, alarms=alarms))
        return done.interrupted

    try:
        while not done.over:
            phases.enter("rollout")
            speed.begin()
            from_its_beginning = now is None
            traffic()  # what was moved for a validation is no step's
            if now is None:
                with tell.bad_batches():
                    now = Step(*objective.collect(done.step, student))  # prompts -> (rollout -> scored -> targets)
                tell.news(objective)
            with tell.bad_batches(lambda step=now: objective.shown(step.collected)):  # type: ignore[misc]
                figures = _learn(now, objective, student, ends=ends)  # targets -> loss -> step
            if figures is None:
                break
            now, done.step = None, done.step + 1
            # Of a step that was begun by an earlier process only that one's clocks would know the rest.
            fast = {SPEED: speed.end(figures)} if from_its_beginning else {}
            tell.log("train", {**figures, **traffic(), **fast})
            bar.advance(done.step, {name: figures[name] for name in headline if name in figures})
            if _rings([] if alarms is None else alarms.hear(figures), tell):
                done.stopped_early = True
            elif validate is not None and _due(done.step, steps=steps, every=validate_every):
                phases.enter("validation")
                with tell.bad_batches():
                    measured = validate(student)
                _weigh(measured, objective, tell, keep=keep, patience=patience, publish=publish)
            done.over = done.stopped_early or done.step >= steps
            if done.over and done.best is None:
                _hand_on_the_last(tell, metric=keep.metric, publish=publish)
            if done.over:
                bar.say(f"{stage}: {speed.words()}")
            if ends(None):
                break
    finally:
        bar.close()
    return done


@dataclass(frozen=True, slots=True, kw_only=True)
class _Teller:
    """Logs and says what happens, with its place in the run."""

    stage: str
    steps: int
    done: Progressed
    student: Student
    ranks: Ranks
    folder: RunFolder
    bar: Progress
    clock: Clock

    def place(self) -> dict[str, Any]:
        """Stage, steps and updates done."""
        return {"stage": self.stage, "step": self.done.step, "update": self.student.updates_done}

    def log(self, kind: str, figures: Mapping[str, Any]) -> None:
        """A line of the log."""
        self.done.seconds = self.clock()
        self.folder.log({"kind": kind, **self.place(), "seconds": round(self.done.seconds, 3), **figures})

    def say(self, words: str) -> None:
        """A line for a person."""
        self.bar.say(f"{self.stage} {self.done.step}/{self.steps}  {words}")

    def news(self, objective: Objective) -> None:
        """Logs and says what came up."""
        for one in objective.news():
            self.log(one.kind, one.record)
            self.say(one.words)

    def bad_batches(self, batch: Callable[[], State] | None = None) -> AbstractContextManager[None]:
        """A batch whose numbers are not finite is written down."""
        return written_down(self.folder, ranks=self.ranks, place=self.place, batch=batch)


def _learn(
    now: Step, objective: Objective, student: Student, *, ends: Callable[[Step], bool]
) -> dict[str, float] | None:
    """Makes the step's updates that are left, and gives its figures; None where it was ended between two of them."""
    largest = {"grad_norm"}
    phases.enter("learning")
    with objective.learning(now.collected, student, made=len(now.learnt)) as updates:
        left = iter(updates)
        update = next(left, None)
        while update is not None:
            _, norm = student.update(update.losses)
            update.follow()
            now.learnt.append({**update.figures(), "grad_norm": norm})
            largest.update(update.largest)
            # Only an objective knows whether an update was the step's last, and only once it is made.
            update = next(left, None)
            if update is not None and ends(now):
                return None
    return {**now.figures, **over_updates(now.learnt, largest=largest), "lr": student.learning_rate}


def _rings(raised: Sequence[Raised], tell: _Teller) -> bool:
    """Tells of the alarms; whether one ends the stage with the best student so far. Raises ``Alarmed`` where one ends
    the run, as a rollback does while no validation has found a student to go back to."""
    done, stage = tell.done, tell.stage
    for one in raised:
        tell.log("alarm", one._asdict())
        tell.say(one.words)
    actions = {one.action for one in raised}
    if "stop" in actions:
        raise Alarmed(f"stage {stage} stopped at step {done.step}: an alarm rang whose action is stop")
    if "rollback" not in actions:
        return False
    if done.best is None:
        raise Alarmed(f"stage {stage} stopped at step {done.step}: an alarm rang, and no student is known to be better")
    tell.bar.say(f"{stage}: stopped at step {done.step}; the student of step {done.best_step} is handed on")
    return True


def _due(step: int, *, steps: int, every: int) -> bool:
    """Whether the student is validated after so many steps: in any case after the last."""
    return every > 0 and (step % every == 0 or step == steps)


def _weigh(
    measured: dict[str, float], objective: Objective, tell: _Teller, *, keep: Keep, patience: int, publish: Publish
) -> None:
    """Tells what validation found; publishes the student if it is the best so far, or ends the patience with it."""
    done = tell.done
    tell.log("validation", measured)
    tell.say("validation  " + _in_words(measured, metric=keep.metric))
    objective.hear(measured)
    if keep.better(measured[keep.metric], done.best):
        done.best, done.best_step, done.stale = measured[keep.metric], done.step, 0
        done.best_figures = measured
        done.published = publish(measured)
    else:
        done.stale += 1
    if patience and done.stale >= patience:
        done.stopped_early = True
        words = f"no better {keep.metric} in {patience} validations; stopped at step {done.step}"
        tell.bar.say(f"{tell.stage}: {words}")


def _hand_on_the_last(tell: _Teller, *, metric: str, publish: Publish) -> None:
    done = tell.done
    if done.stale:
        which = f"the student of the last step, {done.step}, is handed on"
        tell.bar.say(f"{tell.stage}: no validation found a number for {metric}; {which}")
    done.published = publish({})


def _in_words(measured: Mapping[str, float], *, metric: str) -> str:
    """The figures, and which of those that decide something (``metric``, and the loss that an objective may follow) are
    no numbers."""
    words = [f"{name} {value:.4g}" for name, value in measured.items()]
    broken = [name for name in dict.fromkeys((metric, "loss")) if math.isnan(measured.get(name, 0.0))]
    words += [f"({name} is no number here and decides nothing)" for name in broken]
    return "  ".join(words)

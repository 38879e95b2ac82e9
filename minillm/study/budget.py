"""How many steps of an arm cost what the study's budget has.

A pilot of a few steps tells first. Methods that learn from the student's own text change how long it is, and then
what a step costs: a budget that is ``refined`` looks at a whole run as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from minillm.config import RunConfig
from minillm.errors import ConfigError
from minillm.ranks import Ranks
from minillm.report_files import read_course
from minillm.stage_base import BaseStage
from minillm.study.config import BudgetConfig, StudyConfig
from minillm.study.make import make


def pilot(study: StudyConfig, arm: str, budget: BudgetConfig, *, ranks: Ranks) -> dict[str, Any]:
    """How many steps of the last stage the budget has, from what a few of them cost.

    Raises ``ConfigError`` where the pilot fails, or a step costs more than there is.
    """
    plain = study.arm_config(arm, study.tuning_seed, name=study.run_name("tuning", arm, "pilot"), changes={})
    stage = plain.trained[-1]
    at = f"stages.{plain.stages.index(stage)}"
    short = {f"{at}.steps": budget.pilot, f"{at}.optimiser.warmup_steps": 0}
    if stage.validate_every > 0:  # once, at the end: a stage may need that it validates
        short[f"{at}.validate_every"] = budget.pilot
    run, reason = _trained(study, arm, plain.name, short, ranks=ranks)
    course = course_of(run)
    made = sum(line["kind"] == "train" for line in course)
    cost = None if reason or made < budget.pilot else cost_a_step(course, stage, budget)
    if cost is None:
        why = reason or f"{made} steps were made; see {run.out}/{run.name}"
        raise ConfigError(f"arm {arm}: its pilot of {budget.pilot} steps failed: {why}")
    return {"steps": budget.pilot, **_steps(arm, cost, budget, at=at)}


def refined(
    study: StudyConfig, arm: str, budget: BudgetConfig, settings: Mapping[str, Any],
    tries: Sequence[Mapping[str, Any]], *, ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    """The same from a whole run with what is settled: the try whose value was taken, or else one made for this.

    What the pilot said stays where such a run cannot tell (see ``cost_a_step``).

    Raises ``ConfigError`` where the run fails, or a step costs more than there is.
    """
    name = study.run_name("tuning", arm, "whole")
    run = study.arm_config(arm, study.tuning_seed, name=name, changes=settings)
    stage = run.trained[-1]
    at = f"stages.{run.stages.index(stage)}"
    if study.search is not None:
        taken = settings[study.search.setting]
        cost = next(each["cost"] for each in tries if each["value"] == taken)
    else:
        run, reason = _trained(study, arm, name, settings, ranks=ranks)
        if reason:
            raise ConfigError(f"arm {arm}: its whole run of {stage.steps} steps failed: {reason}")
        cost = cost_a_step(course_of(run), stage, budget)
    if cost is None:
        return {"steps": stage.steps, f"{budget.unit}_per_step": None, "settings": {}}
    return {"steps": stage.steps, **_steps(arm, cost, budget, at=at)}


def cost_a_step(course: Sequence[Mapping[str, Any]], stage: BaseStage, budget: BudgetConfig) -> float | None:
    """Updates, tokens or seconds that a step cost, by the log of a run's last stage.

    Seconds are those from one step's end to the next one's: so without the first step, which loads and warms up what
    the others find ready, and without steps that a validation comes before. ``None`` where no step is left.
    """
    lines = [line for line in course if line["kind"] == "train"]
    if budget.unit == "updates":
        return float(stage.updates_per_step)
    if budget.unit == "tokens":
        return statistics.fmean(float(line.get("response_tokens", line["tokens"])) for line in lines)
    validated = {line["step"] for line in course if line["kind"] == "validation"}
    steps = [now["seconds"] - last["seconds"] for last, now in pairwise(lines) if last["step"] not in validated]
    return statistics.fmean(steps) if steps else None


def course_of(run: RunConfig) -> list[dict[str, Any]]:
    """What the log of a run says of its last stage: train lines and validations, in the order of steps."""
    rows = read_course(Path(run.out) / run.name / "metrics.jsonl").rows
    return [line for line in rows if line["stage"] == run.trained[-1].name]


def _trained(
    study: StudyConfig, arm: str, name: str, changes: Mapping[str, Any], *, ranks: Ranks
) -> tuple[RunConfig, str | None]:
    """A run that is trained and not judged, and why that failed."""
    run = study.arm_config(arm, study.tuning_seed, name=name, changes=changes)
    return run, make(run, ranks=ranks, evaluated=False)["reason"]


def _steps(arm: str, cost: float, budget: BudgetConfig, *, at: str) -> dict[str, Any]:
    steps = math.floor(budget.amount / cost + 1e-9)
    if steps < 1:
        raise ConfigError(
            f"arm {arm}: a step costs {cost:.4g} {budget.unit}, and the budget has {budget.amount:g}; "
            "give it more, or the arm smaller steps"
        )
    return {f"{budget.unit}_per_step": cost, "settings": {f"{at}.steps": steps}}

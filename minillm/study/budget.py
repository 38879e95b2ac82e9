"""How many steps of an arm cost what the study's budget has.

A pilot of a few steps tells first. Methods that learn from the student's own text change how long it is, and then
what a step costs: a budget that is ``refined`` looks at a whole run as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    at, stage = f"stages.{len(plain.stages) - 1}", plain.stages[-1]
    short = {f"{at}.steps": budget.pilot, f"{at}.optimiser.warmup_steps": 0}
    if stage.validate_every > 0:  # once, at the end: a stage may need that it validates
        short[f"{at}.validate_every"] = budget.pilot
    lines = _made(study, arm, plain.name, short, steps=budget.pilot, told="pilot", ranks=ranks)
    return {"steps": budget.pilot, **_steps(arm, cost_a_step(lines, stage, budget), budget, at=at)}


def refined(
    study: StudyConfig, arm: str, budget: BudgetConfig, settings: Mapping[str, Any],
    tries: Sequence[Mapping[str, Any]], *, ranks: Ranks,
) -> dict[str, Any]:  # fmt: skip
    """The same from a whole run with what is settled: the try whose value was taken, or else one made for this.

    Raises ``ConfigError`` as ``pilot`` does.
    """
    name = study.run_name("tuning", arm, "whole")
    run = study.arm_config(arm, study.tuning_seed, name=name, changes=settings)
    at, stage = f"stages.{len(run.stages) - 1}", run.stages[-1]
    if study.search is not None:
        taken = settings[study.search.setting]
        cost = next(float(each["cost"]) for each in tries if each["value"] == taken)
    else:
        lines = _made(study, arm, name, settings, steps=stage.steps, told="whole run", ranks=ranks)
        cost = cost_a_step(lines, stage, budget)
    return {"steps": stage.steps, **_steps(arm, cost, budget, at=at)}


def cost_a_step(lines: Sequence[Mapping[str, Any]], stage: BaseStage, budget: BudgetConfig) -> float:
    """Updates, tokens or seconds that a step cost, by the log of a run's last stage."""
    if budget.unit == "updates":
        return stage.updates_per_step
    if budget.unit == "tokens":
        return sum(float(line.get("response_tokens", line["tokens"])) for line in lines) / len(lines)
    # From the first step's end on: it loads and warms up what the others find ready.
    return float(lines[-1]["seconds"] - lines[0]["seconds"]) / (len(lines) - 1)


def train_lines(run: RunConfig) -> list[dict[str, Any]]:
    """What the log of a run says of the updates of its last stage."""
    rows = read_course(Path(run.out) / run.name / "metrics.jsonl").rows
    return [line for line in rows if line["kind"] == "train" and line["stage"] == run.stages[-1].name]


def _made(
    study: StudyConfig, arm: str, name: str, changes: Mapping[str, Any], *, steps: int, told: str, ranks: Ranks
) -> list[dict[str, Any]]:
    """The log of a run that is trained and not judged."""
    run = study.arm_config(arm, study.tuning_seed, name=name, changes=changes)
    made = make(run, ranks=ranks, evaluated=False)
    lines = train_lines(run)
    if made["state"] != "done" or len(lines) < steps:
        why = made["reason"] or f"{len(lines)} steps were made; see {run.out}/{run.name}"
        raise ConfigError(f"arm {arm}: its {told} of {steps} steps failed: {why}")
    return lines


def _steps(arm: str, cost: float, budget: BudgetConfig, *, at: str) -> dict[str, Any]:
    steps = math.floor(budget.amount / cost + 1e-9)
    if steps < 1:
        raise ConfigError(
            f"arm {arm}: a step costs {cost:.4g} {budget.unit}, and the budget has {budget.amount:g}; "
            "give it more, or the arm smaller steps"
        )
    return {f"{budget.unit}_per_step": cost, "settings": {f"{at}.steps": steps}}

"""Breaks whole runs off and lets them go on: ``python -m tests.resume.broken_off FOLDER PLAN…``, each plan in a line of
JSON on standard output.

A process of its own that imports everything once and forks for every attempt. It has one thread and no process group,
so that a fork is safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

from minillm import api, fault
from minillm.config import RunConfig, load_config
from minillm.errors import Stopped
from minillm.ranks import prepare_deepspeed
from minillm.saving import Resumed
from minillm.store import RunFolder
from tests.campaign import recipes
from tests.campaign.lives import outcome

ATTEMPTS = 80
PARTS: dict[str, tuple[type, str]] = {"log": (RunFolder, "cut_log"), "best": (Resumed, "restore_best")}
"""What a run does that goes on, and a control leaves out."""
FIRST = """
  - {kind: sft, steps: 4, batch: 8, validate_every: 2, optimiser: {lr: 1.0e-3}}"""


def write_recipe(folder: Path) -> Path:
    """Models, prompts and a run of three stages: dropout, a replay buffer, rollouts with four updates each."""
    recipes.write_models(folder)
    stages = FIRST + recipes.own_text(skew=4, minillm=3, validate_every=2)
    return recipes.write_run(folder, engine="zero0", stages=stages)


def attempt(config: RunConfig, plan: fault.Plan, log: Path, **options: Any) -> int:
    """How a run that follows the plan ends: its exit code, or minus the signal that ended it."""
    child = os.fork()
    if not child:
        _live(config, plan, log, options)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _live(config: RunConfig, plan: fault.Plan, log: Path, options: dict[str, Any]) -> NoReturn:
    code = 1
    try:
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                with fault.planned(plan):
                    api.distill(config, **options)
                code = 0
            except Stopped:
                code = Stopped.exit_code
            except BaseException:
                import traceback

                traceback.print_exc()
    finally:
        os._exit(code)


def ends_at(number: int, how: signal.Signals) -> fault.Plan:
    """Sends the process a signal at the fault point of this number, counted from 0."""
    passed = [0]

    def plan(name: str, detail: str) -> None:
        if passed[0] == number:
            os.kill(os.getpid(), how)
        passed[0] += 1

    return plan


def broken(
    recipe: Path, name: str, *, how: signal.Signals, seed: int, longest: int, without: str = ""
) -> dict[str, Any]:
    """A run that is ended over and over, each time 1 to ``longest`` fault points after it began, until it is done;
    ``without`` one of ``PARTS`` of going on."""
    if without:
        owner, part = PARTS[without]
        setattr(owner, part, lambda *_, **__: [])
    config = load_config(recipe, [f"name={name}"])
    draw, log, codes = random.Random(seed), recipe.parent / f"{name}.log", []
    for _ in range(ATTEMPTS):
        codes.append(attempt(config, ends_at(draw.randrange(1, longest), how), log))
        if codes[-1] in {0, 1}:  # done, or failed as no kill lets it fail
            break
    return {"codes": codes, **outcome(Path(config.out) / config.name)}


def main(folder: Path, plans: list[str]) -> None:
    """``whole``, or ``SIGNAL:SEED:LONGEST``, or ``SIGNAL:SEED:LONGEST:PART`` for a control, which must come last; each
    gives a line."""
    torch.set_num_threads(1)
    prepare_deepspeed()
    recipe = write_recipe(folder)
    for number, plan in enumerate(plans):
        if plan == "whole":
            config = load_config(recipe, [f"name=whole-{number}"])
            passed = folder / "points"

            def record(name: str, detail: str, passed: Path = passed) -> None:
                with passed.open("a") as file:
                    file.write(f"{name}\n")

            code = attempt(config, record, folder / "whole.log")
            found = {
                "codes": [code],
                "points": len(passed.read_text().splitlines()),
                **outcome(Path(config.out) / config.name),
            }
        else:
            how, seed, longest, *without = plan.split(":")
            found = broken(
                recipe, f"broken-{number}", how=signal.Signals[how], seed=int(seed), longest=int(longest),
                without="".join(without),
            )  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

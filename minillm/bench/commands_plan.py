"""``minillm bench plan``: what it measures and prints."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillm.bench import options

if TYPE_CHECKING:
    from minillm.bench.plan import PlanFigures


@options.app.command()
def plan(
    only: Annotated[str | None, typer.Option("--only", help="Cases whose name has this in it; all without.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of each, the most of which counts.")] = 2,
    json_file: options.Json = None,
) -> None:
    """What real steps take of memory, against `minillm plan`, on small models.

    A case takes about half a minute on an idle core.

    \b
    Example:
      minillm bench plan --only bf16 --json plan.json
    """
    from minillm.bench.plan import measure_plan
    from minillm.bench.plan_cases import cases
    from minillm.bench.record import write_section
    from minillm.errors import ConfigError
    from minillm.terminal import print_table

    found: dict[str, PlanFigures] = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = [(name, case) for name, case in cases(Path(folder)) if only is None or only in name]
        if not chosen:
            raise ConfigError(f"--only {only!r}: no case has this in its name")
        for name, case in chosen:
            print(f"{name} …", flush=True)
            found[name] = measure_plan(case, steps=steps)
    print_table(
        "MiB of rank 0: planned, measured",
        ["", "rollout", "scoring", "update", "peak off by"],
        [[name, *_cells(figures)] for name, figures in found.items()],
    )
    if json_file is not None:
        worst = max(abs(figures.off) for figures in found.values())
        record = {
            name: {"planned": figures.planned, "measured": figures.measured, "off": figures.off}
            for name, figures in found.items()
        }
        write_section(json_file, "plan", {"worst": worst, "cases": record})


def _cells(figures: PlanFigures) -> list[str]:
    pairs = [f"{figures.planned[name] >> 20}, {figures.measured[name] >> 20}" for name in figures.planned]
    return [*pairs, f"{figures.off:+.1%}"]

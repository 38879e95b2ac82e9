"""The command that looks at a run before it is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from minillm.cli import options
from minillm.errors import ConfigError


def doctor(  # noqa: PLR0917 (typer reads options from parameters)
    config: options.Config,
    overrides: options.Overrides = None,
    ranks: Annotated[
        int, typer.Option("--ranks", min=0, help="Also start so many ranks, and let them talk to each other.")
    ] = 0,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="Also load both models, and look over five answers of each.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write what was found into this file.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 2 for warnings too.")] = False,
) -> None:
    """Look for what is wrong with a run before it starts.

    Tokenizers, templates, end tokens, rows, disk, packages and more, without weights and without a GPU. Each finding
    says why it matters and how to mend it. Exit code 0 without errors, 2 with one.

    \b
    Example:
      minillm doctor --config recipes/quickstart/teacher.yaml --ranks 2
    """
    _require_alone(config)
    from minillm.doctor.command import run

    code = run(config, overrides or [], ranks=ranks, ask_models=rollout, strict=strict, json_file=json_file)
    if code:
        raise typer.Exit(code)


def _require_alone(config: Path) -> None:
    """``ConfigError`` on the ranks of a launcher: one of them would look, and wait for others that are gone."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and size.isdigit() and int(size) > 1:
        raise ConfigError(
            f"doctor on {size} ranks of a launcher: it looks at a run from one process\n"
            f"  run it alone; it starts ranks by itself: minillm doctor --ranks N --config {config}"
        )

"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option("--config", help="The run's YAML file, such as recipes/quickstart/minillm.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's: stages.0.steps=5"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over: replace what an earlier run left in the same folder.")
]
Resume = Annotated[
    str, typer.Option("--resume", help="auto: from the newest save, if any; true: one must be there; or its folder.")
]
AcceptChange = Annotated[
    list[str] | None,
    typer.Option("--accept-change", metavar="SETTING", help="Go on though this setting has changed; may be repeated."),
]
Profile = Annotated[
    int, typer.Option("--profile", min=0, metavar="STEPS", help="Record so many steps of each stage, in RUN/profile.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the configuration with all defaults; check it; do nothing.")
]

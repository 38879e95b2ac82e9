"""The command ``minillm bench``, and the options that its benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from minillm.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    help="Time the parts of a step beside slow twins; count padding.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _usable(file: Path | None) -> Path | None:
    if file is not None:
        from minillm.bench.record import sections

        sections(file)  # a file that cannot be used is refused before anything is measured
    return file


Json = Annotated[
    Path | None,
    typer.Option("--json", callback=_usable, help="Also write the figures into this file, beside others there."),
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="How often each variant is timed, in turns.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads of torch, on a CPU.")]
TeacherName = Annotated[str, typer.Option("--teacher", metavar="CARD|DIR", help="The model that is imitated.")]
StudentName = Annotated[str, typer.Option("--student", metavar="CARD|DIR", help="The model that learns.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Responses in a rollout.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, help="Tokens of each prompt.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="Most tokens of a response.")]
Alpha = Annotated[
    float,
    typer.Option("--alpha", min=0.0, max=0.99, help="Share of tokens that the teacher draws, where it draws any."),
]
CoinGroups = Annotated[int, typer.Option("--coin-groups", min=1, help="Groups of rows with coins of their own.")]
Precision = Annotated[str, typer.Option("--precision", help="fp32 or bf16, of both models.")]


def of(defaults: Sequence[int]) -> str:
    """The default of an option that may be repeated, as the help text shows it."""
    return ", ".join(map(str, defaults))


@app.callback()
def bench() -> None:
    """Time the parts of a step beside slow twins; count padding.

    \b
    Example:
      minillm bench loss --json bench.json
    """


def check_precision(precision: str) -> None:
    """Raise ``ConfigError`` for one that models are not held in here."""
    if precision not in {"fp32", "bf16"}:
        raise ConfigError(f"--precision {precision!r}: wanted fp32 or bf16")

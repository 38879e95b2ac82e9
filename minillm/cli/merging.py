"""The command that makes one model of several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from minillm.errors import ConfigError, visible

METHODS = ("lerp", "slerp", "nlerp")


def merge(  # noqa: PLR0917 (typer reads options from parameters)
    start: Annotated[Path, typer.Argument(metavar="START", help="The model folder that all others started from.")],
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Folders of models, or of LoRA adapters.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write: a model, or with several etas one for each.")],
    method: Annotated[str, typer.Option("--method", help="slerp, lerp, or nlerp (slerp without an order).")] = "slerp",
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="A,B,…", help="Of the models, in their order; else equal.")
    ] = None,
    eta: Annotated[
        str, typer.Option("--eta", metavar="E,…", help="How far from the start (0) to the merge (1); several: a front.")
    ] = "1",
    evaluate: Annotated[
        Path | None, typer.Option("--evaluate", metavar="RUN.yaml", help="Evaluate each eta as this file says; draw.")
    ] = None,
    x: Annotated[str | None, typer.Option("--x", metavar="MEASURE", help="To draw the front over.")] = None,
    y: Annotated[str | None, typer.Option("--y", metavar="MEASURE", help="To draw the front of.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace what earlier merges left in --out.")] = False,
) -> None:
    """Merge models that were trained from one start into one.

    By their task vectors (what training added to the start), layer group by layer group. The angles between them are
    printed, and stand with norms in merge.json and angles.png of the merged folder. Models of another architecture,
    tokenizer or start are refused.

    \b
    Examples:
      minillm merge runs/sft/student runs/a/student runs/b/student \\
        --out merged --method slerp
      minillm merge runs/sft/student runs/a/student runs/b/student \\
        --out front --eta 0,0.25,0.5,0.75,1 \\
        --evaluate recipes/quickstart/minillm.yaml
    """
    if method not in METHODS:
        raise ConfigError(f"--method {method!r}: wanted one of {', '.join(METHODS)}")
    chosen = cast(Literal["lerp", "slerp", "nlerp"], method)
    etas = sorted(_numbers("--eta", eta))
    shares = None if weights is None else _numbers("--weights", weights)
    if evaluate is None and (x is not None or y is not None):
        raise ConfigError("--x and --y draw a front; add --evaluate RUN.yaml, or leave them out")
    if evaluate is not None:
        from minillm.config import load_config
        from minillm.liti_front import merge_front

        merge_front(
            start, models, load_config(evaluate), into=out, method=chosen, weights=shares, etas=etas, x=x, y=y,
            say=_say, fresh=fresh,
        )  # fmt: skip
        return
    from minillm.merge_models import merge_at, merge_folders
    from minillm.ranks import Ranks

    def work() -> None:
        if len(etas) > 1:
            merge_at(start, models, into=out, method=chosen, weights=shares, etas=etas, say=_say, fresh=fresh)
            return
        merge_folders(start, models, into=out, method=chosen, weights=shares, eta=etas[0], say=_say, fresh=fresh)

    Ranks().of_first(work)


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(visible(line), flush=True)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: wanted numbers with commas between them, such as 0.3,0.7") from None

"""``minillm bench evaluate``: what it asks, measures and prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minillm.bench import options

if TYPE_CHECKING:
    from minillm.bench.evaluate import EvaluateFigures

ROWS = {
    "whole": "the whole evaluation",
    "generation": "of it generation, as text and rows",
    "decode": "decode loop alone",
    "teacher": "one forward of the teacher",
    "rouge_score": "rouge-score by itself",
    "references": "not in the sum: references",
    "summary": "not in the sum: intervals",
}


SHORT = {"decode": "decode", "teacher": "teacher", "rouge_score": "rouge"}


@options.app.command()
def evaluate(  # noqa: PLR0917 (typer reads options from parameters)
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a student card or a hub name.")],
    config: Annotated[Path, typer.Option("--config", help="The run's YAML file: prompts, teacher, decoding, seeds.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's.")
    ] = None,
    repeats: options.Repeats = 3,
    thread_count: options.Threads = 1,
    json_file: options.Json = None,
) -> None:
    """An evaluation against its bare parts: decoding, one forward of the teacher, rouge-score by itself.

    On a CPU it counts CPU seconds, which other work on the machine changes little.

    \b
    Example:
      minillm bench evaluate runs/quickstart/minillm/student \\
        --config recipes/quickstart/minillm.yaml \\
        data.test=world:train data.test_limit=500 'evaluation.temperatures=[1.0]'
    """
    from minillm.bench.evaluate import measure_evaluate
    from minillm.bench.record import write_section
    from minillm.config import load_config

    settings = load_config(config, overrides or [])
    print(f"{model}: {repeats + 1} turns of an evaluation and its parts …", flush=True)
    found = measure_evaluate(model, settings, repeats=repeats, thread_count=thread_count)
    _print_evaluate(found)
    if json_file is not None:
        section = {
            "generation_over_decode": found.generation_over_decode.median,
            "whole_over_parts": found.whole_over_parts.median,
            "threads": thread_count, "model": model, "figures": found,
        }  # fmt: skip
        write_section(json_file, "evaluate", section)


def _print_evaluate(figures: EvaluateFigures) -> None:
    from minillm.bench.evaluate import PARTS
    from minillm.terminal import print_table

    parts = " + ".join(SHORT[name] for name in PARTS if name in figures.seconds)
    ratios = {
        "generation / decode": figures.generation_over_decode,
        f"whole / ({parts})": figures.whole_over_parts,
    }
    seconds = {ROWS[name]: of for name, of in figures.seconds.items()}
    print_table(
        f"{figures.prompts:,} prompts, {figures.responses:,} responses of {figures.tokens:,} tokens, "
        f"{figures.pairs:,} pairs with a reference",
        ["", f"{figures.clock} seconds", "least to greatest"],
        [[name, f"{of.median:.3f}", f"{of.low:.3f}–{of.high:.3f}"] for name, of in (*seconds.items(), *ratios.items())],
    )

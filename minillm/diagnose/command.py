"""What the command ``diagnose`` does: refuses files that cannot be written, measures, prints, writes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from minillm.config import RunConfig
from minillm.diagnose import words
from minillm.diagnose.names import DEFAULTS
from minillm.diagnose.run import Diagnosis, Sizes, diagnose
from minillm.errors import DataError
from minillm.plots import require_outputs
from minillm.ranks import Ranks
from minillm.results import versions
from minillm.store import write_text
from minillm.terminal import print_table

WIDTH = 80
"""Columns of a line of advice, as in a plain terminal."""


def run(
    config: RunConfig,
    *,
    names: Sequence[str] | None,
    prompts: int,
    samples: int,
    directions: int,
    seed: int,
    json_file: Path | None,
    plot: Path | None,
    fresh: bool = False,
) -> Diagnosis:
    """Prints the table and the advice; writes the files that are named. ``names`` None are the usual choices.

    Raises ``DataError`` where ``json_file`` is there already, unless ``fresh``.
    """
    require_outputs(json_file=json_file, plot=plot)
    if json_file is not None and json_file.exists() and not fresh:
        raise DataError(
            f"{json_file} is there already, wanted a new file; nothing was measured\n"
            "  name another --json, or replace this one with --fresh"
        )
    sizes = Sizes(prompts=prompts, samples=samples, directions=directions, seed=seed)
    found = diagnose(
        config, names=DEFAULTS if names is None else names, sizes=sizes, say=lambda line: print(line, flush=True)
    )
    if Ranks().first:
        _tell(found)
        if json_file is not None:
            record = {**words.as_json(found), "versions": versions()}
            write_text(json_file, json.dumps(record, indent=2) + "\n")
        if plot is not None:
            words.draw_plot(found, plot)
    return found


def _tell(found: Diagnosis) -> None:
    drawn = found.drawn
    print_table(
        f"{found.sizes.prompts} prompts, {drawn.samples} responses, {drawn.tokens:,} tokens, teacher_mix "
        f"{found.stage.teacher_mix:g}; reverse KL {drawn.reverse_kl:.3g} nats a response",
        words.COLUMNS,
        words.rows(found),
    )
    print(words.FOOTNOTE)
    print()
    for line in words.advice(found):
        print(textwrap.fill(line, width=WIDTH, subsequent_indent="  "))

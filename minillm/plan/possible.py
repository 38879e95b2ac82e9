"""What no run could be: refused before it is planned, or told beside the plan."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.errors import ConfigError, PositionsExceeded
from minillm.mlps import FORMS
from minillm.plan.sizes import Work

PADDING = 0.02
"""Share of the rows of a vocabulary up to which spare rows may be all that differs."""


def require_possible(work: Work) -> None:
    """Raise ``PositionsExceeded`` for rows longer than a model's, ``ConfigError`` for what else cannot be."""
    for role, model in (("teacher", work.teacher), ("student", work.student)):
        if model.positions is not None and work.length > model.positions:
            raise PositionsExceeded(
                f"{role} {model.name} has {model.positions} positions; prompt + response may be {work.length} tokens.\n"
                f"  make the lengths shorter by {work.length - model.positions} in all"
            )
    if work.lora > work.student.smallest_side:
        raise ConfigError(
            f"LoRA of rank {work.lora}: the smallest matrix of {work.student.name} has a side of "
            f"{work.student.smallest_side}, beyond which an adapter is larger than what it adapts\n"
            f"  take a rank of at most {work.student.smallest_side}"
        )
    if work.bottleneck and not work.student.unit:
        raise ConfigError(
            f"bottleneck of size {work.bottleneck}: the MLPs of {work.student.name} are not among those that minillm "
            f"can make wider\n  wanted one of {', '.join(FORMS)}; or give a rank of lora, which adapts any linear layer"
        )
    if work.gpus > work.gpus_per_node and work.gpus % work.gpus_per_node:
        raise ConfigError(
            f"{work.gpus} GPUs, {work.gpus_per_node} on each node: wanted whole nodes\n"
            "  give --gpus as a multiple of --gpus-per-node"
        )


def notes(work: Work) -> Iterator[str]:
    """What the run itself will decide."""
    rows = work.teacher.vocabulary, work.student.vocabulary
    if rows[0] == rows[1]:
        return
    told = f"vocabularies of {rows[0]:,} (teacher) and {rows[1]:,} rows (student): "
    if max(rows) - min(rows) <= PADDING * max(rows):
        yield told + "fine where spare rows alone differ; the run compares the tokens, and minillm doctor does before"
    else:
        yield told + "a run refuses models of different tokens; minillm doctor compares them"

"""One rank of the parity test: runs every cell named on the command line, one after the other, in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm import distill, student_engine
from minillm.cards import Card
from minillm.config import RunConfig
from minillm.lost import leave
from minillm.ranks import Ranks
from minillm.yaml_reader import write_yaml
from tests import corpus_twin, quick, tiny

STEPS, HELD_OUT = 3, 3
BLOCK, TAKEN = 7, 5
"""Tokens of a block of the corpus, and blocks of an update."""
AVERAGED = "-averaged"
CREDIT: dict[str, dict[str, Any]] = {
    "ridge": {"baseline": "ridge", "importance": "per_decision", "gamma": 0.9, "horizon": 4},
    "official": {"estimator": "official"},
    "grpo": {"baseline": "grpo", "whiten": "masked", "inner_batches": 3, "inner_kl": 1e-4, "dual_clip": 3.0},
}
"""Choices of credit that need figures of all ranks."""
CORPUS: dict[str, dict[str, Any]] = {
    "text": {},
    "alone": {**corpus_twin.ALONE, "inner_epochs": 1, "lm_teacher_share": 0.5, "optimiser": corpus_twin.OPTIMISER},
}
"""Runs whose language-model loss is on a text file: beside the policy gradient, and alone as its twin has it."""
NEIGHBOURS: dict[str, dict[str, Any]] = {
    "kd": {"kind": "kd"},
    "gkd": {"kind": "gkd", "inner_epochs": 2},
    "skewed": {"kind": "skew_rkl", "student_share": 0.7, "replay": 4, "keep": {"metric": "reverse_kl"}},
}
"""Stages of other kinds, with fewer fresh rows in some batches than there are ranks."""


def config(folder: Path, cell: str) -> RunConfig:
    """The run of a cell ``STAGE-PLACEMENT``, such as ``zero2-zero3``, ``STAGE-PLACEMENT-averaged``, ``…-CREDIT``,
    ``…-CORPUS`` or ``…-NEIGHBOUR``."""
    stage, placement, *rest = cell.removesuffix(AVERAGED).split("-")
    prompts = str(folder / "prompts.jsonl")
    neighbour = {name: {"run_stages": (_neighbour(name),)} for name in rest if name in NEIGHBOURS}
    corpus: dict[str, Any] = {"corpus": str(folder / "corpus.txt"), "corpus_length": BLOCK}
    changes: dict[str, Any] = {
        "lm_coefficient": 0.5,
        "optimiser": {"lr": 3e-3, "schedule": "constant"},
        "inner_epochs": 2,
    }
    for name in rest:
        changes.update({**CREDIT, **CORPUS, **neighbour}[name])
    if rest == ["official"]:
        del changes["lm_coefficient"]
    return tiny.minillm_config(
        folder,
        teacher=folder / f"teacher-{placement}.yaml",
        student=folder / "student",
        prompts=folder / "prompts.jsonl",
        name=cell,
        steps=STEPS,
        samples_per_prompt=2,
        micro_batch=3,
        coin_groups=2,
        teacher_mix=0.3,
        lm_batch=TAKEN,
        **changes,
        validate_every=STEPS,
        run_engine={"student": stage},
        run_data={
            "train": prompts,
            "validation": prompts,
            "test": prompts,
            "max_prompt_tokens": 8,
            "validation_limit": HELD_OUT,
            "test_limit": HELD_OUT,
            **(corpus if set(rest) & CORPUS.keys() else {}),
        },
        # Three rows, one at a time: the second rank has none for the last batch.
        run_evaluation={"seeds": (10,), "batch": 1, "bootstrap": 10},
    )


def _neighbour(name: str) -> dict[str, Any]:
    optimiser = {"lr": 3e-3, "schedule": "constant"}
    return {"steps": STEPS, "batch": 5, "micro_batch": 2, "optimiser": optimiser, "validate_every": STEPS} | NEIGHBOURS[
        name
    ]


def write_inputs(folder: Path) -> None:
    """Two models, a card for each placement of the teacher, and prompts."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    corpus_twin.save_text(folder / "corpus.txt")
    for placement in ("replicated", "zero3"):
        card = Card(name=f"teacher-{placement}", model=str(folder / "teacher"), placement=placement)
        text = write_yaml(card.model_dump(exclude_none=True, exclude={"name"}, exclude_defaults=True))
        (folder / f"teacher-{placement}.yaml").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def averaged() -> Iterator[None]:
    """Engines that average the ranks' gradients, as if ``Student.update`` did not multiply by their number."""
    initialise = student_engine.initialise

    def broken(root: Any, *, ranks: Ranks, **options: Any) -> Any:
        engine = initialise(root, ranks=ranks, **options)
        backward = engine.backward
        engine.backward = lambda loss, **more: backward(loss / ranks.size, **more)
        return engine

    student_engine.initialise = broken
    try:
        yield
    finally:
        student_engine.initialise = initialise


if __name__ == "__main__":
    folder, *cells = sys.argv[1:]
    for place, name in enumerate(cells):
        with contextlib.ExitStack() as stack:
            if name.endswith(AVERAGED):
                stack.enter_context(averaged())
            if place > 0:  # the first cell's report has its drawings
                stack.enter_context(quick.undrawn())
            quick.short_collections()
            distill(config(Path(folder), name))
    leave(0)  # left to the end of Python, gloo sometimes aborts

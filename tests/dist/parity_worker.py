"""One rank of the parity test: runs every cell named on the command line, one after the other, in this process."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm import distill, student_engine
from minillm.config import RunConfig
from minillm.lost import leave
from minillm.ranks import Ranks
from minillm.yaml_reader import write_yaml
from tests import corpus_twin, quick, tiny

STEPS, HELD_OUT = 3, 3
BLOCK, TAKEN = 7, 5
"""Tokens of a block of the corpus, and blocks of an update."""
FIVE = 5
"""Steps of a cell of the matrix (``matrix``), which trains and does nothing else."""
AVERAGED = ".averaged"
PLACEMENTS = ("replicated", "zero3", "offload", "tp")
"""Of the teacher, those to come too."""
LORA = {"rank": 4, "alpha": 8}
LR = {"fp32": 3e-3, "bf16": 1e-5}
"""In 16 bits a larger one soon makes a weight round to its other neighbour, and with it another token be drawn."""
CREDIT: dict[str, dict[str, Any]] = {
    "ridge": {"baseline": "ridge", "importance": "per_decision", "gamma": 0.9, "horizon": 4},
    "official": {"estimator": "official"},
    "held": {"anchor": {"weight": 0.5, "rate": 0.2}, "future": "sampled"},
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
    """The run of a cell ``STUDENT.PLACEMENT``, such as ``zero2-offload.zero3``, then ``.lora``, ``.bf16``, ``.five``, ``.forward``, a
    name of CREDIT, CORPUS or NEIGHBOURS, ``.averaged``."""
    student, placement, *rest = cell.removesuffix(AVERAGED).split(".")
    how = {word: word in rest for word in ("lora", "bf16", "five", "forward")}
    rest = [word for word in rest if word not in how]
    steps = FIVE if how["five"] else STEPS
    prompts = str(folder / "prompts.jsonl")
    held_out = {"validation": prompts, "test": prompts, "validation_limit": HELD_OUT, "test_limit": HELD_OUT}
    neighbour = {name: {"run_stages": (_neighbour(name),)} for name in rest if name in NEIGHBOURS}
    corpus: dict[str, Any] = {"corpus": str(folder / "corpus.txt"), "corpus_length": BLOCK}
    changes: dict[str, Any] = {
        "lm_coefficient": 0.5,
        "optimiser": {"lr": LR["bf16" if how["bf16"] else "fp32"], "schedule": "constant"},
        "inner_epochs": 2,
    }
    for name in rest:
        changes.update({**CREDIT, **CORPUS, **neighbour}[name])
    if rest == ["official"]:
        del changes["lm_coefficient"]
    return tiny.minillm_config(
        folder,
        teacher=folder / ("bf16" if how["bf16"] else "fp32") / f"teacher-{placement}.yaml",
        student=folder / "student",
        prompts=folder / "prompts.jsonl",
        name=cell,
        steps=steps,
        samples_per_prompt=2,
        micro_batch=3,
        coin_groups=2,
        teacher_mix=0.3,
        lm_batch=TAKEN,
        **changes,
        validate_every=0 if how["five"] else STEPS,
        run_engine={
            "student": student,
            "precision": "bf16" if how["bf16"] else "fp32",
            "gather": "forward" if how["forward"] else "rollout",
        },
        run_data={
            "train": prompts,
            "max_prompt_tokens": 8,
            **({} if how["five"] else held_out),
            **(corpus if set(rest) & CORPUS.keys() else {}),
        },
        **({"run_lora": LORA} if how["lora"] else {}),
        **({"run_checkpoints": None} if how["five"] else {}),
        # Three rows, one at a time: the second rank has none for the last batch.
        run_evaluation={"seeds": (10,), "batch": 1, "bootstrap": 10},
    )


def _neighbour(name: str) -> dict[str, Any]:
    optimiser = {"lr": 3e-3, "schedule": "constant"}
    return {"steps": STEPS, "batch": 5, "micro_batch": 2, "optimiser": optimiser, "validate_every": STEPS} | NEIGHBOURS[
        name
    ]


def write_inputs(folder: Path) -> None:
    """Two models, cards for each placement of the teacher in 32 and in 16 bits, and prompts."""
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    corpus_twin.save_text(folder / "corpus.txt")
    for precision, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        (folder / precision).mkdir()
        for placement in PLACEMENTS:
            card = {"model": str(folder / "teacher"), "placement": placement, "dtype": dtype}
            (folder / precision / f"teacher-{placement}.yaml").write_text(write_yaml(card), encoding="utf-8")


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

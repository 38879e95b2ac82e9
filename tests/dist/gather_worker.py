"""One rank of the test of gathering: counts what a ZeRO-3 student's collectives gather in each part of a MiniLLM step."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from minillm.cards import Card
from minillm.config import MinillmStage, OptimiserConfig
from minillm.loading import inspect, load
from minillm.lost import leave
from minillm.objectives import Minillm
from minillm.ranks import Ranks
from minillm.student_engine import Student
from minillm.teacher_engine import Teacher
from minillm.types import Decoding
from tests import tiny
from tests.dist.rollout_worker import IDS, prompts

Gather = Literal["rollout", "forward"]
LONGEST = 8


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Collectives that gather weights, and the elements that come out of them."""
    from deepspeed.comm import comm

    backend, found = comm.cdb, {"calls": 0, "elements": 0}
    inner = backend.all_gather_into_tensor

    def gather(output_tensor: Any, input_tensor: Any, **options: Any) -> Any:
        found["calls"] += 1
        found["elements"] += output_tensor.numel()
        return inner(output_tensor=output_tensor, input_tensor=input_tensor, **options)

    backend.all_gather_into_tensor = gather
    try:
        yield found
    finally:
        backend.all_gather_into_tensor = inner


def count(folder: Path, gather: Gather, ranks: Ranks) -> dict[str, Any]:
    """Of one engine: its size, and what a rollout, its scoring included, and a forward that learns have gathered."""
    cards = {name: Card(name=name, model=str(folder / name)) for name in ("teacher", "student")}
    stage = MinillmStage(steps=1, prompts=4, teacher_mix=0.3, optimiser=OptimiserConfig(lr=1e-3))
    teacher, student = (
        Teacher(
            lambda: load(cards["teacher"], inspect(cards["teacher"]), seed=0), ranks=ranks, placement="replicated",
            precision="fp32", real_ids=len(tiny.WORDS),
        ),
        Student(
            lambda: load(cards["student"], inspect(cards["student"]), seed=0), ranks=ranks, settings="zero3",
            precision="fp32", optimiser=stage.optimiser, updates=1, real_ids=len(tiny.WORDS), gather=gather,
        ),
    )  # fmt: skip
    objective = Minillm(
        stage, prompts=prompts(), decoding=Decoding(max_new_tokens=LONGEST), teacher=teacher, ids=IDS, ranks=ranks,
        seed=3,
    )  # fmt: skip
    with counted() as rollout:
        collected, _ = objective.collect(0, student)
    with counted() as learning, objective.learning(collected, student) as updates:
        for update in updates:
            student.update(update.losses)
    padded = sum(-(-p.ds_numel // ranks.size) * ranks.size for p in student.root.parameters())
    tokens = collected.targets.scored.rollout.length_B.tolist()
    student.close()
    return {"padded": padded, "rollout": rollout, "learning": learning, "longest": max(tokens, default=0)}


if __name__ == "__main__":
    folder, ranks = Path(sys.argv[1]), Ranks(threads=1)
    found = {gather: count(folder, gather, ranks) for gather in get_args(Gather)}
    (folder / f"gathered-{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    leave(0)

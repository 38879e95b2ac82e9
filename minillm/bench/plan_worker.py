"""One rank of a measured step: ``python -m minillm.bench.plan_worker CASE_JSON OUT_FILE``."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from minillm import objectives, phases
from minillm.bench.bare import Sizes
from minillm.bench.memory import forget_peak, peak_now, standing_now
from minillm.bench.step import Ours, StepCase
from minillm.ranks import Ranks

TINY = {"teacher": "bench-world", "student": "micro-world-16x1", "rows": 2, "prompt_tokens": 4, "new_tokens": 4}


def main() -> None:
    """Warms up on small models, measures the case's, and writes the phases' peaks above what stood before them."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    ranks = Ranks(threads=1)
    warm = Ours(_case({**asked, **TINY}), ranks=ranks)
    warm.step()
    warm.close()
    del warm
    _give_back()
    before = standing_now(ranks.device)
    ours = Ours(_case(asked), ranks=ranks)
    found: dict[str, int] = {}
    now = ["rollout"]

    def note() -> None:
        found[now[0]] = max(found.get(now[0], 0), peak_now(ranks.device) - before)
        forget_peak(ranks.device)

    def enter(name: str) -> None:
        note()
        now[0] = name
        phases.enter(name)

    vars(objectives)["phases"] = _Phases(enter)
    forget_peak(ranks.device)
    for _ in range(asked["steps"]):
        ours.step(between=lambda: enter("update"))
        enter("rollout")
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


class _Phases:
    """Stands for the module ``phases`` in the objective."""

    def __init__(self, enter: Any) -> None:
        self.enter = enter


def _case(asked: dict[str, Any]) -> StepCase:
    sizes = {name: asked[name] for name in ("teacher", "student", "rows", "prompt_tokens", "new_tokens", "precision")}
    return StepCase(
        sizes=Sizes(**sizes), threads=1, inner_updates=2, settings=asked["engine"], placement=asked["placement"],
        micro_batch=asked["micro_batch"], teacher_mix=asked["teacher_mix"],
    )  # fmt: skip


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)


if __name__ == "__main__":
    main()

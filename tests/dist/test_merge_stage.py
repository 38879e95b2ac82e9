"""A run that merges on two ranks, each with half of every student, merges and goes on as on one process."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from tests.dist.merge_worker import run
from tests.dist.ranks import start_ranks
from tests.resume.test_going_on import made
from tests.tiny import logged


def test_two_ranks_merge_and_go_on_as_one_process(tmp_path: Path) -> None:
    place = made(tmp_path)
    alone = run(place, "alone")
    start_ranks("tests.dist.merge_worker", str(place))
    ranks = place / "runs" / "ranks"
    found = {}
    for part in ("stages/one/student", "stages/both/student", "student"):
        one, two = (load_file(folder / part / "model.safetensors") for folder in (alone, ranks))
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5, part
        found[part] = one
    one, both, last = found.values()
    assert all(max(float((other[name] - both[name]).abs().max()) for name in both) > 1e-3 for other in (one, last))
    assert len(logged(ranks, "merge")) == 1, "rank 0 alone merges and logs"

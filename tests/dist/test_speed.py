"""What two ranks say of their collectives: each once, whole, and with the time that a rank waits for the other."""

from __future__ import annotations

import json
from pathlib import Path

from tests.dist.ranks import start_ranks
from tests.dist.speed_worker import LATE_S, WIDTH


def test_collectives_of_two_ranks_are_counted_with_the_time_of_waiting(tmp_path: Path) -> None:
    start_ranks("tests.dist.speed_worker", str(tmp_path))
    first, late = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    for found in (first, late):
        assert found["all_gather"][:2] == [2, 2 * 2 * WIDTH * 4]
        assert found["all_reduce"][:2] == [2, WIDTH * 8 + WIDTH * 4]
    # The control: the rank that came late waited for nobody.
    assert first["all_reduce"][2] > LATE_S - 0.2 > late["all_reduce"][2]

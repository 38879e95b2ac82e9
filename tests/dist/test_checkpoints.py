"""Real ranks agree on their checkpoints; every fault that the store may meet is in tests/faults, on simpler ranks."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import start_ranks


def test_two_ranks_hear_the_same_of_every_save_and_choice(tmp_path: Path) -> None:
    printed = start_ranks("tests.dist.checkpoint_worker", str(tmp_path))
    for rank in range(2):
        assert f"rank {rank}: rank 1 failed; [3, 2]; refused; 2 of 2" in printed

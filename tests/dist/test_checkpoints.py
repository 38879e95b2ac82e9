"""Real ranks agree on their checkpoints; every fault that the store may meet is in tests/faults, on simpler ranks."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.dist.ranks import start_ranks

HOST = socket.gethostname()


def test_two_ranks_hear_the_same_of_every_save_and_choice(tmp_path: Path) -> None:
    printed = start_ranks("tests.dist.checkpoint_worker", str(tmp_path))
    for rank in range(2):
        assert f"rank {rank}: rank 1 failed; [3, 2]; refused; 2 of 2" in printed


def test_ranks_without_one_folder_for_all_are_told_so_at_once(tmp_path: Path) -> None:
    printed = start_ranks("tests.dist.apart_disks_worker", str(tmp_path))
    for rank in range(2):
        assert f"rank {rank}, one: new" in printed
        assert f"rank {rank}, apart: out/run: rank 1 on {HOST} does not see what rank 0 has in it; wanted" in printed
        assert f"rank {rank}, another: out/run: rank 1 on {HOST} has another folder of that name; wanted" in printed

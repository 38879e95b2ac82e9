"""Two ranks go on from every update of a stage to the same bits, each with its own rows inside a step."""

from __future__ import annotations

from pathlib import Path

from tests.dist.ranks import start_ranks
from tests.resume.toy import save_models

MOMENTS = {"sft": (3, 3), "skew": (6, 6), "anchored": (8, 2), "held": (8, 2)}
"""How many a stage has, and at how many of them one rank's own state is the other's: where it is empty."""


def test_two_ranks_go_on_from_every_update_to_the_same_bits(tmp_path: Path) -> None:
    told = start_ranks("tests.dist.moments_worker", str(save_models(tmp_path)))
    for rank in range(2):
        for kind, (moments, alike) in MOMENTS.items():
            want = f"rank {rank} {kind}: {moments} moments, [] apart, {moments} shared, {alike} own alike\n"
            assert want in told, told

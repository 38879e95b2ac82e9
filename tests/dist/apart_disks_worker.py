"""A run's folder taken by several ranks: on one disk, on a disk each, and where another run left a folder of its name."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from minillm import resuming
from minillm.config import load_config
from minillm.errors import ConfigError
from minillm.lost import leave
from minillm.ranks import Ranks
from minillm.run_lock import run_lock
from minillm.store import RunFolder

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart" / "minillm.yaml"


def main(place: Path) -> None:
    """Prints a line a rank and case."""
    ranks = Ranks(threads=1)
    resuming.SHOWN_S = 0.3
    config = load_config(RECIPE)
    for case in ("one", "apart", "another"):
        disk = place / (case if case == "one" else f"{case}-{ranks.rank}")
        disk.mkdir(exist_ok=True)
        os.chdir(disk)
        folder = RunFolder(Path("out/run"), writes=ranks.first)
        if case == "another" and not ranks.first:
            folder.path.mkdir(parents=True)
            with run_lock(folder.path):
                pass
        try:
            with resuming.taken(folder, config, ranks=ranks, fresh=False) as standing:
                told = str(standing)
        except ConfigError as error:
            told = str(error).splitlines()[0]
        print(f"rank {ranks.rank}, {case}: {told}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)  # left to the end of Python, gloo sometimes aborts

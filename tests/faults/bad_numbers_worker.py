"""One rank of the test of rows that are bad on the last rank only: left out, and not."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from minillm.config import MinillmStage
from minillm.errors import NonFinite
from tests.faults.test_bad_numbers import DROPS, ONE, one_step, poisoned
from tests.resume.toy import Toy


def main(models: Path, rank: int) -> None:
    """Leaves the weights of a step without those rows, and prints why one with them is refused."""
    folder = models / f"rank-{rank}"
    folder.mkdir()
    toy = Toy(folder, models=models)
    bad = rank == toy.ranks.size - 1
    with poisoned(toy.teacher, position=0) if bad else contextlib.nullcontext():
        found = one_step(toy, MinillmStage(**ONE, **DROPS))
        save_file(found["weights"], folder / "weights.safetensors")
        (folder / "gone.json").write_text(json.dumps(sorted(found["gone"])), encoding="utf-8")
        try:
            one_step(toy, MinillmStage(**ONE))
        except NonFinite as error:
            print(f"rank {rank} stopped: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))

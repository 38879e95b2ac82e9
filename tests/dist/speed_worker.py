"""One rank: a few collectives of ours and of DeepSpeed's, of sizes that are known, and a wait for the other rank."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from minillm import collectives
from minillm.lost import leave
from minillm.ranks import Ranks

WIDTH, LATE_S = 1000, 0.5

if __name__ == "__main__":
    ranks = Ranks()
    from deepspeed import comm

    collectives.watch()
    ranks.barrier()
    before = collectives.spent()
    if not ranks.first:
        time.sleep(LATE_S)
    ranks.sum(torch.ones(WIDTH))  # in float64
    whole = torch.empty(WIDTH * ranks.size)
    comm.all_gather_into_tensor(whole, torch.ones(WIDTH))
    comm.all_gather_into_tensor(whole, torch.ones(WIDTH), async_op=True).wait()
    comm.all_reduce(torch.ones(WIDTH), op=comm.ReduceOp.SUM, async_op=True).wait()
    after = collectives.spent()
    nothing = collectives.Spent()
    found = {
        kind: [
            one.calls - before.get(kind, nothing).calls,
            one.bytes - before.get(kind, nothing).bytes,
            one.seconds - before.get(kind, nothing).seconds,
        ]
        for kind, one in after.items()
    }
    (Path(sys.argv[1]) / f"rank{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    ranks.barrier()
    leave(0)

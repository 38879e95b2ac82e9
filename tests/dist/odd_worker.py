"""A rank that does as it is told: says, raises, exits, dies, hangs, or leaves a mark in its process."""

from __future__ import annotations

import os
import signal
import sys
import time

from minillm import api

HOW, RANK = sys.argv[1], int(os.environ["RANK"])


if __name__ == "__main__":
    if HOW == "say":
        print(RANK, "of", f"{os.environ['WORLD_SIZE']}:", *sys.argv[2:], os.getpid())
    if HOW == "mark":
        print("marked" if hasattr(api, "marked") else "unmarked")
        api.marked = True  # type: ignore[attr-defined]
    if HOW == "raise" and RANK == 1:
        raise ValueError("of rank 1")
    if HOW == "exit":
        sys.exit(7 * RANK)
    if HOW == "die" and RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if HOW == "hang":
        time.sleep(600)

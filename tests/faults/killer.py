"""Kills saves: ``python -m tests.faults.killer FOLDER RANKS`` prints, as JSON, what the restarts after them found.

A process of its own, without torch, since a fork is made for each point at which a save is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from minillm import fault
from tests.faults.sides import Exchange, Side
from tests.faults.toy import is_right, save, store

if TYPE_CHECKING:
    from minillm.ranks import Ranks


def exchanges(rank: int, pipes: list[tuple[Connection, Connection]]) -> Exchange:
    """The words of all ranks, by way of rank 0; a rank that has died is an ``EOFError``."""
    for other, (low, high) in enumerate(pipes, start=1):
        (high if rank == 0 else low).close()
        if rank not in (0, other):
            high.close()

    def exchange(mine: Any) -> list[Any]:
        if rank:
            pipes[rank - 1][1].send(mine)
            return cast("list[Any]", pipes[rank - 1][1].recv())
        everyone = [mine, *(low.recv() for low, _ in pipes)]
        for low, _ in pipes:
            low.send(everyone)
        return everyone

    return exchange


def live(run: Path, rank: int, pipes: list[tuple[Connection, Connection]], plan: fault.Plan) -> NoReturn:
    """The life of one rank: it saves step 3 and ends."""
    try:
        ranks = cast("Ranks", Side(rank, len(pipes) + 1, exchanges(rank, pipes)))
        with fault.planned(plan):
            fault.point("began")
            save(store(run, ranks=ranks), 3, ranks)
    except BaseException as error:
        os._exit(9 if isinstance(error, EOFError | ConnectionError) else 1)
    os._exit(0)


def start(run: Path, ranks: int, *, victim: int, plan: fault.Plan) -> list[int]:
    """How each rank ended: its exit code, or minus the signal that ended it."""
    pipes, children = [Pipe() for _ in range(ranks - 1)], list[int]()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            live(run, rank, pipes, plan if rank == victim else lambda name, detail: None)
        children.append(child)
    for ends in pipes:
        for end in ends:
            end.close()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def killed_at(number: int) -> fault.Plan:
    """Ends the process at the point of this number, as nothing but the kernel can."""
    passed = [0]

    def plan(name: str, detail: str) -> None:
        if passed[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        passed[0] += 1

    return plan


def fresh(run: Path, base: Path) -> Path:
    """A copy of the run before the save."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(base, run)
    return run


def restarted(run: Path) -> tuple[int, int]:
    """(Step that a restart finds, folders that it cleans away); it goes on from there and saves again."""
    checkpoints = store(run)
    found = checkpoints.choose("auto")
    assert found is not None and is_right(found), found
    left = sum(name.startswith(".") for name in os.listdir(checkpoints.root))
    checkpoints.clean()
    again = save(checkpoints, found.manifest.step + 1)
    assert is_right(again) and sorted(os.listdir(checkpoints.root)) == [found.path.name, again.path.name]
    return found.manifest.step, left


def main(folder: Path, ranks: int) -> None:
    """One save for each point that each rank passes, killed there."""
    assert "torch" not in sys.modules
    base, run, points = folder / "base", folder / "run", Counter[str]()
    base.mkdir()
    for step in (1, 2):
        save(store(base), step)
    found, left = Counter[int](), 0
    for victim in range(ranks):
        passed = folder / f"points-{victim}"

        def record(name: str, detail: str, passed: Path = passed) -> None:
            with passed.open("a") as file:
                file.write(f"{name}\n")

        assert start(fresh(run, base), ranks, victim=victim, plan=record) == [0] * ranks
        names = passed.read_text().splitlines()
        points.update(names)
        for number in range(len(names)):
            ended = start(fresh(run, base), ranks, victim=victim, plan=killed_at(number))
            assert ended[victim] == -signal.SIGKILL, (names[number], ended)
            # The others notice, or were done with the dead one.
            assert all(code in {0, 9} for rank, code in enumerate(ended) if rank != victim), (names[number], ended)
            step, more = restarted(run)
            found[step] += 1
            left += more > 0
    print(json.dumps({"points": points, "found": found, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

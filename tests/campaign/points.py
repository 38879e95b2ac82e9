"""Every fault point of a small run, one at a time: the rank that passes it is killed there, the run is started again,
and what it leaves must be what the unbroken run leaves, bit for bit."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm import exits, fault
from tests.campaign import forked, recipes
from tests.campaign.lives import outcome
from tests.resume.broken_off import ATTEMPTS, PARTS

MOST_STARTS = 3
"""Of a run that is killed once: the second start must end it."""


@dataclass(frozen=True, slots=True)
class Point:
    """A fault point of a run."""

    ranks: int
    rank: int
    number: int
    """Among all that this rank passes, from 0."""
    name: str
    occurrence: int
    """How often the rank had passed one of this name before."""

    @property
    def key(self) -> str:
        """Tells it from all others."""
        return f"{self.ranks}/{self.rank}/{self.number}"


class Small:
    """A run of two stages of so many steps, saved after each, on so many ranks: what it leaves, and its points."""

    def __init__(self, folder: Path, *, ranks: int, steps: int = 2) -> None:
        self.folder, self.ranks = folder / f"ranks-{ranks}", ranks
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "teacher").is_dir():
            forked.apart(lambda: recipes.write_models(self.folder))
        self._recipe = recipes.write_small(self.folder, steps=steps)
        self.whole, self.points = self._recorded()

    def _start(self, name: str, plans: list[fault.Plan]) -> int:
        words = ["distill", "--config", str(self._recipe), f"out={self.folder / 'runs' / name}"]
        return forked.live(words, plans=plans, log=self.folder / f"{name}.log")

    def _recorded(self) -> tuple[dict[str, Any], list[Point]]:
        """Made again each time: points may have come since the folder was made."""
        self._forget("whole")
        files = [self.folder / f"points-{rank}" for rank in range(self.ranks)]
        for file in files:
            file.unlink(missing_ok=True)
        code = self._start("whole", [forked.recorded(file) for file in files])
        assert code == exits.DONE, (code, (self.folder / "whole.log").read_text("utf-8")[-2000:])
        points = []
        for rank, file in enumerate(files):
            seen = Counter[str]()
            for number, name in enumerate(file.read_text(encoding="utf-8").splitlines()):
                points.append(Point(self.ranks, rank, number, name, seen[name]))
                seen[name] += 1
        return outcome(self.folder / "runs/whole/run"), points

    def killed(self, point: Point) -> dict[str, Any]:
        """Kills the point's rank there and starts the run again; how the starts ended and what differs at the end."""
        name, hit = f"at-{point.rank}-{point.number}", self.folder / "hit"
        self._forget(name)
        hit.unlink(missing_ok=True)
        plans: list[fault.Plan] = [forked.nothing] * self.ranks
        plans[point.rank] = forked.ended_at(point.number, hit)
        codes = [self._start(name, plans)]
        while codes[-1] != exits.DONE and len(codes) < MOST_STARTS:
            codes.append(self._start(name, [forked.nothing] * self.ranks))
        where = hit.read_text(encoding="utf-8") if hit.is_file() else "nowhere"
        differs = [] if where == point.name else [f"killed at {where}"]
        if codes[1:] != [exits.DONE]:
            differs.append(f"exit codes {codes}")
        if codes[-1] == exits.DONE:
            differs += self._differs(name)
        return {"codes": codes, "differs": differs}

    def ended_over_and_over(
        self, name: str, *, how: signal.Signals, draw: random.Random, longest: int
    ) -> dict[str, Any]:
        """Ends one rank of a run over and over, each time 1 to ``longest`` fault points after its start, until the run
        is done; how the starts ended and what differs at the end."""
        self._forget(name)
        codes, hit = list[int](), self.folder / "hit"
        while (not codes or codes[-1] not in {exits.DONE, 1}) and len(codes) < ATTEMPTS:
            plans: list[fault.Plan] = [forked.nothing] * self.ranks
            plans[draw.randrange(self.ranks)] = forked.ended_at(draw.randrange(1, longest), hit, how=how)
            codes.append(self._start(name, plans))
        differs = [f"exit codes {codes}"] if not set(codes) <= ends(how, ranks=self.ranks) else []
        if codes[-1] != exits.DONE:
            differs.append(f"not done after {len(codes)} starts")
        else:
            differs += self._differs(name)
        return {"codes": codes, "differs": differs}

    def _differs(self, name: str) -> list[str]:
        found = outcome(self.folder / "runs" / name / "run")
        differs = [each for each in self.whole if found[each] != self.whole[each]]
        if not differs:
            self._forget(name)
        return differs

    def _forget(self, name: str) -> None:
        shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)
        (self.folder / f"{name}.log").unlink(missing_ok=True)


def ends(how: signal.Signals, *, ranks: int) -> set[int]:
    """Exit codes of a run whose one rank is ended so, or that is done before."""
    if how == signal.SIGKILL:
        return {exits.DONE, exits.RANK_LOST if ranks > 1 else -how}
    # Before a handler is there, and once what is saved is all, it ends the rank as it ends any process.
    return {exits.DONE, exits.STOPPED, exits.RANK_LOST if ranks > 1 else -how}


def spread(points: Sequence[Point], count: int) -> list[Point]:
    """So many of them, one by lot from each of as many stretches, and of each name at each rank the first that would be
    missed; in no order, so that a campaign that is broken off has done a sample."""
    draw = random.Random(count)  # saves repeat themselves, and equal distances would fall into step with them
    ends = [place * len(points) // count for place in range(count + 1)]
    everything = {point.key for point in points}
    taken = (
        {points[number].key for number in map(draw.randrange, ends, ends[1:])} if count < len(points) else everything
    )
    names = {(point.rank, kind(point)) for point in points if point.key in taken}
    for point in points:
        if (point.rank, kind(point)) not in names:
            names.add((point.rank, kind(point)))
            taken.add(point.key)
    chosen = [point for point in points if point.key in taken]
    draw.shuffle(chosen)
    return chosen


def kind(point: Point) -> str:
    """Its name without the detail, but for a phase."""
    return point.name if point.name.startswith("phase") else point.name.partition(" ")[0]


def main(folder: Path, ranks: int, asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a test asks: how many points each rank passes, then how the runs ended that were killed at these,
    ``RANK:NAME:OCCURRENCE``, or ``RANK:NAME:OCCURRENCE:PART`` without one of ``PARTS`` of going on, which must come
    last."""
    forked.prepare()
    small = Small(folder, ranks=ranks)
    yield {"points": [sum(point.rank == rank for point in small.points) for rank in range(ranks)]}
    for words in asked:
        rank, name, occurrence, *without = words.split(":")
        for part in without:
            owner, method = PARTS[part]
            setattr(owner, method, lambda *_, **__: [])
        sought = (int(rank), name, int(occurrence))
        point = next(point for point in small.points if (point.rank, point.name, point.occurrence) == sought)
        yield {"point": words, **small.killed(point)}


if __name__ == "__main__":
    for line in main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]):
        print(json.dumps(line), flush=True)

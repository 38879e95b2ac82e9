"""The campaign of faults: every fault point of a small run once, two-rank runs killed at random moments of time, and
runs that are ended over and over at random points. ``points.jsonl``, ``kills/events.jsonl`` and ``again.jsonl`` in its
folder have a line for each; a campaign that was killed goes on from them."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from tests.campaign import forked, points, soak
from tests.campaign.journal import Journal, table

RANKS = (1, 2)
KINDS = {"kill rank": 3, "kill all": 2, "kill launcher": 1}
"""How a two-rank run is killed at a moment of time, and how often."""
LIVES = 34
"""Of a run that is killed at moments of time."""
HOW = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
"""Run after run, what ends those that are ended over and over."""
STEPS, LONGEST = 4, 300
"""Steps of each of their stages, and how many fault points a life of theirs passes at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is done."""

    points: int | None
    """Of each number of ranks; None for all."""
    kills: int
    runs: int
    """That are ended over and over, of each number of ranks."""


FULL, QUICK = Extent(points=150, kills=100, runs=6), Extent(points=6, kills=3, runs=1)


class Faults:
    """A campaign in a folder."""

    def __init__(self, folder: Path, *, extent: Extent, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._extent, self._seed = folder, extent, seed
        self._points, self._again = Journal(folder / "points.jsonl"), Journal(folder / "again.jsonl")

    def run(self, parts: Sequence[str]) -> bool:
        """The parts of these names; whether every run ended as the unbroken one."""
        rows, differs = list[tuple[str, object]](), list[str]()
        for part in parts:
            more, wrong = {"points": self._all_points, "kills": self._kills, "again": self._over_and_over}[part]()
            rows += more
            differs += wrong
        print(table(("what", "number"), rows))
        print("\n".join(differs) if differs else "all runs equal their unbroken runs, bit for bit")
        return not differs

    def _all_points(self) -> tuple[list[tuple[str, object]], list[str]]:
        forked.prepare()
        done = {line["key"] for line in self._points.of("point")}
        rows = list[tuple[str, object]]()
        for ranks in RANKS:
            small = points.Small(self._folder, ranks=ranks)
            every = small.points
            chosen = points.spread(every, len(every) if self._extent.points is None else self._extent.points)
            rows.append((f"fault points, {ranks} rank{'s' * (ranks > 1)}", len(every)))
            for place, point in enumerate(chosen):
                if point.key in done:
                    continue
                ended = small.killed(point)
                self._points.add("point", key=point.key, ranks=ranks, rank=point.rank, number=point.number,
                                 name=point.name, occurrence=point.occurrence, **ended)  # fmt: skip
                self._say(f"{ranks} rank{'s' * (ranks > 1)}, {place + 1} of {len(chosen)}: rank {point.rank} killed at "
                          f"{point.name} ({point.occurrence + 1}): {ended['differs'] or 'equal'}")  # fmt: skip
        lines = self._points.of("point")
        kinds = Counter((line["ranks"], line["rank"], line["name"].split()[0]) for line in lines)
        rows += [
            (f"  killed at {name}, rank {rank} of {ranks}", kinds[ranks, rank, name])
            for ranks, rank, name in sorted(kinds)
        ]
        rows.append(("runs killed at a fault point", len(lines)))
        return rows, [f"{line['key']} {line['name']}: {line['differs']}" for line in lines if line["differs"]]

    def _kills(self) -> tuple[list[tuple[str, object]], list[str]]:
        campaign = soak.Soak(
            self._folder / "kills", minutes=inf, seed=self._seed, most=self._extent.kills, kinds=KINDS,
            damaged=0.0, rounds=soak.ROUNDS[:2], lives_of_a_round=LIVES, name="faults",
        )  # fmt: skip
        campaign.run()
        journal = campaign.journal
        events, lost = soak.events_of(journal), soak.lost(journal)
        kinds = Counter(f"{line['kind']}{line['target']}" for line in events)
        rows: list[tuple[str, object]] = [(f"  {kind}", kinds[kind]) for kind in sorted(kinds)]
        rows = [("kills at random moments, 2 ranks", len(events)), *rows, ("  runs", len(journal.of("round"))),
                ("  steps lost, mean", f"{sum(lost) / max(1, len(lost)):.1f}")]  # fmt: skip
        return rows, soak.differing(journal)

    def _over_and_over(self) -> tuple[list[tuple[str, object]], list[str]]:
        forked.prepare()
        for ranks in RANKS:
            small = points.Small(self._folder / "again", ranks=ranks, steps=STEPS)
            for number in range(self._extent.runs):
                if not self._again.of("run", ranks=ranks, number=number):
                    how = HOW[number % len(HOW)]
                    draw = random.Random(f"{self._seed}/{ranks}/{number}")
                    ended = small.ended_over_and_over(f"again-{number}", how=how, draw=draw, longest=LONGEST)
                    self._again.add("run", ranks=ranks, number=number, how=how.name, **ended)
                    self._say(f"{ranks} rank{'s' * (ranks > 1)}, {len(ended['codes']) - 1} times {how.name}: "
                              f"{ended['differs'] or 'equal'}")  # fmt: skip
        lines = self._again.of("run")
        ends = Counter[tuple[str, int]]()
        for line in lines:
            ends[line["how"], line["ranks"]] += len(line["codes"]) - 1
        rows = [(f"{how} at random points, ranks: {ranks}", count) for (how, ranks), count in sorted(ends.items())]
        wrong = [
            f"run {line['number']} of {line['ranks']} ranks: {line['differs']}" for line in lines if line["differs"]
        ]
        return [*rows, ("  runs", len(lines))], wrong

    def _say(self, words: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {words}", flush=True)

"""Rows that are left out of a rollout because a model's scores of them are no finite numbers: named, counted, bounded.

Legend: B this rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from minillm.errors import NonFinite
from minillm.minillm_settings import MinillmSettings
from minillm.ranks import Ranks
from minillm.scored_rows import with_rows
from minillm.state import State
from minillm.types import Rollout
from minillm.updates import News

Scores = TypeVar("Scores")


@dataclass(frozen=True, slots=True)
class Kept(Generic[Scores]):
    """What is left of a rank's rollout, and its scores."""

    rollout: Rollout
    scores: Scores
    rows: list[int]
    """Which of the rank's rows these are."""
    found: list[NonFinite]
    """Why the others are gone."""


class LeftOut:
    """Follows ``non_finite`` of a stage: ``drop_row`` leaves out ``max_dropped_rows`` rows of it at most."""

    def __init__(self, stage: MinillmSettings, ranks: Ranks) -> None:
        self._drops, self._most = stage.non_finite == "drop_row", stage.max_dropped_rows
        self._ranks = ranks
        self._count = 0
        self._news: list[News] = []

    def scored(self, rollout: Rollout, score: Callable[[Rollout], Scores]) -> Kept[Scores]:
        """The scores of those rows of which ``score`` finds finite ones; ``NonFinite`` where it must find them of all.

        No collective: what is gone, ``agreed`` tells the other ranks.
        """
        rows, found = list(range(len(rollout.stop_B))), list[NonFinite]()
        while True:
            left = rollout if len(rows) == len(rollout.stop_B) else with_rows(rollout, rows)
            try:
                return Kept(left, score(left), rows, found)
            except NonFinite as error:
                if not (self._drops and error.rows):
                    raise
                found.append(error)
                gone = {rows[at] for at in error.rows}
                rows = [row for row in rows if row not in gone]

    def agreed(
        self, kept: Kept[Scores], *, mine: Sequence[int], uid_B: Sequence[str], sequences: int
    ) -> frozenset[int]:
        """The rows of all ranks that are gone; ``mine`` numbers this rank's among the ``sequences`` of all.

        To be called on all ranks. Raises ``NonFinite`` on all of them where these are too many, or all.
        """
        if not self._drops:
            return frozenset()
        gone = [(mine[at], uid_B[at], self._ranks.rank) for at in sorted({*range(len(mine))} - {*kept.rows})]
        if self._ranks.most(len(gone)) == 0:
            return frozenset()
        everyone = sorted(self._ranks.gather_objects(gone))
        uids, why = [uid for _, uid, _ in everyone], self._ranks.gather_objects([str(each) for each in kept.found])[0]
        self._count += len(everyone)
        named = f"{', '.join(map(repr, uids[:8]))}{', …' if len(uids) > 8 else ''}"
        most = f"{self._count} by now, max_dropped_rows {self._most}"
        if self._count > self._most or len(everyone) == sequences:
            raise NonFinite(
                f"{len(everyone)} of {sequences} rows of a rollout have scores that are no finite numbers ({most}): "
                f"{named}\n  the first: {why}",
                batch=kept.found[0].batch if kept.found else None, batch_of=everyone[0][2],
            )  # fmt: skip
        words = f"left out {len(everyone)} of {sequences} rows, whose scores are no finite numbers ({most}): {named}"
        self._news.append(News("left_out", {"uids": uids, "by_now": self._count}, words))
        return frozenset(row for row, _, _ in everyone)

    def spared(self, work: Callable[[], Scores], otherwise: Scores, *, what: str) -> Scores:
        """What ``work`` gives, which no row is learnt from; where it finds numbers that are not finite and rows may be
        left out, ``otherwise``, told. ``work`` must fail on all ranks or on none."""
        try:
            return work()
        except NonFinite as error:
            if not self._drops:
                raise
            reason = str(error).splitlines()[0]
            self._news.append(News("left_out", {"what": what, "reason": reason}, f"{what} is not known: {reason}"))
            return otherwise

    def news(self) -> list[News]:
        """What has not been told yet."""
        told, self._news = self._news, []
        return told

    def state(self) -> State:
        """How many there were, in a stage that may leave any out."""
        return State({"left_out": self._count} if self._drops else {})

    def restore(self, state: State) -> None:
        """Takes that up."""
        self._count = int(state.record.get("left_out", 0))

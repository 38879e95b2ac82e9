"""Ranks that need no torch: what a checkpoint store asks of ``Ranks``, over threads or forked processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from minillm.errors import told_to_all

if TYPE_CHECKING:
    from minillm.ranks import Ranks  # brings torch, which a parent that forks does without

LIMIT_S = 20
Exchange = Callable[[Any], list[Any]]
"""Gives one's own word and brings everybody's, in the order of ranks."""


@dataclass(frozen=True)
class Side:
    """One of several ranks."""

    rank: int = 0
    size: int = 1
    exchange: Exchange = field(default=lambda mine: [mine])

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        return [item for part in self.exchange(mine) for item in part]

    def of_first(self, work: Callable[[], Any]) -> Any:
        told = None
        if self.first:
            try:
                told = (work(), None)
            except Exception as error:
                told = (None, told_to_all(error))
        result, found = self.exchange(told)[0]
        if found is not None:
            raise found
        return result


def alone() -> Ranks:
    """The only rank."""
    return cast("Ranks", Side())


def in_threads(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` gives, or raises, on each of ``size`` ranks that are threads."""
    wall, told = threading.Barrier(size), dict[int, Any]()
    ended = dict[int, Any]()

    def one(rank: int) -> None:
        def exchange(mine: Any) -> list[Any]:
            told[rank] = mine
            wall.wait(timeout=LIMIT_S)
            everyone = [told[other] for other in range(size)]
            wall.wait(timeout=LIMIT_S)
            return everyone

        try:
            ended[rank] = work(cast("Ranks", Side(rank, size, exchange)))
        except Exception as error:
            ended[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ended[rank] for rank in range(size)]

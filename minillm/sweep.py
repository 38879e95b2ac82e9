"""One loop over an evaluation's batches, for all that is drawn and read there: with progress, over ranks, and going on
where an earlier process ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minillm.progress import Progress
from minillm.ranks import Ranks
from minillm.unfinished import Keeper, Key, Keyed


def in_batches(
    batches: Sequence[Sequence[Key]],
    work: Callable[[int, Sequence[Key]], Sequence[Any]],
    *,
    part: str,
    ranks: Ranks,
    keeper: Keeper | None = None,
    title: str = "",
) -> list[Keyed]:
    """Every key of all ranks with what ``work`` makes of it, in the order of the keys, on every rank.

    ``work`` gets the number of a batch and the keys that are left of it. What ``keeper`` has of ``part`` is not made
    again, and what is made is kept. All ranks have as many batches, and call ``work`` equally often: also with no keys,
    while another has some. With a ``title`` there is a progress bar, which counts what was there.
    """
    rows: list[Keyed] = [] if keeper is None else [*keeper.kept(part)]
    done, fresh = {key for key, _ in rows}, list[Keyed]()
    left = [[key for key in batch if key not in done] for batch in batches]
    if done and not ranks.anyone(any(left)):
        return sorted(rows, key=lambda keyed: keyed[0])
    bar = Progress(title, total=len(batches), unit="batches", shown=bool(title) and ranks.first)
    for piece, keys in enumerate(left):
        if done and not ranks.anyone(bool(keys)):
            continue
        fresh += zip(keys, work(piece, keys), strict=True)
        bar.advance(piece + 1, {})
        if keeper is not None and keeper.due():
            rows += ranks.gather_objects(fresh)
            fresh = []
            keeper.keep(part, rows)
    bar.close()
    rows += ranks.gather_objects(fresh)
    if keeper is not None:
        keeper.hold(part, rows)
    return sorted(rows, key=lambda keyed: keyed[0])

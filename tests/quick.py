"""What tiny runs spend their time on beside the run, left out."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from minillm import plots

NOT_DRAWN = "not drawn"


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Reports with empty drawings: four real ones at the end of a tiny run take as long as the run."""
    plain = plots._svg

    def empty(draw: object, *, key: str, title: str, rows: int = 0) -> str:
        return f'<svg viewBox="0 0 1 1"><title>{key}: {title}, {NOT_DRAWN}</title></svg>'

    plots._svg = empty
    try:
        yield
    finally:
        plots._svg = plain


def short_collections() -> None:
    """Whatever stands now is left out of garbage collections: each engine that closes makes one, which would walk
    through all of torch and transformers."""
    gc.collect()
    gc.freeze()

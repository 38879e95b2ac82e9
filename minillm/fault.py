"""Named points at which tests let a run fail.

A point does nothing unless a plan is set. A plan that records lists the points that a run really passes, so that a new
file or phase is covered without a new test; another one kills the process at one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Plan = Callable[[str, str], None]
"""What is done at a point, which it hears by name and detail."""
_plans: list[Plan] = []


def point(name: str, detail: str = "") -> None:
    """Tells the plan, where there is one, that this point is reached."""
    for plan in _plans:
        plan(name, detail)


@contextlib.contextmanager
def planned(plan: Plan) -> Iterator[None]:
    """Sets a plan for the time of the block, in every thread of this process."""
    _plans.append(plan)
    try:
        yield
    finally:
        _plans.remove(plan)

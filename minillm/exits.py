"""Exit codes: how a process says to a shell, a cluster or the launcher how it ended.

A cluster that starts a job again by itself should do so after ``STOPPED`` and ``RANK_LOST``: the same command goes on.
"""

from __future__ import annotations

DONE = 0
CHECK_FAILED = 1
"""A check of ``minillm selftest``, or a figure of ``study --reproduce``, does not hold; also Python's own code for an
error of ours, with a traceback."""
MENDABLE = 2
"""Something the user can mend. Nothing was trained."""
NON_FINITE = 3
"""Numbers that are not finite; no update was made from them."""
ALARMED = 4
"""An alarm whose action is to stop the run."""
RANK_LOST = 5
"""A rank was killed, gave no sign of life or left a collective; nothing was published after its last checkpoint."""
SAVE_FAILED = 6
"""The disk refused a checkpoint, a student, the log or results: it is full, read-only or gone. What was saved or
published before is whole."""
STOPPED = 75
"""Stopped by a signal, with all that is needed to go on saved. (EX_TEMPFAIL of sysexits.h: try again.)"""
INTERRUPTED = 130
"""Interrupted where there was nothing to save, or a second time: ``by_signal(SIGINT)``."""


def by_signal(number: int) -> int:
    """The code of a process that a signal ended, as shells give it; also of one that left at its second signal, and
    published nothing."""
    return 128 + number

"""What a rank says when another one has left it alone, and how ranks part."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from minillm import exits, phases
from minillm.errors import RankLost

_OF_TRANSPORT = ("gloo/transport", "Connection closed by peer")


def as_rank_lost(error: BaseException) -> RankLost | None:
    """The error of a collective that another rank broke or did not come to, told as such; None for any other."""
    if isinstance(error, RankLost):
        return error
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not _of_transport(error):
        return None
    words = str(error).strip().partition("\n")[0]
    words = words.partition("] ")[2] or words  # gloo begins with a path of its source
    places = "".join(f"\n  {place}" for place in phases.others())
    return RankLost(
        f"rank {os.environ.get('RANK', '0')} was left alone in phase {phases.current()}: {words[:200]}{places}\n"
        "  see what that rank or the launcher said last; the same command goes on from the last checkpoint"
    )


def leave(code: int) -> NoReturn:
    """Ends this process with ``code``, whatever state its process group is in.

    Left to the end of Python, a group of several ranks sometimes aborts the process (gloo, about one in thirty), and a
    broken one may wait for ever.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1:
        if code not in {exits.DONE, exits.STOPPED}:
            sys.stdout.flush()
            os._exit(code)
        distributed.destroy_process_group()
    sys.exit(code)


def _of_transport(error: BaseException) -> bool:
    torch_distributed = sys.modules.get("torch.distributed")
    typed = getattr(torch_distributed, "DistError", None)
    if typed is not None and isinstance(error, typed):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _OF_TRANSPORT)

"""The hub of models and data sets: asked once whether it answers, so that a name that needs it fails in seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

PATIENCE_S = 5.0


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Inside, the hub's libraries use only what they have in their cache if the hub does not answer one request.

    Left to themselves they ask again five times with growing pauses, for every file: most of a minute until a
    mistyped name or a machine without a network is told.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode() or _answers():
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _answers() -> bool:
    """Whether the hub answers at all; what it says does not matter."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    # Names, proxies, certificates, time: its HTTP library has an error for each, and all of them mean no.
    except Exception:
        return False
    return True

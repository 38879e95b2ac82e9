"""A ZeRO-3 student is gathered once for each rollout, or once for each forward where the configuration says so.

What is counted are collectives and the elements that come out of them, not the blocks that ask for them. That both
ways have the losses of one process is in ``test_parity``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist import rollout_worker
from tests.dist.ranks import start_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has counted."""
    folder = tmp_path_factory.mktemp("gather")
    rollout_worker.write_inputs(folder)
    start_ranks("tests.dist.gather_worker", str(folder))
    return [json.loads((folder / f"gathered-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_every_weight_is_gathered_once_in_a_rollout(found: list[dict[str, Any]]) -> None:
    """However many tokens it has, scores included."""
    for rank in found:
        assert rank["rollout"]["rollout"]["elements"] == rank["rollout"]["padded"] > 0
        assert rank["rollout"]["longest"] > 3


def test_gathered_by_forward_they_are_gathered_for_every_token(found: list[dict[str, Any]]) -> None:
    """The control of the count above, and what the setting costs."""
    longest = max(rank["forward"]["longest"] for rank in found)
    for rank in found:
        assert rank["forward"]["rollout"]["elements"] > (longest - 1) * rank["forward"]["padded"]
        assert rank["forward"]["rollout"]["calls"] > 3 * rank["rollout"]["rollout"]["calls"]


def test_learning_gathers_by_forward_either_way(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["rollout"]["learning"] == rank["forward"]["learning"]
        assert rank["rollout"]["learning"]["elements"] > rank["rollout"]["padded"]


def test_ranks_gather_together(found: list[dict[str, Any]]) -> None:
    one, other = ({way: {part: told[way][part] for part in ("rollout", "learning")} for way in told} for told in found)
    assert one == other

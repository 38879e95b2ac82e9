"""The ranks of these tests are processes of their own, which fail and hang as such."""

from __future__ import annotations

import os
import time

import pytest

from tests.dist import ranks
from tests.dist.ranks import start_ranks

WORKER = "tests.dist.odd_worker"


def test_ranks_have_their_own_place_and_streams() -> None:
    first, second = (line.split() for line in start_ranks(WORKER, "say", "x y").split("\n\n"))
    assert first[:4] == ["0", "of", "2:", "x"] and second[:4] == ["1", "of", "2:", "x"]
    assert len({first[-1], second[-1], str(os.getpid())}) == 3, "processes"


@pytest.mark.parametrize(("how", "told"), [("raise", "ValueError: of rank 1"), ("exit", "[0, 7]"), ("die", "[0, -9]")])
def test_a_rank_that_fails_fails_the_test(how: str, told: str) -> None:
    with pytest.raises(AssertionError) as caught:
        start_ranks(WORKER, how)
    assert told in str(caught.value)


def test_ranks_that_hang_are_killed() -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"exit codes \[-9, -9\]"):
        start_ranks(WORKER, "hang", limit_s=1.0)
    assert time.monotonic() - began < 30
    assert "of 2" in start_ranks(WORKER, "say"), "and the next ones start"


def test_one_launch_leaves_nothing_to_the_next() -> None:
    assert start_ranks(WORKER, "mark") == start_ranks(WORKER, "mark") == "unmarked\n\nunmarked\n"


def test_the_server_is_one_for_all() -> None:
    assert ranks._server() is ranks._server()

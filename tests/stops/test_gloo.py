"""The same over torch's collectives: the agreement, and what the rank says that is left alone."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from minillm import exits, lost
from minillm.errors import RankLost
from tests.stops.gloo_worker import LATE_S
from tests.stops.jobs import Job, launched


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Both at once."""
    started = {
        how: launched(tmp_path_factory.mktemp(how), how, module="tests.stops.gloo_worker") for how in ("kill", "late")
    }
    yield started
    for job in started.values():
        job.process.kill()


@pytest.mark.parametrize("how", ["kill", "late"])
def test_the_rank_that_is_left_alone_says_so_in_a_sentence(how: str, jobs: dict[str, Job]) -> None:
    code, printed = jobs[how].end()
    assert code == exits.RANK_LOST and "Traceback" not in printed, printed
    assert printed.startswith("RankLost: rank 0 was left alone in phase learning: "), printed
    if how == "kill":
        assert re.search(r"launch: rank 1 \(pid \d+\) was killed by SIGKILL in phase learning", printed)
        for rank in range(2):  # rank 1 alone had got a signal
            assert jobs[how].await_file(f"agreed-{rank}") == ">SIGTERM"
    else:  # it lives, so that only the rank that waited knows: it names the phase in which the other one is
        place = re.search(r"\n  rank 1 \(pid \d+\): rollout, for (\d+\.\d) s\n", printed)
        assert place and LATE_S - 1 < float(place[1]) < 30


def test_other_errors_are_not_dressed_up_as_lost_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    assert lost.as_rank_lost(broken) is None, "with one rank there is nobody to lose"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert isinstance(lost.as_rank_lost(broken), RankLost)
    for error in (RuntimeError("shapes do not match"), ValueError("Connection closed by peer"), AssertionError()):
        assert lost.as_rank_lost(error) is None

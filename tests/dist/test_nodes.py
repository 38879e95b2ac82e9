"""Two hosts with two ranks each: the losses and weights of four ranks on one host, and of one process (D10).

Once with a launcher on each "host" over loopback, told by the environment where it stands, and once over a hostfile,
between two network namespaces that a virtual cable joins, where this machine lets us make them.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from minillm import distill, exits
from minillm.supervisor import LIMIT_S
from tests import tiny
from tests.dist import parity_worker
from tests.dist.ranks import start_ranks
from tests.dist.test_parity import disagreements
from tests.stops.hosts import NAMES, on_hosts
from tests.stops.jobs import Job, start

CELL = "zero2-zero3"
ALONE = "zero0-replicated"
WORKER = "tests.dist.nodes_worker"
WORK = [sys.executable, "-m", WORKER]
CABLE = "minillm0"
ADDRESSES = ("10.231.7.1", "10.231.7.2")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def by_environment(folder: Path, command: Sequence[str], *, ranks: int = 2) -> list[Job]:
    """A launcher for each of two nodes, which meet on loopback."""
    launch = [sys.executable, "-m", "minillm", "launch", "--ranks", str(ranks), *command]
    shared = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(folder / f"node-{node}", launch, {**shared, "NODE_RANK": str(node)}) for node in range(2)]


def inputs(folder: Path) -> Path:
    folder.mkdir()
    parity_worker.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process, and on four ranks of one host."""
    folder = inputs(tmp_path_factory.mktemp("nodes") / "one")
    distill(parity_worker.config(folder, ALONE).model_copy(update={"name": "alone"}))
    start_ranks(WORKER, str(folder), CELL, ranks=4)
    return folder


def held_against(place: Path, found: Path, name: str) -> None:
    """Figures of each step, and the weights that are handed on."""
    shutil.copytree(found / CELL, place / name)
    assert not disagreements(place, "alone", name)
    assert not disagreements(place, CELL, name)
    one, other = (load_file(place / run / "student" / "model.safetensors") for run in (CELL, name))
    assert max(float((weight - other[key]).abs().max()) for key, weight in one.items()) < 1e-5
    assert len(tiny.logged(place / name)) == parity_worker.STEPS


@pytest.mark.slow
def test_two_launchers_have_the_losses_of_one_host_and_of_one_process(place: Path, tmp_path: Path) -> None:
    folder = inputs(tmp_path / "two")
    jobs = by_environment(tmp_path, [*WORK, str(folder), CELL])
    ended = [job.end(240.0) for job in jobs]
    assert [code for code, _ in ended] == [exits.DONE] * 2, ended
    held_against(place, folder, "launchers")
    other = parity_worker.config(folder, ALONE).model_copy(update={"name": "other", "seed": 11})
    distill(other)
    shutil.copytree(folder / "other", place / "other")
    assert "loss" in disagreements(place, "other", "launchers"), "control: another run is told from it"


def namespaces() -> str:
    """Why there are none, or "": two of them, with a cable in between."""
    if shutil.which("ip") is None:
        return "there is no 'ip' (iproute2)"
    made = [
        *(f"ip netns add minillm-{name}" for name in NAMES),
        f"ip link add {CABLE} netns minillm-one type veth peer name {CABLE} netns minillm-two",
        *(f"ip -n minillm-{name} addr add {at}/24 dev {CABLE}" for name, at in zip(NAMES, ADDRESSES, strict=True)),
        *(f"ip -n minillm-{name} link set {device} up" for name in NAMES for device in (CABLE, "lo")),
    ]
    for command in made:
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{command}: {done.stderr.strip()}"
    return ""


@pytest.fixture
def cabled() -> Iterator[None]:
    """Two hosts ``one`` and ``two``, which have nothing but their cable."""
    why = namespaces()
    try:
        if why:
            pytest.skip(f"no network namespaces here: {why}")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", f"minillm-{name}"], capture_output=True, check=False)


def between_namespaces(folder: Path, command: Sequence[str], **environment: str) -> Job:
    return on_hosts(
        folder, slots=2, command=command, master=ADDRESSES[0], port=29500, enter='ip netns exec "minillm-$host"',
        environment={"GLOO_SOCKET_IFNAME": CABLE, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_two_namespaces_have_the_losses_of_one_host_and_of_one_process(
    place: Path, tmp_path: Path, cabled: None
) -> None:
    folder = inputs(tmp_path / "two")
    code, printed = between_namespaces(tmp_path / "job", [*WORK, str(folder), CELL]).end(240.0)
    assert code == exits.DONE, printed
    held_against(place, folder, "namespaces")


@pytest.fixture
def going(tmp_path: Path) -> list[Job]:
    """Two nodes of one rank each, in the midst of their steps."""
    jobs = by_environment(tmp_path, [*WORK, str(tmp_path)], ranks=1)
    for rank, job in enumerate(jobs):
        job.folder = tmp_path
        job.await_file(f"going-{rank}")
    return jobs


def test_a_signal_to_one_node_saves_and_stops_all(going: list[Job]) -> None:
    going[1].process.send_signal(signal.SIGTERM)
    assert [job.end()[0] for job in going] == [exits.STOPPED] * 2
    (what,) = {going[0].await_file(f"saved-{rank}") for rank in range(2)}
    assert what.endswith("SIGTERM")


def test_a_node_whose_launcher_is_killed_ends_the_other(going: list[Job]) -> None:
    going[1].process.kill()
    began = time.monotonic()
    code, printed = going[0].end()
    assert code == exits.RANK_LOST and "RankLost: rank 0 was left alone in phase learning" in printed, printed
    assert time.monotonic() - began < LIMIT_S + 10, "beside other processes"
    going[0].await_nobody()
    going[1].process.communicate()

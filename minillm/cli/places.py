"""Which nodes a launch runs on, from its options, the environment and a hostfile."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import ConfigError
from minillm.hostfile import Host, read_hostfile
from minillm.supervisor import Place

PORT = 29500
"""Where the ranks of several nodes meet, unless told otherwise. A free port of one node need not be free on another."""
_HERE = ("localhost", "::1", "127.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What was asked for, by an option or its variable; ``None``, ``""`` and 0 where it was not."""

    ranks: int = 0
    nodes: int | None = None
    node_rank: int | None = None
    master: str = ""
    port: int = 0
    hostfile: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Everywhere:
    """All hosts of a file, each to be reached from here."""

    hosts: tuple[Host, ...]
    master: str
    port: int


def placed(asked: Asked, *, ranks_here: Callable[[], int]) -> Place | Everywhere:
    """This node's ranks, or all hosts where a hostfile is given and no number of this node.

    ``ranks_here`` says how many ranks a node has unless asked. ``ConfigError`` where only some of what several nodes
    need is given, or where two things that are given contradict each other.
    """
    if asked.hostfile is not None:
        return _of_hostfile(asked, asked.hostfile)
    alone = asked.nodes == 1 or (asked.nodes is None and not asked.master) or (
        asked.nodes is None and asked.node_rank is None and _is_here(asked.master)
    )  # fmt: skip
    if alone and not asked.node_rank:
        return Place(ranks=asked.ranks or ranks_here(), port=asked.port or _free_port())
    given = {
        "--nodes (NNODES)": asked.nodes is not None,
        "--node-rank (NODE_RANK)": asked.node_rank is not None,
        "--master (MASTER_ADDR)": bool(asked.master),
    }
    if missing := [name for name, there in given.items() if not there]:
        there = ", ".join(name for name in given if name not in missing)
        raise ConfigError(
            f"{there} without {' and '.join(missing)}\n  several nodes want all three, by option or by variable, and "
            "one launcher on each; for one node leave them all out"
        )
    assert asked.nodes is not None and asked.node_rank is not None
    _require_node(asked.node_rank, asked.nodes)
    return Place(
        ranks=asked.ranks or ranks_here(),
        nodes=asked.nodes,
        node=asked.node_rank,
        master=asked.master,
        port=asked.port or PORT,
    )


def _of_hostfile(asked: Asked, file: Path) -> Place | Everywhere:
    hosts = read_hostfile(file)
    if asked.ranks and asked.ranks != hosts[0].slots:
        raise ConfigError(
            f"{asked.ranks} ranks a node beside a hostfile with slots={hosts[0].slots}\n"
            "  the slots say how many ranks a host has: leave --ranks (RANKS) out, or change the file"
        )
    if asked.nodes is not None and asked.nodes != len(hosts):
        raise ConfigError(
            f"--nodes (NNODES) {asked.nodes} beside {file}, which names {len(hosts)}\n  leave it out: the file says it"
        )
    master = asked.master or hosts[0].address
    if len(hosts) > 1 and not asked.master and _is_here(master):
        raise ConfigError(
            f"{file}: its first host is {master}, which means another machine on each of the others\n"
            "  give it a name that all hosts know, or name it so with --master (MASTER_ADDR)"
        )
    port = asked.port or PORT
    if asked.node_rank is None:
        return Everywhere(hosts=hosts, master=master, port=port)
    _require_node(asked.node_rank, len(hosts))
    return Place(ranks=hosts[0].slots, nodes=len(hosts), node=asked.node_rank, master=master, port=port)


def _require_node(node: int, nodes: int) -> None:
    if node >= nodes:
        raise ConfigError(f"--node-rank (NODE_RANK) {node} of {nodes} nodes\n  wanted 0 to {nodes - 1}")


def _is_here(name: str) -> bool:
    return name.startswith(_HERE)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""The command that starts the others on several ranks."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

import typer

from minillm.errors import ConfigError, did_you_mean
from minillm.supervisor import LIMIT_S, Place, Supervisor

RANKS_ON_CPU = 2
"""Ranks on a machine without a GPU, unless told otherwise."""


def launch(  # noqa: PLR0917 (typer reads options from parameters)
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND…", help="A minillm command, a .py file or a program, and its words.")
    ],
    ranks: Annotated[
        int, typer.Option("--ranks", min=0, help="Ranks on this node; 0: one a GPU, or two without a GPU.")
    ] = 0,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Nodes; each runs this command once.")] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", min=0, help="Which of them this is, from 0.")] = 0,
    master: Annotated[str, typer.Option("--master", help="Host name of node 0, where there are several.")] = "",
    master_port: Annotated[
        int, typer.Option("--master-port", min=0, max=65535, help="Port where ranks meet; 0: one that is free.")
    ] = 0,
    limit: Annotated[
        float, typer.Option("--limit", min=1, help="Seconds in which a dead or stuck rank ends all ranks.")
    ] = LIMIT_S,
) -> None:
    """Run a command on several ranks, one for each GPU.

    SIGTERM and SIGINT are handed on to every rank: a training run saves at its next step on all ranks and ends with
    exit code 75. A rank that dies or hangs ends all of them within --limit seconds and is named (exit code 5, or the
    rank's own). Options of launch stand before COMMAND.

    \b
    Examples:
      minillm launch --ranks 2 distill \\
        --config recipes/quickstart/minillm.yaml
      srun --ntasks-per-node 1 --kill-on-bad-exit bash -c 'minillm launch \\
        --nodes $SLURM_NNODES --node-rank $SLURM_NODEID --master $HEAD \\
        --master-port 29500 distill --config my-run.yaml'
    """
    own = getattr(context.find_root().command, "commands", {})
    options = [name for each in context.command.params for name in each.opts]
    _require_ours_before(command, own=own, options=options)
    if nodes > 1 and not (master and master_port):
        raise ConfigError(f"--nodes {nodes} without --master and --master-port: wanted both, the same on every node")
    if node_rank >= nodes:
        raise ConfigError(f"--node-rank {node_rank} of --nodes {nodes}: wanted 0 to {nodes - 1}")
    place = Place(
        ranks=ranks or _gpus() or RANKS_ON_CPU,
        nodes=nodes,
        node=node_rank,
        master=master or "127.0.0.1",
        port=master_port or _free_port(),
    )
    words = _words(command, own=own, options=options)
    # As torchrun does it: ranks that each take every core stand in each other's way.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    # Not typer.Exit: the ranks have said all that there is to say about their exit code.
    sys.exit(Supervisor(words, place, limit_s=limit, environment=environment).run())


def _require_ours_before(command: Sequence[str], *, own: Mapping[str, Any], options: Sequence[str]) -> None:
    """``ConfigError`` where an option of launch stands behind one of minillm's commands, which has none of that name,
    and where the command is launch itself."""
    name = command[0]
    if name not in own:
        return
    if name == "launch":
        raise ConfigError("minillm launch launch: each rank would start ranks of its own\n  name launch once")
    of_command = {option for each in own[name].params for option in each.opts}
    for place, word in enumerate(command):
        option = word.partition("=")[0]
        if option.startswith("--") and option in options and option not in of_command:
            with_it = command[place : place + 1 + ("=" not in word)]
            rest = [*command[:place], *command[place + len(with_it) :]]
            raise ConfigError(
                f"{option} stands behind the command {name}, which has no such option\n"
                f"  options of launch stand before it: minillm launch {shlex.join([*with_it, *rest])}"
            )


def _words(command: Sequence[str], *, own: Collection[str], options: Collection[str]) -> list[str]:
    if command[0] in own:
        return [sys.executable, "-u", "-m", "minillm", *command]
    if command[0].endswith(".py"):
        return [sys.executable, "-u", *command]
    if "/" not in command[0] and shutil.which(command[0]) is None:
        what = "option of launch" if command[0].startswith("-") else "command of minillm, no .py file and no program"
        known = options if command[0].startswith("-") else own
        raise ConfigError(f"{command[0]}: no {what} of this name{did_you_mean(command[0], known)}")
    return list(command)


def _gpus() -> int:
    """GPUs that torch sees; asked in a process of its own, since the supervisor stays small."""
    code = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

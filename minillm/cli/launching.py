"""The command that starts the others on several ranks."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from minillm import exits
from minillm.cli.places import PORT, Asked, Everywhere, placed
from minillm.errors import ConfigError, did_you_mean
from minillm.hosts import SSH, HostLaunch, Hosts, host_launches, passed_on
from minillm.supervisor import LIMIT_S, Supervisor

RANKS_ON_CPU = 2
"""Ranks on a machine without a GPU, unless told otherwise."""


def launch(  # noqa: PLR0917 (typer reads options from parameters)
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND…", help="A minillm command, a .py file or a program, and its words.")
    ],
    ranks: Annotated[
        int, typer.Option("--ranks", min=0, help="Ranks on a node; 0: one a GPU, or two without a GPU.")
    ] = 0,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", help="Start on all hosts of this file, a line 'HOST slots=RANKS' each, over ssh."),
    ] = None,
    ssh: Annotated[str, typer.Option("--ssh", metavar="COMMAND", help="What leads to a host, with its options.")] = SSH,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="A variable that hosts get, too, seen by all on them; repeatable."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, envvar="NNODES", help="Nodes; each runs this command once.")
    ] = None,
    node_rank: Annotated[
        int | None, typer.Option("--node-rank", min=0, envvar="NODE_RANK", help="Which of them this is, from 0.")
    ] = None,
    master: Annotated[
        str, typer.Option("--master", envvar="MASTER_ADDR", help="Host name of node 0, where there are several.")
    ] = "",
    master_port: Annotated[
        int,
        typer.Option(
            "--master-port", min=0, max=65535, envvar="MASTER_PORT",
            help=f"Port where ranks meet; 0: one that is free, or {PORT} for several nodes.",
        ),
    ] = 0,
    limit: Annotated[
        float, typer.Option("--limit", min=1, help="Seconds in which a dead or stuck rank ends all ranks.")
    ] = LIMIT_S,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and the resolved configuration; start nothing.")
    ] = False,
    leash: Annotated[
        bool, typer.Option("--leash", help="End with standard input: what --hostfile gives the launcher of a host.")
    ] = False,
) -> None:  # fmt: skip
    """Run a command on several ranks, one for each GPU.

    SIGTERM and SIGINT are handed on to every rank: a training run saves at its next step on all ranks and ends with
    exit code 75. A rank that dies or hangs ends all of them within --limit seconds and is named (exit code 5, or the
    rank's own). Options of launch stand before COMMAND.

    Several nodes: one launch over --hostfile, or a launcher on each node, with NODE_RANK, NNODES and MASTER_ADDR.

    \b
    Examples:
      minillm launch --ranks 2 distill \\
        --config recipes/quickstart/minillm.yaml
      minillm launch --hostfile hosts distill --config my-run.yaml
      NODE_RANK=0 NNODES=2 MASTER_ADDR=gpu-1 minillm launch distill \\
        --config my-run.yaml
    """
    own = getattr(context.find_root().command, "commands", {})
    options = [name for each in context.command.params for name in each.opts]
    _require_ours_before(command, own=own, options=options)
    words = _words(command, own=own, options=options)
    asked = Asked(
        ranks=ranks, nodes=nodes, node_rank=node_rank, master=master, port=master_port, hostfile=hostfile
    )  # fmt: skip
    place = placed(asked, ranks_here=lambda: _gpus() or RANKS_ON_CPU)
    # As torchrun does it: ranks that each take every core stand in each other's way.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if isinstance(place, Everywhere):
        launches = _to_hosts(place, command, ssh=ssh, limit_s=limit, environment=environment, also=env or [])
        if dry_run:
            sys.exit(_show([each.words for each in launches], command, own=own))
        sys.exit(Hosts(launches, limit_s=limit).run())
    if dry_run:
        ranks_here = [place.environment(local) for local in range(place.ranks)]
        sys.exit(_show([_with(each, words) for each in ranks_here], command, own=own))
    if leash:  # the first word to the launcher of all hosts, which knows by it that this one was reached
        print(f"launch: node {place.node} of {place.nodes}, on {socket.gethostname()}: {place.ranks} ranks", flush=True)
    # Not typer.Exit: the ranks have said all that there is to say about their exit code.
    supervisor = Supervisor(words, place, limit_s=limit, environment=environment, leash=0 if leash else None)
    sys.exit(supervisor.run())


def _to_hosts(
    place: Everywhere, command: Sequence[str], *,
    ssh: str, limit_s: float, environment: Mapping[str, str], also: Sequence[str],
) -> list[HostLaunch]:  # fmt: skip
    program = (shlex.split(ssh) or [""])[0]
    if shutil.which(program) is None:
        raise ConfigError(f"--ssh {ssh!r}: no program {program!r} here\n  install it, or name another one")
    if unset := [name for name in also if name not in environment]:
        raise ConfigError(f"--env {unset[0]}: not set here\n  export it first, or leave the option out")
    return host_launches(
        place.hosts, command, ssh=ssh, master=place.master, port=place.port, limit_s=limit_s,
        environment=passed_on(environment, also),
    )  # fmt: skip


def _with(settings: Mapping[str, str], words: Sequence[str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in settings.items()), *words]


def _show(commands: Sequence[Sequence[str]], command: Sequence[str], *, own: Mapping[str, Any]) -> int:
    """Prints what would be started and, where the command can tell, what it would do; the exit code."""
    print("# would start", *map(shlex.join, commands), sep="\n", flush=True)
    name, *rest = command
    if name not in own or "--dry-run" not in {option for each in own[name].params for option in each.opts}:
        print(f"# {name} has no --dry-run: what it would do was not looked at")
        return exits.DONE
    print("# on each rank", flush=True)
    return subprocess.run([sys.executable, "-m", "minillm", name, "--dry-run", *rest], check=False).returncode


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

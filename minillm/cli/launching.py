"""The command that starts the others on several ranks."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import typer

from minillm import exits
from minillm.cli import launch_options as options
from minillm.cli.places import Asked, Everywhere, placed
from minillm.errors import ConfigError, did_you_mean
from minillm.hosts import SSH, Hosts, host_launches, passed_in_words, passed_on
from minillm.supervisor import LIMIT_S, Supervisor, say

RANKS_ON_CPU = 2
"""Ranks on a machine without a GPU, unless told otherwise."""
_COUNT = "import torch; print(torch.cuda.device_count())"


def launch(  # noqa: PLR0917 (typer reads options from parameters)
    context: typer.Context,
    command: options.Command,
    ranks: options.RanksOnNode = 0,
    hostfile: options.Hostfile = None,
    ssh: options.Ssh = SSH,
    env: options.Env = None,
    nodes: options.Nodes = None,
    node_rank: options.NodeRank = None,
    master: options.Master = "",
    master_port: options.MasterPort = 0,
    limit: options.Limit = LIMIT_S,
    dry_run: options.DryRun = False,
    leash: options.OnLeash = False,
) -> None:
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
    known = [name for each in context.command.params for name in each.opts]
    _require_ours_before(command, own=own, options=known)
    words = _words(command, own=own, options=known)
    asked = Asked(
        ranks=ranks, nodes=nodes, node_rank=node_rank, master=master, port=master_port, hostfile=hostfile
    )  # fmt: skip
    place = placed(asked, ranks_here=lambda: _gpus() or RANKS_ON_CPU)
    # As torchrun does it: ranks that each take every core stand in each other's way.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    show = partial(_show, command, own=own) if dry_run else None
    # Not typer.Exit: the ranks have said all that there is to say about their exit code.
    if isinstance(place, Everywhere):
        sys.exit(_on_hosts(place, command, ssh=ssh, limit_s=limit, environment=environment, also=env or [], show=show))
    if show is not None:
        sys.exit(show([_with(place.environment(local), words) for local in range(place.ranks)]))
    if leash:  # the first word to the launcher of all hosts, which knows by it that this one was reached
        print(f"launch: node {place.node} of {place.nodes}, on {socket.gethostname()}: {place.ranks} ranks", flush=True)
    sys.exit(Supervisor(words, place, limit_s=limit, environment=environment, leash=0 if leash else None).run())


def _on_hosts(
    place: Everywhere, command: Sequence[str], *, ssh: str, limit_s: float, environment: Mapping[str, str],
    also: Sequence[str], show: Callable[[Sequence[Sequence[str]]], int] | None,
) -> int:  # fmt: skip
    """Runs the launchers of all hosts, or only shows what would start them; the exit code."""
    program = (shlex.split(ssh) or [""])[0]
    if shutil.which(program) is None:
        raise ConfigError(f"--ssh {ssh!r}: no program {program!r} here\n  install it, or name another one")
    if unset := [name for name in also if name not in environment]:
        raise ConfigError(f"--env {unset[0]}: not set here\n  export it first, or leave the option out")
    passed = passed_on(environment, also)
    launches = host_launches(
        place.hosts, command, ssh=ssh, master=place.master, port=place.port, limit_s=limit_s, environment=passed
    )
    told = passed_in_words(environment, passed)
    if show is not None:
        print(f"# {told}")
        return show([each.words for each in launches])
    say(told)
    return Hosts(launches, limit_s=limit_s).run()


def _with(settings: Mapping[str, str], words: Sequence[str]) -> list[str]:
    return ["env", *(f"{name}={value}" for name, value in settings.items()), *words]


def _show(command: Sequence[str], commands: Sequence[Sequence[str]], *, own: Mapping[str, Any]) -> int:
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
    """GPUs that torch sees, asked in a process of its own, since the supervisor stays small. ``ConfigError`` where it
    cannot say."""
    asked = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    if asked.returncode or not asked.stdout.strip().isdigit():
        last = ([line for line in asked.stderr.splitlines() if line.strip()] or [f"exit code {asked.returncode}"])[-1]
        raise ConfigError(
            f"torch cannot say how many GPUs are here: {last.strip()}\n"
            "  mend the installation of torch (python -c 'import torch'), or name the number: --ranks N (RANKS)"
        )
    return int(asked.stdout)

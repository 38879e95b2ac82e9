"""What ``minillm launch`` may be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minillm.cli.places import PORT

Command = Annotated[
    list[str], typer.Argument(metavar="COMMAND…", help="A minillm command, a .py file or a program, and its words.")
]
RanksOnNode = Annotated[
    int, typer.Option("--ranks", min=0, help="Ranks on a node; 0: one a GPU, or two without a GPU.")
]
Hostfile = Annotated[
    Path | None,
    typer.Option("--hostfile", help="Start on all hosts of this file, a line 'HOST slots=RANKS' each, over ssh."),
]
Ssh = Annotated[str, typer.Option("--ssh", metavar="COMMAND", help="What leads to a host, with its options.")]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME", help="A variable that hosts get, too, seen by all on them; repeatable."),
]
Nodes = Annotated[
    int | None, typer.Option("--nodes", min=1, envvar="NNODES", help="Nodes; each runs this command once.")
]
NodeRank = Annotated[
    int | None, typer.Option("--node-rank", min=0, envvar="NODE_RANK", help="Which of them this is, from 0.")
]
Master = Annotated[
    str, typer.Option("--master", envvar="MASTER_ADDR", help="Host name of node 0, where there are several.")
]
MasterPort = Annotated[
    int,
    typer.Option(
        "--master-port", min=0, max=65535, envvar="MASTER_PORT",
        help=f"Port where ranks meet; 0: one that is free, or {PORT} for several nodes.",
    ),
]  # fmt: skip
Limit = Annotated[float, typer.Option("--limit", min=1, help="Seconds in which a dead or stuck rank ends all ranks.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the commands and the resolved configuration; start nothing.")
]
OnLeash = Annotated[
    bool, typer.Option("--leash", help="End with standard input: what --hostfile gives the launcher of a host.")
]

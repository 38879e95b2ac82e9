"""The command over runs that are there: list them, read their checkpoints, remove what nobody will read again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minillm import exits
from minillm.errors import ConfigError

if TYPE_CHECKING:
    from minillm.run_listing import RunInfo

ACTIONS = ("verify", "clean")
COLUMNS = ("run", "state", "at", "best", "kept", "disk")


def runs(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[verify|clean] [DIR]", help="What to do, and the folder; runs.")
    ] = None,
    keep: Annotated[int, typer.Option("--keep", min=2, help="With clean: whole checkpoints of a run that stay.")] = 2,
    json_file: Annotated[bool, typer.Option("--json", help="Print one JSON object a run instead of a table.")] = False,
) -> None:
    """List runs in a folder, check or remove their checkpoints.

    Of each run: its state (running, stopped, failed, broken off, done), last step, best validation, checkpoints that
    are whole, disk used. 'verify' names what is broken and ends with code 1 where anything is. 'clean' removes the
    checkpoints of runs that are done, and of others all but the newest; a run that somebody works in is left alone.

    \b
    Examples:
      minillm runs
      minillm runs verify runs/quickstart
      minillm runs clean runs --keep 2
    """
    action, folder = _asked(words or [])
    from minillm import run_listing

    found = run_listing.find_runs(folder)
    if action == "clean":
        _clean(found, root=folder, keep=keep)
        return
    infos = [run_listing.describe(path, root=folder, reading=_tell_reading) for path in found]
    if json_file:
        for info in infos:
            print(json.dumps(_record(info)))
    elif not infos:
        print(f"{folder}: no runs")
    elif action == "verify":
        _print_faults(infos)
    else:
        _print_table(infos, folder)
    if action == "verify" and any(kept.fault for info in infos for kept in info.checkpoints):
        raise typer.Exit(exits.CHECK_FAILED)


def _tell_reading(folder: Path, count: int) -> None:
    """On the other stream: the table or the JSON is for whoever reads on."""
    print(f"reading {size(count)} of checkpoints in {folder} …", file=sys.stderr, flush=True)


def _asked(words: list[str]) -> tuple[str, Path]:
    action = words[0] if words and words[0] in ACTIONS else ""
    rest = words[bool(action) :]
    if len(rest) > 1:
        raise ConfigError(f"got {' '.join(words)!r}, wanted one folder, after 'verify' or 'clean' or alone")
    return action, Path(rest[0]) if rest else Path("runs")


def _clean(found: list[Path], *, root: Path, keep: int) -> None:
    from minillm.errors import MinillmError
    from minillm.run_listing import clean

    freed = 0
    for path in found:
        try:
            here = clean(path, keep=keep, say=print)
        except MinillmError as error:  # somebody works there, or it is broken: the others are cleaned nevertheless
            print(f"left alone: {str(error).splitlines()[0]}")
            continue
        freed += here
        if here:
            print(f"{path}: {size(here)} freed")
    print(f"{root}: {_counted(len(found), 'run')}, {size(freed)} freed")


def _print_faults(infos: list[RunInfo]) -> None:
    for info in infos:
        for kept in info.checkpoints:
            print(f"{'broken' if kept.fault else 'whole '}  {kept.fault or kept.path}")
    every = [kept for info in infos for kept in info.checkpoints]
    broken = sum(bool(kept.fault) for kept in every)
    print(f"{_counted(len(infos), 'run')}, {_counted(len(every), 'checkpoint')}, {broken:,} broken")


def _print_table(infos: list[RunInfo], folder: Path) -> None:
    from minillm.terminal import print_table

    rows = [
        (
            info.name,
            info.state,
            info.at,
            next((f"{name} {value:.3g}" for name, value in info.best.items()), "–"),
            f"{sum(not kept.fault for kept in info.checkpoints)}/{len(info.checkpoints)}" if info.checkpoints else "–",
            size(info.bytes),
        )
        for info in infos
    ]
    print_table(f"Runs in {folder}; kept: whole checkpoints of all", COLUMNS, rows)
    for info in infos:
        if info.owner:
            print(f"{info.name}: {info.owner} works in it")
        if info.reason:
            print(f"{info.name}: {info.reason}")
    if any(info.state in {"stopped", "broken off", "failed"} for info in infos):
        print("a run that did not end goes on by the command that began it")


def _record(info: RunInfo) -> dict[str, Any]:
    return {
        "run": str(info.path), "state": info.state, "owner": info.owner, "at": info.at, "best": dict(info.best),
        "checkpoints": [{"path": str(kept.path), "fault": kept.fault} for kept in info.checkpoints],
        "bytes": info.bytes, "reason": info.reason,
    }  # fmt: skip


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Bytes for people: three digits and a binary unit."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"

"""``python -m tests.campaign soak|faults …``: what ``scripts/soak.sh`` and ``scripts/faults.sh`` run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

PARTS = ("points", "kills", "again")
"""Of the campaign of faults, in the order in which they run."""


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0")
    return number


def whole_number(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number from 0")
    return int(text)


def folder_of(text: str) -> Path:
    """A folder, or a place for one."""
    path = Path(text).absolute()
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file, wanted a folder or a place for one")
    return path


def parser() -> argparse.ArgumentParser:
    """Of both commands."""
    top = argparse.ArgumentParser(prog="campaign", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True)
    soak = commands.add_parser(
        "soak", prog="scripts/soak.sh", allow_abbrev=False,
        description="Runs of the embedded world that are killed, stopped, damaged and started again until the time is "
        "over; each must end with the bits of the unbroken run. The same command goes on after it was killed itself.",
    )  # fmt: skip
    soak.add_argument("--minutes", type=positive, default=120.0, help="time for all, the last round excepted (120)")
    soak.add_argument("--seed", type=whole_number, default=1, help="of what is done, and when (1)")
    soak.add_argument("--folder", type=folder_of, default=folder_of("runs/soak"), help="for all files (runs/soak)")
    faults = commands.add_parser(
        "faults", prog="scripts/faults.sh", allow_abbrev=False,
        description="Kills a small run once at each of its fault points, real two-rank runs at random moments, and "
        "runs over and over at random points; each must end with the bits of the unbroken run. The same command goes "
        "on after it was killed itself.",
    )  # fmt: skip
    faults.add_argument(
        "--part", choices=PARTS, action="append", help="only this one; may be given several times (all)"
    )
    much = faults.add_mutually_exclusive_group()
    much.add_argument("--all", action="store_true", help="every fault point, not a sample spread over them")
    much.add_argument("--quick", action="store_true", help="a short sample of all parts")
    faults.add_argument("--seed", type=whole_number, default=1, help="of moments and points that are drawn (1)")
    faults.add_argument(
        "--folder", type=folder_of, default=folder_of("runs/faults"), help="for all files (runs/faults)"
    )
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 if all went as it should, 1 if not, 2 for a mistake in the words."""
    given = parser().parse_args(words)
    if given.command == "soak":
        from tests.campaign.soak import Soak, summary

        soak = Soak(given.folder, minutes=given.minutes, seed=given.seed)
        fine = soak.run()
        print(summary(soak.journal))
        return 0 if fine else 1
    from tests.campaign.faults import FULL, QUICK, Faults

    extent = QUICK if given.quick else dataclasses.replace(FULL, points=None) if given.all else FULL
    return 0 if Faults(given.folder, extent=extent, seed=given.seed).run(given.part or PARTS) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Commands on what the library brings along, its world and the proofs of what it says of itself; and a small tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minillm import exits
from minillm.cli import options
from minillm.errors import DataError


def world(
    out: Annotated[Path, typer.Option("--out", help="Folder for train.jsonl, validation.jsonl and test.jsonl.")],
    fresh: options.Fresh = False,
) -> None:
    """Write the embedded micro-world as JSON Lines files.

    They are there to read, and as an example of the format of prompts.

    \b
    Example:
      minillm world --out world
    """
    from minillm.store import make_folder, write_jsonl
    from minillm.world import rows

    splits = ("train", "validation", "test")
    standing = [out / f"{split}.jsonl" for split in splits if (out / f"{split}.jsonl").exists()]
    if standing and not fresh:
        raise DataError(f"{standing[0]} exists already; give another --out, or --fresh to replace it")
    make_folder(out, setting="--out")
    for split in splits:
        records = rows(split)
        write_jsonl(out / f"{split}.jsonl", records)
        print(f"{out / f'{split}.jsonl'}: {len(records):,} rows")


def merge_adapter(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that the adapter was trained on.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter: peft's LoRA, or a bottleneck.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the merged model; it must be new or empty.")],
) -> None:
    """Write a model with an adapter merged into it.

    For a teacher that is to be sharded, or any program that knows no adapters. BASE is a card, a folder or a hub name.

    \b
    Example:
      minillm merge-adapter gpt2 runs/mine/student/adapter --out merged
    """
    from minillm import merging
    from minillm.rows import counted

    layers = merging.merge_adapter(base, adapter, out)
    print(f"{out}: {base} with {adapter} merged into {counted(layers, 'layer')}")


def _usable(file: Path | None) -> Path | None:
    if file is not None:
        from minillm.selftest.record import require_usable

        require_usable(file)  # before any check runs
    return file


def selftest(
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=_usable, help="Also write what was found into this file.")
    ] = None,
) -> None:
    """Prove on this machine that the library does what it says.

    Gradients by enumeration, golden numbers, sampling, models against plain forwards, DeepSpeed's steps against plain
    torch. Takes less than a minute on one core, needs no network and no tests/ folder. Exit code 0 when every check
    passes, 1 when one fails.

    \b
    Example:
      minillm selftest --json selftest.json
    """
    from minillm.selftest.run import selftest as run_checks

    if not run_checks(json_file):
        raise typer.Exit(exits.CHECK_FAILED)

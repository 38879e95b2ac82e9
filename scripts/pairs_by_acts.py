"""Preference pairs over dialogue acts, cut into files by how many acts a reply has to say: chunks for sDPO.

    minillm pairs --config recipes/sgd_nlg/minillm.yaml --out runs/sgd_nlg/pairs.jsonl
    python scripts/pairs_by_acts.py runs/sgd_nlg/pairs.jsonl --out data/sgd_nlg/pairs

Out come one.jsonl, two.jsonl and more.jsonl (three acts and more), each with its pairs in their order, all fields kept.
A prompt that holds no dialogue acts ends the script before anything is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minillm.errors import DataError, MinillmError
from minillm.rows import counted
from minillm.slots import acts_in
from minillm.store import write_jsonl

FILES = ("one", "two", "more")


def parted(source: Path) -> dict[str, list[dict[str, Any]]]:
    """The pairs of a file by the name of the file that they go to."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in FILES}
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            acts = len(acts_in(row["prompt"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{source}:{number}: wanted a pair with a text under 'prompt'") from error
        if not acts:
            raise DataError(f"{source}:{number}: no dialogue acts in the prompt {row['prompt']!r}")
        parts[FILES[min(acts, len(FILES)) - 1]].append(row)
    return parts


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pairs", type=Path, help="what 'minillm pairs' made of prompts with dialogue acts")
    parser.add_argument("--out", required=True, type=Path, help="folder for the files")
    asked = parser.parse_args(arguments)
    try:
        parts = parted(asked.pairs)
        asked.out.mkdir(parents=True, exist_ok=True)
        for name, rows in parts.items():
            write_jsonl(asked.out / f"{name}.jsonl", rows)
            print(f"{asked.out / name}.jsonl: {counted(len(rows), 'pair')}")
    except MinillmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, UnicodeDecodeError) as error:
        print(f"{asked.pairs}: {error}\n  name another file or folder", file=sys.stderr)
        return MinillmError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Preference pairs whose two answers differ in tone, from the public files of 'Build a Large Language Model (From
Scratch)': what a run needs to learn from them, and a tokenizer for models from scratch.

    python scripts/polite_pairs.py instruction-data-with-preference.json --out data/polite

Reads ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json of rasbt/LLMs-from-scratch (Apache-2.0),
as it is (a JSON list) or as JSON Lines: 1,100 rows of {instruction, input, output, chosen, rejected}, one answer
polite and one not.

Out come train.jsonl, validation.jsonl and test.jsonl (pairs) and sft.jsonl (the training prompts, each with both of
its answers: a start that knows either tone, so that it is the pairs that tell them apart). Which part a prompt belongs
to is a function of its text, and no prompt is in two of them. The folder ``tokenizer`` has byte pairs of sft.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from minillm.byte_pieces import write_byte_pieces
from minillm.errors import DataError, MinillmError
from minillm.rows import counted
from minillm.store import write_jsonl

PARTS = {"test": 250, "validation": 100}
"""Prompts that are held out; all others are trained on."""
PIECES = 1024
SIDES = ("chosen", "rejected")


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON list or of JSON Lines, packed or not."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", encoding="utf-8") as stream:
            text = stream.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}\n  fetch the public file again") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: wanted a list of records with instruction, chosen and rejected")
    return list(rows)


def pairs(rows: list[dict[str, Any]], counts: Counter[str]) -> list[dict[str, Any]]:
    """Those of the rows that have two different answers, each prompt once; ``counts`` hears of the others."""
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        texts = [row.get(name) for name in ("instruction", *SIDES)]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise DataError(f"row {number}: wanted texts under instruction, chosen and rejected")
        prompt = "\n".join(filter(None, (row["instruction"].strip(), str(row.get("input") or "").strip()))) + "\n"
        chosen, rejected = (row[side].strip() for side in SIDES)
        if chosen == rejected:
            counts["dropped, both answers are the same"] += 1
        elif prompt in found:
            counts["dropped, the prompt was met before"] += 1
        else:
            found[prompt] = {"id": f"polite-{number}", "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return list(found.values())


def parted(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The pairs by part, in their order."""
    if len(found) <= sum(PARTS.values()):
        raise DataError(f"{counted(len(found), 'pair')} are left; wanted more than the {sum(PARTS.values())} held out")
    order = sorted(found, key=lambda row: hashlib.sha256(f"polite\0{row['prompt']}".encode()).hexdigest())
    part: dict[str, str] = {}
    first = 0
    for name, size in PARTS.items():
        part |= {row["id"]: name for row in order[first : first + size]}
        first += size
    return {
        name: [row for row in found if part.get(row["id"], "train") == name] for name in ("train", "validation", "test")
    }


def write(parts: dict[str, list[dict[str, Any]]], out: Path) -> int:
    """The files and the tokenizer; its ids."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        write_jsonl(out / f"{name}.jsonl", rows)
    told = [
        {"id": f"{row['id']}-{side}", "prompt": row["prompt"], "response": row[side]}
        for row in parts["train"] for side in SIDES
    ]  # fmt: skip
    write_jsonl(out / "sft.jsonl", told)
    texts = (text for row in told for text in (row["prompt"], row["response"]))
    return write_byte_pieces(texts, out / "tokenizer", pieces=PIECES)


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path, help="instruction-data-with-preference.json, or its rows as .jsonl(.gz)")
    parser.add_argument("--out", required=True, type=Path, help="folder for the files and the tokenizer")
    asked = parser.parse_args(arguments)
    counts: Counter[str] = Counter()
    try:
        rows = read(asked.source)
        parts = parted(pairs(rows, counts))
        ids = write(parts, asked.out)
    except MinillmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename}: {error.strerror}\n  name another folder or file", file=sys.stderr)
        return MinillmError.exit_code
    print(f"{asked.source}: {counted(len(rows), 'row')} read")
    for sentence, count in sorted(counts.items()):
        print(f"{sentence}: {count:,}")
    for name, of in parts.items():
        print(f"{asked.out / name}.jsonl: {counted(len(of), 'pair')}")
    print(f"{asked.out / 'tokenizer'}: {ids:,} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())

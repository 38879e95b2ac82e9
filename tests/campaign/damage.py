"""What a disk, or a hand, does to a run while nobody works in it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.campaign.lives import whole_checkpoints

OF_A_CHECKPOINT = ("flip", "truncate", "empty", "delete", "extra")
"""What makes a checkpoint useless."""
BESIDE = ("staging", "removed", "torn log")
"""What changes nothing: folders of saves and removals that broke off, half a line after the log's end."""


def damaged(folder: Path, kind: str, draw: random.Random) -> str:
    """Damages the newest checkpoint of a run, or what stands beside it; what was hit. The one before stays whole."""
    newest = folder / "checkpoints" / whole_checkpoints(folder)[0]
    if kind in OF_A_CHECKPOINT:
        file = draw.choice(sorted(path for path in newest.iterdir() if path.stat().st_size))
        return f"{newest.name}/{_hit(file, kind, draw)}"
    if kind == "torn log":
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write('{"kind": "train", "stage": "sft", "st')
        return "metrics.jsonl"
    begins = {"staging": ".staging-", "removed": ".removed-"}[kind]
    left = newest.with_name(f"{begins}{newest.name}-{draw.getrandbits(32):08x}")
    shutil.copytree(newest, left)
    _hit(draw.choice(sorted(left.iterdir())), "delete", draw)
    return left.name


def _hit(file: Path, kind: str, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    if kind == "flip":
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        return f"{file.name} bit {bit}"
    if kind in {"truncate", "empty"}:
        length = draw.randrange(1, len(content)) if kind == "truncate" and len(content) > 1 else 0
        file.write_bytes(content[:length])
        return f"{file.name} to {length} of {len(content)} bytes"
    if kind == "delete":
        file.unlink()
        return file.name
    assert kind == "extra", kind
    (file.parent / "more.safetensors").write_bytes(bytes(content))
    return "more.safetensors"

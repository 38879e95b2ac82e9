"""See merge_memory.sh."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig

from minillm.disk import DISK, Sink
from minillm.merge_sources import WEIGHTS, pieces
from minillm.meta_models import meta_model
from minillm.tensor_files import Kind, write_pieces
from minillm.world import build_tokenizer

LIMIT = 3 * 10**9
"""Bytes that the merge must stay below."""
MODELS, DTYPE = 2, torch.float16
CONFIG: dict[str, Any] = {
    "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192,
    "word_embed_proj_dim": 2048, "vocab_size": 50272, "max_position_embeddings": 2048,
}  # fmt: skip
FIELDS = ("RssAnon", "RssFile", "VmRSS", "VmHWM")
EVERY_S = 0.02


def numbers(words: str, count: int, spread: float) -> Tensor:
    """Random numbers that are a function of words."""
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big"))
    return torch.randn(count, generator=draw) * spread


def write_model(folder: Path, kinds: dict[str, Kind], *, number: int) -> None:
    """A random start (number 0), or what a little random training made of it; a piece at a time."""
    folder.mkdir(parents=True)

    def made(name: str) -> Iterator[Tensor]:
        shape = kinds[name][1]
        for begin, end in pieces(shape):
            count = (end - begin) * (shape[1] if len(shape) > 1 else 1)
            piece = numbers(f"start/{name}/{begin}", count, 0.02)
            if number:
                piece += numbers(f"{number}/{name}/{begin}", count, 0.002)
            yield piece.to(DTYPE)

    file = DISK.create(folder / WEIGHTS)
    write_pieces(Sink(DISK, file), kinds, made)
    DISK.close(file)
    OPTConfig(**CONFIG, dtype=DTYPE, architectures=["OPTForCausalLM"]).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def watched(command: list[str]) -> tuple[int, dict[str, int]]:
    """A process's exit code, and the most of each of ``FIELDS`` in bytes while it ran. ``VmHWM`` is the kernel's own
    highest point of all that is resident, mapped files included; the others are looked at every ``EVERY_S``."""
    most = dict.fromkeys(FIELDS, 0)
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            break
        for line in lines:
            name, _, value = line.partition(":")
            if name in most:
                most[name] = max(most[name], int(value.split()[0]) * 1024)
        time.sleep(EVERY_S)
    return process.wait(), most


def main() -> int:
    """Exit code."""
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/merge_memory")
    if root.exists():
        print(f"{root} is there already; name another folder", file=sys.stderr)
        return 2
    names = ["start", *(f"model-{number}" for number in range(1, MODELS + 1))]
    model = meta_model(OPTConfig(**CONFIG))
    kinds: dict[str, Kind] = {name: (DTYPE, tuple(weight.shape)) for name, weight in model.named_parameters()}
    total = sum(weight.numel() for weight in model.parameters())
    print(f"{total:,} weights, {total * DTYPE.itemsize:,} bytes a model ({DTYPE})", flush=True)
    try:
        for number, name in enumerate(names):
            write_model(root / name, kinds, number=number)
        began = time.monotonic()
        folders = [str(root / name) for name in names]
        code, most = watched(
            [sys.executable, "-m", "minillm", "merge", *folders, "--out", str(root / "merged"), "--method", "slerp"]
        )
        seconds = time.monotonic() - began
        print(f"{MODELS} models and their start merged in {seconds:.0f} s, exit code {code}")
        print(", ".join(f"{name} {most[name] / 1e9:.2f} GB" for name in FIELDS))
        print(f"most resident, mapped files included: {most['VmHWM'] / 1e9:.2f} GB, limit {LIMIT / 1e9:.0f} GB")
        return 0 if code == 0 and most["VmHWM"] < LIMIT else 1
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

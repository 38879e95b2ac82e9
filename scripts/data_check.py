"""See data_check.sh."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FEW, MANY, SHARDS = 10_008, 100_000, 8
"""Rows. The smaller number is just large enough to be kept in the cache, so that both take the same way."""
MOST_S, MOST_SHARE = 30.0, 0.05


def main() -> int:
    """Makes the data, runs each case in a process of its own, prints the table."""
    many = int(sys.argv[1]) if len(sys.argv) > 1 else MANY
    with tempfile.TemporaryDirectory() as place:
        folder, cases = Path(place), list[dict[str, Any]]()
        words = _words()
        _save_model(folder / "model", words)
        for rows in (FEW, many):
            _save_shards(folder / f"rows-{rows}", rows, words)
            for cache in ("empty", "full"):
                cases.append({"rows": rows, "cache": cache, **_measured(folder, rows, cache)})
    print(f"load of the machine: {', '.join(f'{load:.1f}' for load in os.getloadavg())}; {os.cpu_count()} cores")
    print(f"{'rows':>9} {'cache':>6} {'to first step':>14} {'CPU':>8} {'of it data':>11} {'peak MiB':>9}")
    for case in cases:
        print(
            f"{case['rows']:>9,} {case['cache']:>6} {case['step_s']:>12.1f} s {case['cpu_s']:>6.1f} s "
            f"{case['data_s']:>9.1f} s {case['peak_mib']:>9.1f}"
        )
    print(json.dumps(cases))
    few, large = cases[:2], cases[2:]
    shares = [one["peak_mib"] / other["peak_mib"] - 1.0 for one, other in zip(large, few, strict=True)]
    print(f"memory of {many:,} against {FEW:,}: {', '.join(f'{share:+.1%}' for share in shares)}")
    return int(max(case["step_s"] for case in large) > MOST_S or max(map(abs, shares)) > MOST_SHARE)


def _words() -> list[str]:
    source = random.Random(0)
    return ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(3000)]


def _save_shards(folder: Path, rows: int, words: list[str]) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    source = random.Random(rows)
    folder.mkdir()
    for shard in range(SHARDS):
        count = rows // SHARDS + (shard < rows % SHARDS)
        table = pyarrow.table(
            {
                "instruction": [" ".join(source.choices(words, k=24)) for _ in range(count)],
                "response": [" ".join(source.choices(words, k=6)) for _ in range(count)],
            }
        )
        pyarrow.parquet.write_table(table, folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")


def _save_model(folder: Path, words: list[str]) -> None:
    """A tiny model with a byte-level BPE, as real tokenizers are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([" ".join(words)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=512, eos_token_id=end, bos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _measured(folder: Path, rows: int, cache: str) -> dict[str, float]:
    asked = {"folder": str(folder), "rows": rows, "name": f"{rows}-{cache}", "began": time.time()}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(asked)], capture_output=True, text=True, check=False, env=os.environ
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    print("".join(f"  {line}\n" for line in done.stdout.splitlines() if line.startswith("train:")), end="", flush=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _run(asked: dict[str, Any]) -> None:
    """One run of one step; what it took stands in the last line."""
    from minillm import distill, fault
    from minillm.config import RunConfig

    folder, found = Path(asked["folder"]), dict[str, float]()

    def hear(name: str, detail: str) -> None:
        if name != "phase":
            return
        now = time.time() - asked["began"]
        if detail == "loading":
            found.setdefault("data_s", now)
        if "learning" in found and "step_s" not in found:  # what comes next
            found["step_s"], found["cpu_s"] = now, time.process_time()
            found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if detail == "learning":
            found.setdefault("learning", now)

    config = RunConfig(
        name=asked["name"], out=str(folder / "runs"), student=str(folder / "model"),
        data={
            "train": f"{folder}/rows-{asked['rows']}/train-*.parquet", "max_prompt_tokens": 256,
            "over_long": "drop", "cache": str(folder / "cache"),
        },
        decoding={"max_new_tokens": 64}, engine={"student": "zero0"},
        stages=({"kind": "sft", "steps": 2, "batch": 8, "optimiser": {"lr": 1e-3}},),
    )  # fmt: skip
    with fault.planned(hear):
        distill(config)
    print(json.dumps({name: value for name, value in found.items() if name != "learning"}))


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        _run(json.loads(sys.argv[1]))
    else:
        sys.exit(main())

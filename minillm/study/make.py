"""Making one cell: its models, its training, its evaluation, and what its log says of them."""

from __future__ import annotations

import contextlib
import fcntl
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minillm import api
from minillm.config import RunConfig
from minillm.errors import Alarmed, DataError, NonFinite, RunExists
from minillm.generation import generate
from minillm.measures import LENGTH_BUCKETS, ratios_of, reference_bucket, temperature_key
from minillm.pair_making import make_pairs
from minillm.ranks import Ranks
from minillm.report_files import read_course, read_samples
from minillm.results import versions
from minillm.statistics import mean_over_seeds
from minillm.store import RunFolder
from minillm.study.cells import Asked
from minillm.study.texts import StudyText


def make_model(needed: RunConfig, *, ranks: Ranks) -> None:
    """A teacher or student of the study's own, unless it is there; only one of several processes makes it."""
    folder = Path(needed.out) / needed.name
    with alone(folder.with_name(f".{folder.name}.lock"), ranks=ranks):
        try:
            api.distill(needed)
        except RunExists as error:  # of another recipe, or from other data, than now
            if ranks.first:
                print(f"made anew: {error}", flush=True)
            api.distill(needed, fresh=True)


def make_needed(wanted: Asked, *, ranks: Ranks) -> None:
    """What a cell is made from and the study makes: models, then text."""
    for model in (wanted.teacher, wanted.student):
        if model is not None:
            make_model(model, ranks=ranks)
    for text in wanted.texts:
        make_text(text, ranks=ranks)


def make_text(text: StudyText, *, ranks: Ranks) -> None:
    """Text that arms learn from, unless it is there; the models that write it must be."""
    with alone(text.file.with_name(f".{text.file.name}.lock"), ranks=ranks):
        try:
            _write(text, fresh=False)
        except DataError as error:  # other text than is wanted now
            if ranks.first:
                print(f"written anew: {error}", flush=True)
            _write(text, fresh=True)


def _write(text: StudyText, *, fresh: bool) -> None:
    assert text.run.teacher is not None, "a recipe that distils names a teacher"
    if text.reads == "preferences":
        make_pairs(text.run, out=text.file, fresh=fresh)
        return
    generate(text.run.teacher, text.run, out=text.file, samples=text.samples, fresh=fresh)


def make(config: RunConfig, *, ranks: Ranks, evaluated: bool = True) -> dict[str, Any]:
    """Trains one cell, and evaluates it: what it found, or why it failed."""
    folder = RunFolder(Path(config.out) / config.name, writes=False)
    # A cell that was broken off is made again from its beginning, so that its seconds are those of one piece.
    training = config.model_copy(update={"data": config.data.model_copy(update={"test": None}), "checkpoints": None})
    out, began, reason = folder.path / "evaluation", time.process_time(), None
    spent: float | None = None
    try:
        api.distill(training, fresh=True)
        spent = time.process_time() - began
        if evaluated:
            api.evaluate(folder.student, config, out=out, fresh=True)
    except (NonFinite, Alarmed) as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
    spent = time.process_time() - began if spent is None else spent
    cpu_seconds = round(float(ranks.sum([spent])[0]), 1)
    found: dict[str, Any] = {
        "state": "done" if reason is None else "failed", "reason": reason, "date": time.strftime("%Y-%m-%d"),
        "training": {"cpu_seconds": cpu_seconds, "ranks": ranks.size, **_course(config, folder.path / "metrics.jsonl")},
        "versions": versions(),
    }  # fmt: skip
    if reason is None and evaluated:
        found["temperatures"] = figures(read_samples(out))
    return found


def _course(config: RunConfig, metrics: Path) -> dict[str, Any]:
    """What a cell's log says of its training: how much, the validations, which alarms first rang when."""
    rows = read_course(metrics).rows if metrics.is_file() else ()  # none where the first step failed
    by_stage = [[line for line in rows if line["stage"] == stage.name] for stage in config.trained]
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "alarm": []}
    took, tokens = [], 0.0
    for lines in by_stage:
        before = tokens
        for line in lines:
            tokens += line.get("response_tokens", line["tokens"]) if line["kind"] == "train" else 0.0
            kind: str = line["kind"]
            kinds.setdefault(kind, []).append({**line, "tokens": tokens} if kind == "validation" else line)
        updates = [line["update"] for line in lines if line["kind"] == "train"]
        took.append({"updates": updates[-1] if updates else 0, "tokens": round(tokens - before)})
    alarms: dict[str, int] = {}
    for line in kinds["alarm"]:
        alarms.setdefault(line["name"], line["step"])
    dropped = {"kind", "stage"}
    return {
        "steps": len(kinds["train"]),
        "updates": sum(of["updates"] for of in took),
        "tokens": round(tokens),
        # A budget is that of the last stage.
        **({"last_stage": took[-1]} if len(took) > 1 else {}),
        "alarms": alarms,
        "validations": [
            {name: _short(value) for name, value in line.items() if name not in dropped and value is not None}
            for line in kinds["validation"]
        ],
    }


def figures(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A cell's figures: means at each temperature, of all prompts and by the length of the reference."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(temperature_key(row["temperature"]) for row in samples):
        rows = [row for row in samples if temperature_key(row["temperature"]) == key]
        buckets = {name: [row for row in rows if reference_bucket(row) == name] for name in LENGTH_BUCKETS}
        found[key] = {
            **_means(rows),
            "by_length": {name: {"prompts": _prompts(own), **_means(own)} for name, own in buckets.items() if own},
        }
    return found


def _prompts(rows: Sequence[dict[str, Any]]) -> int:
    return len({row["uid"] for row in rows})


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Those that there are: of responses of a word or two, say, there is no distinct-4."""
    means = {name: mean_over_seeds(ratio) for name, ratio in ratios_of(rows).items()}
    return {name: _short(mean) for name, mean in means.items() if not math.isnan(mean)}


def _short(value: float) -> float:
    """Five significant digits: more than any of these figures is sure of."""
    return float(f"{value:.5g}")


@contextlib.contextmanager
def alone(lock: Path, *, ranks: Ranks) -> Iterator[None]:
    """No other process is inside at the same time; the first rank waits for all of its own."""
    if ranks.first:
        lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if ranks.first:
            file = stack.enter_context(lock.open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file lets go of it
        ranks.barrier()
        yield
        ranks.barrier()


@contextlib.contextmanager
def log_into(file: Path, *, first: bool) -> Iterator[None]:
    """What the cell's runs print goes into a file beside their folder."""
    if not first:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield

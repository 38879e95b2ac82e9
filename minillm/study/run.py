"""Making the cells that a study lacks, seed by seed, so that what is there so far is balanced."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minillm import api
from minillm.config import RunConfig
from minillm.errors import Alarmed, NonFinite
from minillm.measures import LENGTH_BUCKETS, ratios_of, reference_bucket, temperature_key
from minillm.ranks import Ranks
from minillm.report_files import read_course, read_samples
from minillm.results import versions
from minillm.statistics import mean_over_seeds
from minillm.store import RunFolder
from minillm.study.cells import Asked, asked, code_digest, differs, read_cell, write_cell
from minillm.study.config import StudyConfig

SHOWN = ("validity", "rouge_l", "reverse_kl")
"""Measures in the line of a finished cell, where it has them."""


def run_study(
    study: StudyConfig, *, arms: Sequence[str], seeds: Sequence[int], again: bool, say: Callable[[str], None]
) -> None:
    """Makes the cells of these arms and seeds that are not there, or all of them with ``again``.

    A cell that ends in numbers that are not finite, or in an alarm that stops, is a finding and kept as failed; any
    other error ends the study. ``say`` hears a line a cell. Every rank of a launcher must call it.
    """
    ranks = Ranks(threads=study.cell_config(arms[0], seeds[0]).threads)
    todo = _todo(study, arms=arms, seeds=seeds, again=again, say=say if ranks.first else _quiet)
    began, made = time.monotonic(), set[str]()
    for number, wanted in enumerate(todo, start=1):
        config = study.cell_config(wanted.arm, wanted.seed)
        with _log_into(Path(config.out) / f"{config.name}.log", first=ranks.first):
            _make_models(study, wanted.seed, made)
            found = _make(config, first=ranks.first)
        if ranks.first:
            write_cell(wanted, found)
            spent = time.monotonic() - began
            say(f"{number}/{len(todo)}  {wanted.arm} seed {wanted.seed}: {_in_words(found)}  "
                f"{spent * (len(todo) - number) / number:.0f} s left")  # fmt: skip
        ranks.barrier()


def _make_models(study: StudyConfig, seed: int, made: set[str]) -> None:
    """The teacher and the seed's student, where the study makes them and this process has not seen them done."""
    for needed in (study.teacher_config(), study.student_config(seed)):
        if needed is not None and needed.name not in made:
            api.distill(needed)
            made.add(needed.name)


def _todo(
    study: StudyConfig, *, arms: Sequence[str], seeds: Sequence[int], again: bool, say: Callable[[str], None]
) -> list[Asked]:
    """The cells to be made, in order; everything else about them is told."""
    todo, older, kept = [], 0, 0
    for seed in seeds:
        for arm in arms:
            wanted = asked(study, arm, seed)
            stored = None if again else read_cell(wanted.file)
            changed = [] if stored is None else differs(stored, wanted)
            if stored is None or changed:
                todo.append(wanted)
                if changed:
                    say(f"{wanted.file}: made again, since it differs in {', '.join(changed)}")
            else:
                kept += 1
                older += stored["code"] != code_digest()
    say(f"study {study.name}: {len(todo)} cells to make, {kept} there already")
    if older:
        say(f"note: {older} of them were made by another version of the code; --again makes them anew")
    return todo


def _make(config: RunConfig, *, first: bool) -> dict[str, Any]:
    """Trains and evaluates one cell: what it found, or why it failed."""
    folder = RunFolder(Path(config.out) / config.name, writes=False)
    training = config.model_copy(update={"data": config.data.model_copy(update={"test": None})})
    began = time.process_time()
    failure = None
    try:
        api.distill(training, fresh=True)
    except (NonFinite, Alarmed) as error:
        failure = f"{type(error).__name__}: {error}".split("\n")[0]
    cpu_seconds = time.process_time() - began
    course = _course(folder.path / "metrics.jsonl") if first else {}
    found = {"state": "done" if failure is None else "failed", "reason": failure, "date": time.strftime("%Y-%m-%d"),
             "training": {"cpu_seconds": round(cpu_seconds, 1), **course}, "versions": versions()}  # fmt: skip
    if failure is None:
        out = folder.path / "evaluation"
        api.evaluate(folder.student, config, out=out, fresh=True)
        found["temperatures"] = _measures(read_samples(out)) if first else {}
    return found


def _course(metrics: Path) -> dict[str, Any]:
    """What a cell's log says of its training: how much, the validations, which alarms first rang when."""
    kinds: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "alarm": []}
    for line in read_course(metrics).rows:
        kinds[line["kind"]].append(line)
    alarms: dict[str, int] = {}
    for line in kinds["alarm"]:
        alarms.setdefault(line["name"], line["step"])
    train, dropped = kinds["train"], {"kind", "stage", "seconds", "update"}
    return {
        "steps": len(train),
        "updates": train[-1]["update"] if train else 0,
        "tokens": round(sum(line["tokens"] for line in train)),
        "alarms": alarms,
        "validations": [
            {name: _short(value) for name, value in line.items() if name not in dropped} for line in kinds["validation"]
        ],
    }


def _measures(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means at each temperature, of all prompts and by the length of the reference."""
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
    return {name: _short(mean_over_seeds(ratio)) for name, ratio in ratios_of(rows).items()}


def _short(value: float) -> float:
    """Five significant digits: more than any of these figures is sure of."""
    return float(f"{value:.5g}")


def _in_words(found: dict[str, Any]) -> str:
    training = found["training"]
    if found["reason"] is not None:
        return f"failed: {found['reason']}"
    headline = next(iter(found["temperatures"].values()))
    figures = "  ".join(f"{name} {headline[name]:.3f}" for name in SHOWN if name in headline)
    return f"{figures}  {training['cpu_seconds']:.0f} CPU s"


def _quiet(line: str) -> None:
    """For the ranks that do not speak."""


@contextlib.contextmanager
def _log_into(file: Path, *, first: bool) -> Iterator[None]:
    """What the cell's runs print goes into a file beside their folder."""
    if not first:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield

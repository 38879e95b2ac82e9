"""What is to be judged: the responses of evaluation folders at one sampling seed and temperature."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minillm.errors import DataError
from minillm.measures import MAIN_TEMPERATURE, temperature_key
from minillm.report_files import read_results, read_samples
from minillm.statistics import require_same_prompts

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt, a response to it, and the reference (the first one, "" where there is none)."""

    uid: str
    prompt: str
    response: str
    reference: str
    stop: str = ""
    """How the response ended: ``eos``, ``length`` or ``empty``; "" where the file does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One evaluation's responses, in the order of its file."""

    folder: Path
    seed: int
    temperature: float
    samples: tuple[Sample, ...]
    sha256: str
    """Of samples.jsonl."""


def read_sides(folders: Sequence[Path], *, seed: int | None, temperature: float | None) -> list[Side]:
    """The responses of one or two evaluations.

    Without a ``seed`` the lowest that all of them have, without a ``temperature`` 1, or the highest that all have.
    Raises ``DataError`` for a folder without an evaluation, a seed or temperature that was not drawn, and two
    evaluations of different prompts.
    """
    rows = []
    for folder in folders:
        read_results(folder)  # an evaluation that was broken off has none
        rows.append(read_samples(folder))
    seeds = _common([{_seed(row, folder) for row in found} for folder, found in zip(folders, rows, strict=True)])
    seed = _chosen("seed", folders, sorted(seeds), seed)
    keys = _common([{_temperature(row, folder) for row in found} for folder, found in zip(folders, rows, strict=True)])
    main = temperature_key(MAIN_TEMPERATURE)
    ordered = sorted(keys, key=lambda key: (key != main, -float(key)))
    key = _chosen("temperature", folders, ordered, None if temperature is None else temperature_key(temperature))
    sides = [_side(folder, found, seed, key) for folder, found in zip(folders, rows, strict=True)]
    first = sides[0]
    for other in sides[1:]:
        require_same_prompts(tuple(s.uid for s in first.samples), tuple(s.uid for s in other.samples))
        for ours, theirs in zip(first.samples, other.samples, strict=True):
            if ours.prompt != theirs.prompt:
                raise DataError(
                    f"{first.folder} and {other.folder}: the prompt {ours.uid!r} is not the same text in both; "
                    "evaluate both on the same data, in the same prompt format"
                )
    return sides


def asked_of_sides(sides: Sequence[Side], *, mode: str, against: str | None) -> dict[str, Any]:
    """What is judged, for the record of a judging, whoever judges."""
    return {
        "mode": mode,
        "evaluations": [{"folder": str(side.folder), "samples": side.sha256} for side in sides],
        "seed": sides[0].seed,
        "temperature": sides[0].temperature,
        **({} if against is None else {"against": against}),
    }


def comparable(sides: Sequence[Side], *, references: bool) -> list[int]:
    """Which prompts can be judged: all, or where ``references`` are one of the answers, those that have one.

    Raises ``DataError`` where none can.
    """
    found = [n for n in range(len(sides[0].samples)) if not references or all(s.samples[n].reference for s in sides)]
    if not found:
        raise DataError(
            f"{sides[0].folder}: no response has a reference to be held against; name two evaluations to compare them"
        )
    return found


def _side(folder: Path, rows: Sequence[dict[str, Any]], seed: int, key: str) -> Side:
    file = folder / "samples.jsonl"
    samples = []
    for row in rows:
        if row["seed"] != seed or temperature_key(row["temperature"]) != key:
            continue
        references = row.get("references") or []
        texts = [row["uid"], row["prompt"], row["response"], *(references if isinstance(references, list) else [None])]
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"{file}: row {row['uid']!r} holds something that is no text; evaluate the model again")
        reference = references[0] if references else ""
        samples.append(Sample(row["uid"], row["prompt"], row["response"], reference, str(row.get("stop", ""))))
    if len({sample.uid for sample in samples}) < len(samples):
        raise DataError(f"{file}: a prompt has two responses at seed {seed}; evaluate the model again")
    return Side(
        folder=folder,
        seed=seed,
        temperature=float(key),
        samples=tuple(samples),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )


def _common(sets: Sequence[set[T]]) -> set[T]:
    return set.intersection(*sets)


def _chosen(what: str, folders: Sequence[Path], known: Sequence[T], asked: T | None) -> T:
    where = " and ".join(str(folder) for folder in folders)
    if not known:
        raise DataError(f"{where}: no {what} that was evaluated in all; evaluate both with the same configuration")
    if asked is None:
        return known[0]
    if asked not in known:
        raise DataError(f"{where}: no responses of {what} {asked}, there are {', '.join(map(str, known))}")
    return asked


def _seed(row: dict[str, Any], folder: Path) -> int:
    if not isinstance(row["seed"], int):
        raise DataError(f"{folder / 'samples.jsonl'}: seed {row['seed']!r}, wanted a number; evaluate the model again")
    return row["seed"]


def _temperature(row: dict[str, Any], folder: Path) -> str:
    try:
        return temperature_key(row["temperature"])
    except (TypeError, ValueError):
        told = f"temperature {row['temperature']!r}, wanted a number; evaluate the model again"
        raise DataError(f"{folder / 'samples.jsonl'}: {told}") from None

"""What evaluations and runs left on the disk, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.errors import ConfigError, DataError
from minillm.inside import inside
from minillm.manifests import parsed
from minillm.measures import MAIN_TEMPERATURE, temperature_key

SCHEMA = 1
ABOUT = ("model", "teacher", "data", "decoding", "asked", "seconds", "versions")
"""Parts of results.json that say what was done, each an object where it is there."""
LONGEST_LINE = 100
"""Characters of a line that a message repeats."""
SAMPLE_FIELDS = ("uid", "seed", "temperature", "prompt", "response", "measures")
"""What every row of samples.jsonl has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """The lines of a run's metrics.jsonl, in order, a repeated step only as last written."""

    rows: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    """What a reader should know about the file: an unfinished last line, steps written twice."""


def named_folders(arguments: Sequence[str], *, what: str = "an evaluation") -> dict[str, Path]:
    """Folders as a command line names them: NAME=FOLDER, or FOLDER, whose last part is then the name.

    ``ConfigError`` for a name that is there twice, ``DataError`` for what is no folder.
    """
    found: dict[str, Path] = {}
    for text in arguments:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).is_dir():  # a folder may have "=" in its name
            name, folder = Path(text).resolve().name, text
        if not name or not folder:
            raise ConfigError(f"{text!r}: wanted FOLDER or NAME=FOLDER, such as sft=runs/quickstart/sft")
        if name in found:
            raise ConfigError(
                f"{text!r}: the name {name!r} is given twice; give each folder a name of its own, NAME=FOLDER"
            )
        require_folder(Path(folder), name=name, what=what)
        found[name] = Path(folder)
    return found


def require_folder(folder: Path, *, name: str, what: str = "an evaluation") -> None:
    """Raise ``DataError`` for what is no folder."""
    if not folder.is_dir():
        got = "a file" if folder.exists() else "not there"
        raise DataError(f"{name}: {folder} is {got}; wanted the folder of {what}")


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of an evaluation folder. Raises ``DataError`` when it is missing, broken or of another schema."""
    path = folder / "results.json"
    try:
        found = parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `minillm evaluate MODEL --out {folder}` writes it") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{path}: schema {schema!r}, wanted {SCHEMA}; evaluate the model again with this version")
    if names := sets_in(found):
        raise DataError(
            f"{path}: results of {len(names)} sets ({', '.join(names)}); name the folder of one, {folder / names[0]}"
        )
    if not isinstance(found.get("measures"), dict):
        raise DataError(f"{path}: no 'measures'; evaluate the model again")
    if not found.get("temperatures"):
        found["temperatures"] = {temperature_key(MAIN_TEMPERATURE): found["measures"]}
    if strange := next(_strange(found), ""):
        raise DataError(f"{path}: {strange} is not what an evaluation writes; evaluate the model again")
    return found  # type: ignore[no-any-return]


def _strange(results: Mapping[str, Any]) -> Iterator[str]:
    """What in results has another shape than it is written in, by name: the file may be anybody's."""
    yield from (name for name in ABOUT if not isinstance(results.get(name) or {}, dict))
    by_temperature = results["temperatures"]
    if not isinstance(by_temperature, dict):
        yield "temperatures"
        return
    for at, measures in by_temperature.items():
        if not _is_temperature(at) or not isinstance(measures, dict):
            yield f"temperatures.{at}"
            continue
        yield from (f"temperatures.{at}.{name}" for name, estimate in measures.items() if not _is_estimate(estimate))


def _is_estimate(found: Any) -> bool:
    """Whether something is a mean with its interval, each of them perhaps absent."""
    if not isinstance(found, dict):
        return False
    ends = found.get("ci95")
    fits = ends is None or (isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends)))
    return fits and (found.get("mean") is None or _is_number(found["mean"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_temperature(key: str) -> bool:
    try:
        return temperature_key(float(key)) == key and math.isfinite(float(key))
    except ValueError:
        return False


def sets_in(results: Mapping[str, Any]) -> list[str]:
    """The names of the sets that a results.json lists; none where it is the results of one."""
    return [str(name) for name in results["sets"]] if isinstance(results.get("sets"), dict) else []


def set_folders(folder: Path) -> dict[str, Path]:
    """The folders of an evaluation's sets by name; the folder itself, under '', where it is one of a single source.

    What cannot be read is taken for the latter, and told by whoever reads it.
    """
    try:
        found = parsed((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"": folder}
    names = sets_in(found) if isinstance(found, dict) else []
    return {name: inside(folder, name, source=folder / "results.json") for name in names} or {"": folder}


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation's samples.jsonl. Raises ``DataError`` with file and line when one is broken."""
    rows, unfinished = _read_jsonl(folder / "samples.jsonl")
    if unfinished:
        raise DataError(f"{unfinished}; the evaluation was broken off, evaluate the model again")
    for number, row in enumerate(rows, start=1):
        if absent := [field for field in SAMPLE_FIELDS if field not in row]:
            raise DataError(f"{folder / 'samples.jsonl'}, row {number}: no {absent[0]!r}; evaluate the model again")
    return rows


def read_course(path: Path) -> Course:
    """metrics.jsonl of a run (its folder or the file). An unfinished last line is left out and noted."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows, unfinished = _read_jsonl(path)
    notes = [f"{unfinished}; it is left out"] if unfinished else []
    for row in rows:
        words = all(isinstance(row.get(name, ""), str) for name in ("kind", "stage", "name"))
        if not (words and all(_is_number(row.get(name, 0)) for name in ("step", "update"))):
            raise DataError(f"{path}: a line that is not a run's: {str(row)[:LONGEST_LINE]}\n  name another file")
    # A run that was taken up again writes the steps since its last checkpoint twice: the later lines count.
    place = ("kind", "stage", "step", "update", "name")  # several alarms ring in one step, each with its name
    kept = {tuple(row.get(part) for part in place): row for row in rows}
    if len(kept) < len(rows):
        notes.append(f"{path.name}: {len(rows) - len(kept)} steps were written twice, the later ones are shown")
    ordered = sorted(kept.values(), key=lambda row: (float(row.get("step", 0)), float(row.get("update", 0))))
    return Course(rows=tuple(ordered), notes=tuple(notes))


def _read_jsonl(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The objects of a file, and what is wrong with an unfinished last line ("" when nothing is)."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; name the folder of a finished evaluation or run") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except json.JSONDecodeError as error:
            told = f"{path}, line {number}, column {error.colno}: not JSON ({error.msg})"
            if number == len(lines):  # without its newline: a process was killed while writing
                return rows, told
            raise DataError(told) from None
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: got {type(row).__name__}, wanted an object")
        rows.append(row)
    return rows, ""

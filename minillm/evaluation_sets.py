"""One model on several test sets: read apart, drawn alike, and kept apart.

Every set has the same decoding record and seeds, and a folder of its own with what a single source leaves in ``out``,
unfinished rows too. ``out``/results.json lists them. A set's figures and samples are those of an evaluation on that
source alone: random numbers are keyed by run seed, row id and sampling seed, and not by the set. So rows of one id in
two sets meet the same numbers. No figure is over two sets, so none is touched by that; only, such sets are not
independent of each other. A run says where it is so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.config import RunConfig
from minillm.errors import DataError
from minillm.extras import require_extras
from minillm.manifests import parsed
from minillm.pairs import Pair
from minillm.preflight import Split, read_split, with_checker
from minillm.ranks import Ranks
from minillm.records import listed
from minillm.report_files import SCHEMA, sets_in
from minillm.results import already, asked_of, evaluate_into, opened, stored_results, versions, with_versions
from minillm.rows import counted
from minillm.stages import Start
from minillm.store import UNFINISHED, make_folder, write_text
from minillm.teacher_engine import Teacher
from minillm.unfinished import asked_before, begin

Sets = Mapping[str, Split]
"""The sets by name; a single source has the name ''."""


def read_sets(config: RunConfig, pair: Pair) -> dict[str, Split]:
    """The prompts of every set, ready for the models, with what there is to be told of them.

    Raises ``DataError`` where one is empty, breaks the run's policy, or cannot carry what the configuration measures.
    """
    found: dict[str, Split] = {}
    for name, source in config.data.test_sets.items():
        try:
            split = read_split(
                config, source, pair=pair, name="test", need_response=False, limit=config.data.test_limit
            )
            require_extras(config, pair, split)
            split = with_checker(config, split)
        except DataError as error:
            if not name:
                raise
            raise type(error)(f"set {name}: {error}") from error
        words = [f"{name}: {line}" if name else line for line in split.words]
        words += _bare_words(name or "test", split)
        found[name] = Split(
            source=split.source,
            prompts=split.prompts,
            sha256=split.sha256,
            words=tuple(words),
        )
    return found


def _bare_words(name: str, split: Split) -> list[str]:
    bare = sum(not prompt.responses for prompt in split.prompts)
    if bare == len(split.prompts):
        return [f"{name}: no row has a reference: no ROUGE-L, no exact match, nothing by length"]
    return [f"{name}: {counted(bare, 'row')} without a reference: ROUGE-L and exact match leave out those"] * bool(bare)


def shared_words(sets: Sets) -> list[str]:
    """Which ids stand in more than one set, and what that means."""
    homes: dict[str, list[str]] = {}
    for name, split in sets.items():
        for prompt in split.prompts:
            homes.setdefault(prompt.uid, []).append(name)
    shared = {uid: names for uid, names in homes.items() if len(names) > 1}
    if not shared:
        return []
    names = list(dict.fromkeys(name for each in shared.values() for name in each))
    return [
        f"note: {counted(len(shared), 'row id')} in more than one of the sets {', '.join(names)} "
        f"({listed(list(shared))}): rows of one id are drawn with the same random numbers. The figures of a set are "
        "what they are without the others; the chances of these sets are not independent"
    ]


def unanswered(config: RunConfig, pair: Pair, sets: Sets, *, start: Start, out: Path) -> list[str]:
    """The sets that are to be evaluated in ``out``, or gone on with.

    ``DataError`` where there are results, or an unfinished evaluation, of something else.
    """
    index = stored_index(out) if "" not in sets else None
    if index is not None and (gone := [name for name in sets_in(index) if name not in sets]):
        raise DataError(
            f"{out} holds results of sets that are not asked for now ({', '.join(gone)}); nothing was touched.\n"
            "  give another --out, or --fresh to replace the list"
        )
    if "" not in sets and asked_before(out) is not None:
        raise DataError(
            f"{out} holds an unfinished evaluation on one source; nothing was touched.\n"
            "  give another --out, or --fresh to start over with these sets"
        )
    missing = []
    for name, split in sets.items():

        def asked(split: Split = split) -> dict[str, Any]:
            return asked_of(config, pair, split, start=start)

        if already(out / name, asked) is None:
            missing.append(name)
    return missing


def forget_unfinished(out: Path, sets: Sets) -> None:
    """Removes what interrupted evaluations left in ``out`` and in the folders of its sets."""
    for folder in {out, *(out / name for name in sets)}:
        (folder / UNFINISHED).unlink(missing_ok=True)


def stored_index(out: Path) -> dict[str, Any] | None:
    """The list of sets in ``out``; None where there is none. ``DataError`` where a single source left its results."""
    file = out / "results.json"
    if not file.is_file():
        return None
    try:
        found = parsed(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; move it away or give --fresh") from error
    if not isinstance(found, dict) or not isinstance(found.get("sets"), dict):
        raise DataError(f"{file}: not a list of sets; give another --out, or --fresh to replace it")
    return found


def evaluate_sets(
    config: RunConfig,
    pair: Pair,
    sets: Sets,
    *,
    start: Start,
    teacher: Teacher | None,
    ranks: Ranks,
    out: Path,
    shown: str,
    only: list[str] | None = None,
) -> dict[str, Any]:
    """Evaluates the weights of ``start`` on every set (on those in ``only``) with one model in memory; goes on with
    those that are unfinished.

    A single source leaves its results in ``out``. Of several each leaves them in ``out``/SET, and ``out``/results.json,
    which is returned, lists all of them: source, rows, fingerprint and headline measures.
    """
    if "" in sets:
        return evaluate_into(config, pair, sets[""], start=start, teacher=teacher, ranks=ranks, out=out, shown=shown)
    asked = list(sets) if only is None else only
    model = opened(config, pair, start=start, ranks=ranks) if asked else None

    def ready() -> None:
        for name in asked:
            make_folder(out / name, setting="--out")
            # Or an interruption would leave results that are to be replaced, and nothing that says so.
            begin(out / name, with_versions(asked_of(config, pair, sets[name], start=start)))

    ranks.of_first(ready)
    for name in asked:
        evaluate_into(
            config, pair, sets[name], start=start, teacher=teacher, ranks=ranks, out=out / name,
            shown=f"{shown}, {name}", model=model,
        )  # fmt: skip

    def listed_sets() -> dict[str, Any]:
        index = _index(sets, out)
        write_text(out / "results.json", json.dumps(index, indent=2) + "\n")
        return index

    return ranks.of_first(listed_sets)  # the others may not see the disk


def _index(sets: Sets, out: Path) -> dict[str, Any]:
    stored = {name: stored_results(out / name) or {} for name in sets}
    first = next(iter(stored.values()))
    return {
        "schema": SCHEMA,
        **{part: first[part] for part in ("model", "teacher", "decoding", "seeds", "bootstrap")},
        "sets": {
            name: {"folder": name, **results["data"], "measures": results["measures"]}
            for name, results in stored.items()
        },
        "seconds": {"evaluation": round(sum(results["seconds"]["evaluation"] for results in stored.values()), 2)},
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
    }

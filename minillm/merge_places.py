"""Folders that merges wrote before, held against what is asked now: left as they are, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.errors import DataError
from minillm.manifests import parsed
from minillm.model_files import few

MERGED, FRONT = "merge.json", "front.json"
"""The records of one merge, and of the front that several make."""
AGAIN = "merged already; --fresh starts over"
_REMEDY = "nothing was touched.\n  give another --out, or --fresh to replace it"


def answered(record: Path, asked: Mapping[str, Any]) -> bool:
    """Whether an earlier merge left ``record`` and was of what is ``asked``: the same weights, wherever they lie.

    False where there is none; ``DataError`` where it is of anything else.
    """
    if not record.is_file():
        return False
    try:
        stored = parsed(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{record} cannot be read, so nobody knows what was merged there; {_REMEDY}") from error
    if found := differences(stored, asked):
        raise DataError(f"{record.parent} holds another merge (it differs in: {', '.join(found)}); {_REMEDY}")
    return True


def differences(stored: Any, asked: Mapping[str, Any]) -> list[str]:
    """What two records of merges differ in, of what is asked and never by names of folders; where they do not, what
    else says that they are not of one merge."""
    if not isinstance(stored, dict):
        return ["everything"]
    for same in (_SAME, _SAME_AS_WELL):
        if found := [words for name, (words, as_is) in same.items() if not as_is(stored.get(name), asked.get(name))]:
            return found
    return []


def require_place_of_front(into: Path) -> None:
    """``DataError`` where a merged model lies in the folder that models at several etas are to lie in."""
    if (into / MERGED).is_file():
        raise DataError(
            f"{into} holds a merged model, and each of several etas is a folder of its own in --out; nothing was "
            "touched.\n  give another --out"
        )


def require_no_front(into: Path) -> None:
    """``DataError`` where models at several etas lie in the folder that one merged model is to fill."""
    if etas := sorted(found.parent.parent.name for found in into.glob(f"eta-*/student/{MERGED}")):
        raise DataError(
            f"{into} holds models at several etas ({', '.join(etas)}), not one; nothing was touched.\n"
            "  give another --out"
        )


def require_free(into: Path, sources: Sequence[Path]) -> None:
    """``DataError`` unless a folder may be replaced: it holds no source, and nothing but what a merge wrote."""
    if not into.exists():
        return
    if inside := [source for source in sources if source.resolve().is_relative_to(into.resolve())]:
        where = "one of" if inside[0].resolve() == into.resolve() else f"around {inside[0]}, one of"
        raise DataError(f"{into} is {where} the folders that are merged; nothing was touched.\n  name another")
    if into.is_dir() and not (others := sorted({*files_in(into)} - {*files_of(stored_record(into))})):
        return
    what = f"holds {few(others)}, which no merge wrote" if into.is_dir() else "is no folder"
    raise DataError(f"{into} {what}; nothing was touched.\n  name another folder")


def stored_record(folder: Path) -> Any:
    """The record of the merge that made a folder; None where no whole one is there."""
    try:
        return parsed((folder / MERGED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def files_of(record: Any) -> tuple[str, ...]:
    """The files that a record names; none where it is no merge's."""
    found = record.get("files") if isinstance(record, dict) else None
    return tuple(map(str, found)) if isinstance(found, list) else ()


def files_in(folder: Path) -> list[str]:
    """All files and links below a folder, by their paths in it."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other)


def _same_weights(one: Any, other: Any) -> bool:
    return isinstance(one, dict) and bool(one.get("weights_sha256") == other["weights_sha256"])


def _same_models(one: Any, other: Any) -> bool:
    return isinstance(one, list) and len(one) == len(other) and all(map(_same_weights, one, other))


def _same_lengths(one: Any, other: Any) -> bool:
    """Of task vectors by group, as far as rounding goes; a front's record has none."""
    if other is None:
        return True
    try:
        pairs = [
            (float(norm), own) for group, ours in zip(one, other, strict=True)
            for norm, own in zip(group["norms"], ours["norms"], strict=True)
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return False
    return all(math.isclose(norm, own, rel_tol=1e-6, abs_tol=1e-12) for norm, own in pairs)


_SAME: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "start": ("start", _same_weights), "models": ("models", _same_models), "method": ("method", _equal),
    "weights": ("weights", _equal), "eta": ("eta", _equal),
}  # fmt: skip
"""By their names in a record: what they are called, and whether two are the same."""
_SAME_AS_WELL: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "groups": ("how much of the adapters is added", _same_lengths),  # which no hash of weights says
    "weights_sha256": ("the merged weights, which were changed since", _equal),
}

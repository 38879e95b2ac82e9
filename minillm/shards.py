"""One source in several files: a folder, or a pattern such as ``data/train-*.parquet``."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm.errors import DataError
from minillm.records import KNOWN_FIELDS, TEXT_FIELD, listed

MATTERS = (*KNOWN_FIELDS, TEXT_FIELD, "choices")
"""Columns of Parquet files that decide what a row is; any other may be there in some of the files only."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of the files."""

    path: Path
    stem: str
    """Its name below the folder or the pattern's fixed part, without ending: tells its rows from those of others."""
    ending: str


def is_pattern(source: str) -> bool:
    """Whether a name stands for all files that fit it; one that is a file's own name does not."""
    return glob.has_magic(source) and not Path(source).expanduser().exists()


def shards_of(source: str, *, endings: Sequence[str], what: str) -> tuple[Shard, ...]:
    """The files of a folder or a pattern, by name; ``DataError`` where there is none, or where they are of several
    kinds.

    Files in a folder whose names begin with a dot or an underscore, or have another ending, are no shards of it. Of a
    pattern all that it fits have to be.
    """
    if is_pattern(source):
        base, paths = _fitting(source)
    else:
        base = Path(source).expanduser()
        paths = [path for path in base.iterdir() if path.name.endswith(tuple(endings)) and path.name[0] not in "._"]
    if not paths:
        where = "no file fits this pattern" if is_pattern(source) else f"no {' or '.join(endings)} file lies in it"
        raise DataError(f"{source}: {where}; wanted the files of a {what}\n  paths start at {Path.cwd()}")
    found = []
    for path in sorted(paths, key=lambda path: path.relative_to(base).as_posix()):
        ending = next((end for end in endings if path.name.endswith(end)), None)
        if ending is None or not path.is_file():
            raise DataError(
                f"{source}: {path} is no {what}\n  wanted {' or '.join(endings)} files; give a pattern that fits those"
            )
        found.append(Shard(path=path, stem=path.relative_to(base).as_posix().removesuffix(ending), ending=ending))
    kinds = dict.fromkeys(shard.ending for shard in found)
    if len(kinds) > 1:
        each = [next(shard.path.name for shard in found if shard.ending == kind) for kind in kinds]
        raise DataError(
            f"{source}: files of {len(kinds)} kinds ({listed(each)}), wanted one\n"
            f"  name one of them by a pattern, such as *{found[0].ending}"
        )
    return tuple(found)


def _fitting(source: str) -> tuple[Path, list[Path]]:
    """The folder before the first part that is a pattern, and the files."""
    pattern = Path(source).expanduser()
    fixed = next(at for at, part in enumerate(pattern.parts) if glob.has_magic(part))
    return Path(*pattern.parts[:fixed]), [Path(name) for name in glob.glob(str(pattern), recursive=True)]


def require_alike(paths: Sequence[Path], *, source: str) -> None:
    """Raise ``DataError`` where Parquet files have other columns than the first, of those that decide what a row is:
    half of the rows would be read as something else."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    first: dict[str, str] = {}
    for path in paths:
        try:
            schema = pyarrow.parquet.read_schema(path)
        except (pyarrow.ArrowException, OSError):
            continue  # told where its rows are read, with its place
        columns = {field.name: _told(field.type) for field in schema if field.name in MATTERS}
        first = first or columns
        for name in (*first, *columns):
            one, other = first.get(name, "not there"), columns.get(name, "not there")
            if one != other and "null" not in {one, other}:
                raise DataError(
                    f"{source}: column {name!r} is {one} in {paths[0].name} and {other} in {path.name}\n"
                    "  write the files with the same columns (null where a row has nothing), or name those that belong "
                    "together by a pattern"
                )


def _told(kind: object) -> str:
    """An Arrow type in words; those that are read as the same have the same."""
    import pyarrow

    types = pyarrow.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "text"
    if types.is_dictionary(kind):
        return _told(kind.value_type)  # type: ignore[attr-defined]
    if types.is_integer(kind):
        return "a whole number"
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return f"a list of {_told(kind.value_type)}"  # type: ignore[attr-defined]
    return str(kind)

"""Every disk that a power cut may leave after some operations, in two readings of what a file system promises.

Bytes that were not synced are absent, there in part, or there. Names that were not synced are there as a prefix of
the changes (``ordered``: a journal) or as any subset of them (``subset``: the weakest reading of POSIX). One change of
names is atomic. A name that is synced before its file's bytes are leads to a file that lacks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, combinations, product
from pathlib import Path

from tests.faults.disks import Operation

State = frozenset[tuple[str, bytes | None]]
"""A disk: each path with its bytes, or None for a folder."""
Change = list[tuple[int, str, int | None]]
"""What one operation does to names: in which folder, which name, what it leads to from then on."""
TOP = 0


def snapshot(top: Path) -> State:
    """The disk as it is."""
    found = ((path, None if path.is_dir() else path.read_bytes()) for path in top.rglob("*"))
    return frozenset((path.relative_to(top).as_posix(), content) for path, content in found)


def lay_out(state: State, top: Path) -> None:
    """Makes an empty folder into this disk."""
    for name, content in sorted(state, key=lambda item: item[0]):
        if content is None:
            (top / name).mkdir()
        else:
            (top / name).write_bytes(content)


class Model:
    """Files and folders by number, what was done to them, and which of it is surely on the disk."""

    def __init__(self, top: Path, before: State) -> None:
        self._top, self._count = top, TOP
        self.base: dict[int, dict[str, int]] = {TOP: {}}
        self.now: dict[int, dict[str, int]] = {TOP: {}}
        self.changes: list[Change] = []
        self.durable: list[bool] = []
        self.written: dict[int, list[bytes]] = {}
        self.synced: dict[int, int] = {}
        for name, content in sorted(before, key=lambda item: item[0]):
            parent, last = self._at(top / name)
            number = self._new(content)
            self.now[parent][last] = number
            if content is not None:
                self.written[number], self.synced[number] = [content], 1
        self.base = {folder: dict(names) for folder, names in self.now.items()}

    def _new(self, content: bytes | None) -> int:
        self._count += 1
        if content is None:
            self.now[self._count] = {}
        else:
            self.written[self._count], self.synced[self._count] = [], 0
        return self._count

    def _at(self, path: Path) -> tuple[int, str]:
        folder = TOP
        *parents, last = path.relative_to(self._top).parts
        for part in parents:
            folder = self.now[folder][part]
        return folder, last

    def _number(self, path: Path) -> int:
        if path == self._top:
            return TOP
        folder, name = self._at(path)
        return self.now[folder][name]

    def _change(self, change: Change) -> None:
        self.changes.append(change)
        self.durable.append(False)
        apply(change, self.now)

    def do(self, operation: Operation) -> None:
        """Follows one operation."""
        match operation.kind:
            case "write":
                self.written[self._number(operation.path)].append(operation.content)
            case "sync":
                number = self._number(operation.path)
                self.synced[number] = len(self.written[number])
            case "sync_folder":
                number = self._number(operation.path)
                for place, change in enumerate(self.changes):
                    self.durable[place] |= all(folder == number for folder, _, _ in change)
            case "make_folder" | "create":
                content = None if operation.kind == "make_folder" else b""
                self._change([(*self._at(operation.path), self._new(content))])
            case "rename":
                assert operation.target is not None
                number = self._number(operation.path)
                self._change([(*self._at(operation.path), None), (*self._at(operation.target), number)])
            case "remove":
                self._change([(*self._at(operation.path), None)])

    def states(self, *, ordered: bool) -> Iterator[State]:
        """The disks that a power cut may leave now."""
        for kept in self._surviving(ordered=ordered):
            names = {folder: dict(entries) for folder, entries in self.base.items()}
            for place in kept:
                apply(self.changes[place], names)
            tree = dict(walk(names, TOP, ""))
            choices = [[(path, content) for content in self._contents(number)] for path, number in tree.items()]
            yield from (frozenset(state) for state in product(*choices))

    def _surviving(self, *, ordered: bool) -> Iterator[Sequence[int]]:
        pending = [place for place, durable in enumerate(self.durable) if not durable]
        if ordered:  # a journal: a change that is on the disk has all before it there
            last = max((place for place, durable in enumerate(self.durable) if durable), default=-1)
            yield from (range(count) for count in range(last + 1, len(self.changes) + 1))
        else:
            sure = [place for place, durable in enumerate(self.durable) if durable]
            subsets = chain.from_iterable(combinations(pending, size) for size in range(len(pending) + 1))
            yield from (sorted([*sure, *subset]) for subset in subsets)

    def _contents(self, number: int) -> list[bytes | None]:
        if number not in self.written:
            return [None]
        sure = b"".join(self.written[number][: self.synced[number]])
        rest = b"".join(self.written[number][self.synced[number] :])
        return sorted({sure, sure + rest[: len(rest) // 2], sure + rest})


def apply(change: Change, names: dict[int, dict[str, int]]) -> None:
    """Does a change to names."""
    for folder, name, number in change:
        entries = names.setdefault(folder, {})
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def walk(names: Mapping[int, Mapping[str, int]], folder: int, path: str) -> Iterator[tuple[str, int]]:
    """All that can be reached from a folder."""
    for name, number in names.get(folder, {}).items():
        yield f"{path}{name}", number
        yield from walk(names, number, f"{path}{name}/")


def after_each(
    top: Path, before: State, operations: Sequence[Operation], *, ordered: bool, only_last: bool = False
) -> Iterator[tuple[int, State]]:
    """(Operations that were done, disk) for a power cut after each of them, or after all only; none twice."""
    model, seen = Model(top, before), set[State]()
    for count in range(len(operations) + 1):
        if count:
            model.do(operations[count - 1])
        last = count == len(operations)
        if last or not only_last:
            for state in model.states(ordered=ordered):
                if last or state not in seen:  # in the end more is asked of it
                    yield count, state
                seen.add(state)


def everything(top: Path, before: State, operations: Sequence[Operation]) -> State:
    """The disk without a power cut."""
    model = Model(top, before)
    for operation in operations:
        model.do(operation)
    tree = walk(model.now, TOP, "")
    return frozenset((path, b"".join(model.written[n]) if n in model.written else None) for path, n in tree)

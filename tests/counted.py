"""How many cases of the folders of attacks and faults ran, told at the end of a run; too few of a whole folder fail it.

A renamed file, a lost parameter or a marker too many takes tests away without a word: pytest passes over what it does
not collect. Where files or tests are picked (by path, ``-k``, ``-m``, ``--lf``) nothing is expected of the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

FLOORS = {"tests/attacks": 466, "tests/faults": 225}
"""The least that a whole folder collects. Raise it as tests come; lower it only with what was taken out."""
_COLLECTED = pytest.StashKey[list[str]]()


def counted(ids: Iterable[str]) -> dict[str, int]:
    """How many of these tests stand in each of the folders."""
    every = list(ids)
    return {folder: sum(each.startswith(f"{folder}/") for each in every) for folder in FLOORS}


def whole(arguments: Sequence[str], *, root: Path, at: Path) -> list[str]:
    """The folders that these arguments of pytest's take whole."""
    given = [(at / each.partition("::")[0]).resolve() for each in arguments if "::" not in each]
    return [folder for folder in FLOORS if any((root / folder).resolve().is_relative_to(each) for each in given)]


def too_few(ids: Iterable[str], folders: Iterable[str]) -> list[str]:
    """What is missing, a line each."""
    found = counted(ids)
    return [
        f"{folder}: {found[folder]} cases collected, and {FLOORS[folder]} is the floor (tests/counted.py)"
        for folder in folders
        if found[folder] < FLOORS[folder]
    ]


def _picked(config: pytest.Config) -> bool:
    option = config.option
    usual = str(config.getini("addopts")).count("not gpu") and option.markexpr == "not gpu and not slow"
    picks = ("keyword", "deselect", "lf", "failedfirst", "last_failed", "stepwise", "ignore", "ignore_glob")
    return any(getattr(option, name, None) for name in picks) or bool(option.markexpr and not usual)


def _missing(config: pytest.Config) -> list[str]:
    ids = config.stash.get(_COLLECTED, None)
    if ids is None or _picked(config):
        return []
    folders = whole(config.args, root=config.rootpath, at=config.invocation_params.dir)
    return too_few(ids, folders)


def pytest_collection_finish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput") and session.items:
        session.config.stash[_COLLECTED] = [item.nodeid for item in session.items]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    """Of several processes each collects everything; the one that hands out the tests hears of it here."""
    node.config.stash[_COLLECTED] = list(ids)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if not hasattr(session.config, "workerinput") and exitstatus == pytest.ExitCode.OK and _missing(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ran = counted(
        report.nodeid
        for kind in ("passed", "failed")
        for report in terminalreporter.stats.get(kind, [])
        if getattr(report, "when", "") == "call"
    )
    for folder, number in ran.items():
        if number:
            terminalreporter.write_line(f"{folder}: {number} cases ran")
    for line in _missing(config):
        terminalreporter.write_line(line, red=True)

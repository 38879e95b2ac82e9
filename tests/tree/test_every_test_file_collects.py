"""No test file is silently empty, and no test stands where pytest does not look.

pytest skips a file whose name or functions do not start with ``test`` without a word. Read from the syntax trees,
so that the answer does not depend on markers or on what is installed. It also passes over whole folders by their
names, ``dist`` among them unless it is told otherwise: that is asked of pytest's own settings.
"""

from __future__ import annotations

import ast
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def collected(source: str) -> list[str]:
    """Names of the tests that pytest takes from a file: functions, and methods of Test classes, called test*."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            names.append(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            methods = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            # pytest passes over a class that has a constructor.
            if "__init__" not in methods:
                names += [f"{node.name}.{method}" for method in methods if method.startswith("test")]
    return names


def shadowed(source: str) -> list[str]:
    """Tests that a later one of the same name replaces, so that only the last runs."""
    names = collected(source)
    return sorted({name for name in names if names.count(name) > 1})


def files_pytest_reads() -> list[Path]:
    """Every Python file that pytest looks into."""
    return sorted(TESTS.rglob("test_*.py"))


@pytest.mark.parametrize("path", files_pytest_reads(), ids=lambda path: str(path.relative_to(TESTS)))
def test_the_file_collects_a_test(path: Path) -> None:
    assert collected(path.read_text("utf-8"))


@pytest.mark.parametrize("path", files_pytest_reads(), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_test_is_replaced_by_another_of_its_name(path: Path) -> None:
    assert shadowed(path.read_text("utf-8")) == []


def test_no_test_stands_in_a_file_that_pytest_passes_over() -> None:
    others = set(TESTS.rglob("*.py")) - set(files_pytest_reads())
    assert [str(path) for path in others if collected(path.read_text("utf-8"))] == []


def passed_over(patterns: Sequence[str]) -> list[str]:
    """Folders with tests in them into which pytest does not go."""
    folders = {folder for path in files_pytest_reads() for folder in path.relative_to(TESTS).parent.parts}
    return sorted(folder for folder in folders if any(fnmatch.fnmatch(folder, pattern) for pattern in patterns))


def test_pytest_goes_into_every_folder_with_tests(pytestconfig: pytest.Config) -> None:
    assert passed_over(pytestconfig.getini("norecursedirs")) == []


def test_control_a_folder_that_is_passed_over_is_seen() -> None:
    """As pytest would, left to itself."""
    assert passed_over(["*.egg", ".*", "build", "dist", "venv"]) == ["dist"]


def test_the_glob_sees_what_the_tree_holds() -> None:
    walked = [
        name for _, _, names in os.walk(TESTS) for name in names if name.startswith("test") and name.endswith(".py")
    ]
    assert len(files_pytest_reads()) == len(walked) > 1


@pytest.mark.parametrize(
    "source",
    [
        "",
        "def check_it(): pass",
        "def outer():\n    def test_inner(): pass",
        "class TestIt:\n    def __init__(self): pass\n    def test_it(self): pass",
        "class Promise:\n    def test_it(self): pass",
    ],
)
def test_control_a_file_without_tests_is_seen(source: str) -> None:
    assert collected(source) == []


def test_control_a_replaced_test_is_seen() -> None:
    assert shadowed("def test_a(): pass\ndef test_b(): pass\ndef test_a(): pass") == ["test_a"]

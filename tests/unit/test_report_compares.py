"""Promises of a report of several models: it reads its folders as ``compare`` does, compares what can be compared,
names what is missing, keeps every difference that was asked for, and overwrites nothing of an evaluation's.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from minillm.cli import comparisons
from minillm.report_files import named_folders


def test_report_and_compare_read_folders_alike(tmp_path: Path) -> None:
    (tmp_path / "k=v").mkdir()
    (tmp_path / "sft").mkdir()
    assert list(named_folders([str(tmp_path / "k=v"), f"n={tmp_path}", str(tmp_path / "sft")])) == ["k=v", "n", "sft"]
    for command in (comparisons.report, comparisons.compare):
        assert "named_folders(evaluations)" in inspect.getsource(command)


@pytest.mark.parametrize("command", [comparisons.report, comparisons.compare])
def test_an_example_of_two_lines_has_two_lines(command: object) -> None:
    """One backslash at the end of a docstring's line joins it with the next one."""
    told = inspect.getdoc(command) or ""
    example = told[told.index("Example:") :].splitlines()
    assert len(example) == 3 and example[1].endswith("\\") and max(map(len, example)) <= 80


def test_no_parameter_or_variable_hides_an_imported_module() -> None:
    tree = ast.parse(inspect.getsource(comparisons))
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert "options" in imported and not stored & imported

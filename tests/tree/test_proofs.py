"""Every test that docs/proofs.md names is there: a page that says "proved" must not outlive the proof."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")
STATEMENTS = 35


def missing(text: str) -> list[str]:
    """What a page names that is no test function of that file."""
    absent = []
    for file, name in NAMED.findall(text):
        path = ROOT / "tests" / file
        tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
        if name not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}:
            absent.append(f"{file}::{name}")
    return absent


def test_what_is_called_proved_has_its_test() -> None:
    text = (ROOT / "docs" / "proofs.md").read_text(encoding="utf-8")
    assert missing(text) == []
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(rows) == STATEMENTS
    for row in rows:
        named = [name.strip() for name in row.rstrip(" |").rsplit("|", 1)[1].split(", ")]
        assert named and all(NAMED.fullmatch(name) for name in named), row


def test_a_name_that_is_gone_is_noticed() -> None:
    assert missing("`tree/test_proofs.py::test_gone` and `exact/gone.py::test_x`") == [
        "tree/test_proofs.py::test_gone",
        "exact/gone.py::test_x",
    ]

"""A folder that lost its tests fails a run, and a picked file or test does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.counted import FLOORS, counted, too_few, whole

ROOT = Path(__file__).resolve().parents[2]


def test_a_folder_is_whole_where_it_or_one_above_it_is_named() -> None:
    def taken(*arguments: str, at: str = "") -> list[str]:
        return whole(arguments, root=ROOT, at=ROOT / at)

    assert taken("tests") == taken(".") == taken(str(ROOT)) == taken("tests/unit", "tests") == list(FLOORS)
    assert taken("tests/attacks") == taken("attacks", at="tests") == taken(".", at="tests/attacks") == ["tests/attacks"]
    assert taken("tests/attacks/test_yaml.py") == taken("tests/attacks::x") == taken("tests/unit") == []


def test_fewer_than_the_floor_are_told() -> None:
    ids = [f"tests/attacks/test_x.py::test[{n}]" for n in range(FLOORS["tests/attacks"])]
    assert too_few(ids, ["tests/attacks"]) == []
    assert f"{len(ids) - 1} cases collected" in too_few(ids[1:], ["tests/attacks"])[0]
    assert counted(ids)["tests/faults"] == 0 and len(too_few(ids, FLOORS)) == 1


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with this hook, and one attack in it."""
    folder = tmp_path / "tests" / "attacks"
    folder.mkdir(parents=True)
    (tmp_path / "conftest.py").write_text("from tests.counted import *\n", encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (folder / "test_one.py").write_text("def test_one():\n    pass\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_of_a_folder_with_too_few_fails_and_that_of_a_file_passes(workers: str, tree: Path) -> None:
    def ran(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--import-mode=importlib", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST")}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, told = ran("tests/attacks")
    assert code == 1 and "1 passed" in told and "tests/attacks: 1 cases ran" in told and "is the floor" in told, told
    picked = [("tests/attacks/test_one.py",), ("tests/attacks", "-k", "one")]
    for arguments in picked if workers == "0" else picked[:1]:
        code, told = ran(*arguments)
        assert code == 0 and "is the floor" not in told, told

"""A diagnosis on two ranks has the figures of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.dist.diagnose_worker import measure
from tests.dist.ranks import start_ranks


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every number by its path."""
    if isinstance(value, dict):
        return {name: of for key, each in value.items() for name, of in flat(each, f"{path}/{key}").items()}
    if isinstance(value, list):
        return {name: of for key, each in enumerate(value) for name, of in flat(each, f"{path}/{key}").items()}
    return {path: value}


def test_two_ranks_measure_what_one_process_does(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "teacher", "gpt2", seed=1)
    tiny.save_model(tmp_path / "student", "gpt2", seed=2)
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    printed = start_ranks("tests.dist.diagnose_worker", str(tmp_path))
    assert printed.count("Least squared error") == 1  # one rank speaks
    measure(tmp_path, "one")
    one, two = (flat(json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 60
    for name, value in one.items():
        wanted = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
        assert two[name] == wanted, name

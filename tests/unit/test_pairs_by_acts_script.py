"""Promises: the script that cuts pairs into chunks loses none, changes none, and names a line that it cannot place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pairs_by_acts.py"
ACTS = {
    "one": "events: offer(date=March 13th)",
    "two": "events: offer(date=March 13th); request(time)",
    "more": "events: offer(date=March 13th); request(time); notify_success",
}


def cut(tmp_path: Path, *lines: str) -> tuple[int, str]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(file), "--out", str(tmp_path / "out")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def pair(number: int, prompt: str) -> dict[str, Any]:
    return {"uid": f"p-{number}", "prompt": prompt, "chosen": "yes", "rejected": "nó", "teacher_logps": [-1.5, -2.0]}


def test_each_pair_is_in_the_file_of_its_number_of_acts_as_it_was(tmp_path: Path) -> None:
    rows = [pair(number, ACTS[name]) for number, name in enumerate(["two", "one", "more", "one"])]
    rows.append(pair(4, "; ".join([ACTS["more"], "inform(price=$3)"])))
    code, said = cut(tmp_path, *map(json.dumps, rows))
    assert code == 0, said
    found = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ACTS
    }
    assert found == {"one": [rows[1], rows[3]], "two": [rows[0]], "more": [rows[2], rows[4]]}
    assert "one.jsonl: 2 pairs" in said and "two.jsonl: 1 pair\n" in said


@pytest.mark.parametrize("line", ["{", "[]", '"text"', '{"chosen": "a"}', '{"prompt": 5}', '{"prompt": "how are you"}'])
def test_a_line_that_is_no_such_pair_is_named_and_nothing_is_written(line: str, tmp_path: Path) -> None:
    code, said = cut(tmp_path, json.dumps(pair(0, ACTS["one"])), line)
    assert code == 2 and "pairs.jsonl:2" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()

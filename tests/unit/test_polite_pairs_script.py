"""Promises: the script that prepares pairs of differing tone keeps each prompt in one part, counts what it drops, and
what it writes is what runs read."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from minillm.rows import read_rows

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "polite_pairs.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("polite_pairs", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PARTS", {"test": 3, "validation": 2})
    return module


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "instruction": f"Add {number}.", "input": "to 1", "output": "x", "chosen": f"It is {number}, please.",
        "rejected": f"{number}, obviously.", **changes,
    }  # fmt: skip


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_no_prompt_is_in_two_parts_and_what_is_dropped_is_counted(
    script: ModuleType, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*map(row, range(12)), row(20, rejected="It is 20, please."), row(3, chosen="Three.")]
    file = tmp_path / "pairs.json"
    if form == "list":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        file = tmp_path / "pairs.jsonl.gz"
        with gzip.open(file, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(each) + "\n" for each in rows)
    assert script.main([str(file), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "dropped, both answers are the same: 1" in said and "dropped, the prompt was met before: 1" in said
    parts = {name: rows_of(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(of) for name, of in parts.items()} == {"train": 7, "validation": 2, "test": 3}
    prompts = [each["prompt"] for of in parts.values() for each in of]
    assert len(set(prompts)) == len(prompts) and prompts[0].endswith(".\nto 1\n")
    told, _ = read_rows(str(tmp_path / "out" / "sft.jsonl"))
    assert len(told) == 14 and {each.prompt for each in told} == {each["prompt"] for each in parts["train"]}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("Grüße, obviously.")) == "Grüße, obviously."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "not JSON"),
        ("[]", "wanted a list of records"),
        (json.dumps([row(1), row(2, chosen="")]), "row 2: wanted texts"),
        (json.dumps([row(1)]), "wanted more than the 5 held out"),
    ],
)
def test_what_is_no_such_file_is_told(
    script: ModuleType, text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(text, encoding="utf-8")
    assert script.main([str(file), "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()

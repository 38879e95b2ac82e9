"""Promises: both forms of Schema-Guided Dialogue become the same three files; no prompt is in two of them; which are
validated on depends on their text alone; what is dropped is counted; what is wrong is told with exit code 2."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from minillm.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "sgd_nlg.py"
FILES = ("train", "validation", "test")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sgd_nlg", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sgd_nlg"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def few(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "VALIDATION", 3)


def pair(number: int, reply: str) -> dict[str, Any]:
    acts = f"events: offer(count={number}); request(time)"
    return {"instruction": "Say it.", "input": acts, "output": f"{number} {reply}", "topic": "events"}


def save(file: Path, rows: list[Any]) -> str:
    with gzip.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return str(file)


def prepared(folder: Path, train: list[Any], test: list[Any]) -> list[str]:
    files = [save(folder / "train.jsonl.gz", train), save(folder / "eval.jsonl.gz", test)]
    return ["--from-jsonl", *files, "--out", str(folder / "out")]


def written(folder: Path) -> dict[str, list[dict[str, Any]]]:
    lines = {name: (folder / "out" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in FILES}
    return {name: [json.loads(line) for line in of] for name, of in lines.items()}


TRAIN = [pair(n, reply) for n in range(12) for reply in ("a", "b")]
TEST = [{**pair(99, "x"), "output": ["99 x", "99 y"]}]


def test_prepared_pairs_are_parted(tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [TRAIN[3], {**pair(50, ""), "output": "  "}, {**pair(51, "c"), "input": "no acts"}, pair(99, "leaks")]
    assert script.main(prepared(tmp_path, TRAIN + broken, TEST)) == 0
    found, told = written(tmp_path), capsys.readouterr().out
    prompts = {name: {row["prompt"] for row in rows} for name, rows in found.items()}
    assert [len(prompts[name]) for name in FILES] == [9, 3, 1]
    assert sum(map(len, prompts.values())) == len(set.union(*prompts.values()))
    assert len(found["train"]) == 18 and all(isinstance(row["response"], str) for row in found["train"])
    assert all(len(row["responses"]) == 2 for row in found["validation"] + found["test"])
    assert found["test"][0]["prompt"] == "events: offer(count=99); request(time)"
    for sentence in (
        "train: rows read: 28", "train: pairs dropped, met before: 1", "train: pairs dropped, the reply is blank: 1",
        "train: pairs dropped, the prompt is not dialogue acts: 1",
        "train: pairs dropped, their prompt is in the test: 1", "validation.jsonl: 3 rows, 3 prompts, 6 replies",
    ):  # fmt: skip
        assert sentence in told
    for name in FILES:
        assert len(read_rows(str(tmp_path / "out" / f"{name}.jsonl"))[0]) == len(found[name])


def test_the_place_of_a_row_decides_nothing(tmp_path: Path, script: ModuleType) -> None:
    outcomes = []
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        rows = random.Random(turn).sample(TRAIN, len(TRAIN)) if turn else TRAIN
        assert script.main(prepared(folder, rows, TEST)) == 0
        outcomes.append({name: {row["id"] for row in rows} for name, rows in written(folder).items()})
    assert outcomes[0] == outcomes[1] == outcomes[2]
    held = sorted(row["prompt"] for row in written(tmp_path / "0")["validation"])
    first = sorted({row["input"] for row in TRAIN[:6]})
    assert held != first  # control: not the first three


def turn(acts: list[tuple[str, str, list[str]]], reply: str, *, service: str = "Events_1") -> dict[str, Any]:
    actions = [{"act": act, "slot": slot, "values": values, "canonical_values": []} for act, slot, values in acts]
    return {"speaker": "SYSTEM", "utterance": reply, "frames": [{"service": service, "actions": actions}]}


def repository(folder: Path) -> Path:
    """Twenty dialogues in the public format."""
    user = {"speaker": "USER", "utterance": "hi", "frames": []}
    made = {
        "train": [
            [user, turn([("OFFER", "date", [f"March {n}th"]), ("REQUEST", "time", [])], f"March {n}th?")]
            for n in range(1, 9)
        ],
        "dev": [[turn([("REQ_MORE", "", [])], f"Else {n}?") for n in range(9)]],
        "test": [
            [turn([("INFORM_COUNT", "count", ["3"]), ("REQUEST", "genre", ["pop", "rock"])], f"3, {how}: pop or rock?")
             for how in ("so", "well")],
            [turn([("OFFER", "date", ["today"])], "Once only: today")],
            [{**turn([("GOODBYE", "", [])], "Bye"), "frames": []}],
            [turn([("OFFER", "date", ["a; b"])], "a; b")],
        ],
    }  # fmt: skip
    for split, dialogues in made.items():
        (folder / split).mkdir(parents=True)
        lines = [{"dialogue_id": str(n), "services": [], "turns": turns} for n, turns in enumerate(dialogues)]
        (folder / split / "dialogues_001.json").write_text(json.dumps(lines), encoding="utf-8")
        (folder / split / "schema.json").write_text("[]", encoding="utf-8")
    return folder


def test_public_dialogues_become_the_same_form(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    source = repository(tmp_path / "sgd")
    assert script.main([str(source), "--out", str(tmp_path / "out")]) == 0
    found, told = written(tmp_path), capsys.readouterr().out
    assert [row["prompt"] for row in found["test"]] == ["events: inform_count(count=3); request(genre=pop, rock)"]
    assert found["test"][0]["responses"] == ["3, so: pop or rock?", "3, well: pop or rock?"]
    trained = found["train"] + found["validation"]
    assert {row["prompt"] for row in trained} == {
        "events: req_more", *(f"events: offer(date=March {n}th); request(time)" for n in range(1, 9))
    }  # fmt: skip
    replies = [reply for row in trained for reply in row.get("responses", [row.get("response")]) if "Else" in reply]
    assert len(replies) == 4  # of nine
    assert "test: turns dropped, not of one service: 1" in told
    assert "test: turns dropped, a value holds the separator of acts: 1" in told


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("nowhere", "has no train/dialogues_"),
        ("not json", "not JSON"),
        ("no list", "wanted a list of dialogues"),
        ("no actions", "lacks 'actions'"),
        ("few", "are left"),
        ("no file", "does not exist"),
        ("no row", "not JSON"),
    ],
)
def test_bad_input_is_told(
    tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str], wrong: str, why: str
) -> None:
    source = repository(tmp_path / "sgd")
    file = source / "train" / "dialogues_001.json"
    arguments = [str(source), "--out", str(tmp_path / "out")]
    if wrong == "nowhere":
        arguments[0] = str(tmp_path / "nowhere")
    elif wrong == "not json":
        file.write_text("[{", encoding="utf-8")
    elif wrong == "no list":
        file.write_text('{"turns": 1}', encoding="utf-8")
    elif wrong == "no actions":
        frames = [{"speaker": "SYSTEM", "utterance": "x", "frames": [{"service": "A_1"}]}]
        file.write_text(json.dumps([{"turns": frames}]), encoding="utf-8")
    elif wrong == "few":
        arguments = prepared(tmp_path, TRAIN[:4], TEST)
    elif wrong == "no file":
        arguments = ["--from-jsonl", "gone.jsonl", "gone.jsonl", "--out", str(tmp_path / "out")]
    else:
        (tmp_path / "a.jsonl").write_text("{\n", encoding="utf-8")
        arguments = ["--from-jsonl", *[str(tmp_path / "a.jsonl")] * 2, "--out", str(tmp_path / "out")]
    assert script.main(arguments) == 2
    said = capsys.readouterr().err
    assert why in said and "Traceback" not in said
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_the_command_itself_wants_one_source() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", "x"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "name the folder" in done.stderr and "Traceback" not in done.stderr

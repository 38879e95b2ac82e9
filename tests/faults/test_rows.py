"""Rows that are broken, empty or too long, and tokenizers that do not fit, as a run meets them: refused or counted.

Each kind of broken row by itself is in unit/test_prompts_reading.py; here all of them stand in one file.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, normalizers

from minillm import distill, evaluate, prompts, row_sources
from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError, PositionsExceeded, VocabularyMismatch
from minillm.pairs import check_pair
from minillm.rows import read_rows
from tests import tiny
from tests.unit.test_prompts_reading import BROKEN

MOST_MEMORY = 4 * row_sources.MAX_LINE_BYTES
GOOD = {"prompt": "a b c", "response": "c"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("rows")
    tiny.save_model(top / "teacher", "llama", seed=1)
    tiny.save_model(top / "student", "llama", seed=2)
    return top


def settings(models: Path, rows: Path, *, student: str = "student", **changes: Any) -> RunConfig:
    data = {"train": str(rows), "test": str(rows), "max_prompt_tokens": 8, **changes.pop("data", {})}
    decoding = {"max_new_tokens": 6, **changes.pop("decoding", {})}
    return tiny.minillm_config(
        rows.parent / "out", teacher=models / "teacher", student=models / student, prompts=rows, run_data=data,
        run_evaluation={"seeds": (1,), "bootstrap": 5}, run_decoding=decoding, **changes,
    )  # fmt: skip


def lines(file: Path, *rows: dict[str, Any] | bytes) -> Path:
    file.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return file


def test_all_kinds_of_broken_rows_are_counted_and_one_more_is_an_error(tmp_path: Path) -> None:
    """The cut line stands last, where only it can."""
    broken = [line for name, (line, _) in BROKEN.items() if name != "cut last line"]
    broken += [b'{"id": "good-0", "prompt": "again"}\n', b'{"prompt": "' + b"x" * 50_000_000 + b'"}\n']
    broken.append(BROKEN["cut last line"][0])
    good = [{"id": f"good-{n}", **GOOD} for n in range(len(broken))]
    pairs = [row for pair in zip(good, broken, strict=True) for row in pair]
    file = lines(tmp_path / "rows.jsonl", *pairs)
    tracemalloc.start()
    try:
        rows, report = read_rows(str(file), broken="skip", max_broken=len(broken))
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert [row.uid for row in rows] == [row["id"] for row in good]
    assert [skip.where for skip in report.skipped] == [f"line {2 * n + 2}" for n in range(len(broken))]
    print(f"{len(broken)} kinds of broken rows")
    with pytest.raises(DataError, match=f"this is broken row {len(broken)} and data.max_broken allows"):
        read_rows(str(file), broken="skip", max_broken=len(broken) - 1)


def test_control_without_the_bound_a_long_line_is_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sources, "MAX_LINE_BYTES", 2**30)
    file = lines(tmp_path / "rows.jsonl", b'{"prompt": "' + b"x" * 50_000_000 + b'"}\n')
    tracemalloc.start()
    try:
        assert len(read_rows(str(file))[0]) == 1
        assert tracemalloc.get_traced_memory()[1] > MOST_MEMORY
    finally:
        tracemalloc.stop()


def responses(out: Path) -> dict[str, str]:
    rows = map(json.loads, (out / "samples.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["uid"]: row["response"] for row in rows}


EMPTY = {"empty": "", "blank": " \n\t", "no-break": "\u00a0"}


@pytest.mark.parametrize("blank", EMPTY)
def test_an_empty_prompt_is_left_out_and_the_others_answer_as_without_it(
    blank: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"id": f"row-{n}", "prompt": "a b c d"[: 2 * n + 1]} for n in range(3)]
    whole = lines(tmp_path / "three.jsonl", *good)
    holed = lines(tmp_path / "four.jsonl", good[0], {"id": "hole", "prompt": EMPTY[blank]}, *good[1:])
    for file in (whole, holed):
        evaluate(models / "student", settings(models, file), out=tmp_path / file.stem)
    assert "dropped 1 blank prompt: hole" in capsys.readouterr().out
    assert responses(tmp_path / "four") == responses(tmp_path / "three")


def test_control_a_row_without_a_token_would_be_answered_and_measured(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let through, it is a row of padding alone, whose figures say nothing and count like any other's."""
    monkeypatch.setattr(prompts, "fate_of_prompt", lambda item, limits: None)
    file = lines(tmp_path / "rows.jsonl", {"id": "a", "prompt": "a"}, {"id": "hole", "prompt": ""})
    evaluate(models / "student", settings(models, file), out=tmp_path / "out")
    assert responses(tmp_path / "out").keys() == {"a", "hole"}


@pytest.mark.parametrize(("longest", "fits"), [(8, True), (9, False)])
def test_prompt_and_response_fit_the_shorter_model(longest: int, fits: bool, models: Path, tmp_path: Path) -> None:
    """40 and 8 are the 48 positions of either; with one more of prompt or response they are beyond."""
    file = lines(tmp_path / "rows.jsonl", GOOD)
    config = settings(models, file, decoding={"max_new_tokens": 40}, data={"max_prompt_tokens": longest})
    if fits:
        check_pair(config)
        return
    with pytest.raises(PositionsExceeded, match="48 positions"):
        check_pair(config)


def test_no_new_token_at_all_is_no_configuration(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        settings(models, lines(tmp_path / "rows.jsonl", GOOD), decoding={"max_new_tokens": 0})


def swapped(folder: Path) -> None:
    edit(folder, lambda vocab: {**vocab, "a": vocab["b"], "b": vocab["a"]})


def shifted(folder: Path) -> None:
    edit(folder, lambda vocab: {word: place + (place > 1) for word, place in vocab.items()} | {"new": 2})


def edit(folder: Path, change: Callable[[dict[str, int]], dict[str, int]]) -> None:
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model"]["vocab"] = change(values["model"]["vocab"])
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < 2]
    file.write_text(json.dumps(values), encoding="utf-8")


def special(name: str, token: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "tokenizer_config.json"
        values = {**json.loads(file.read_text(encoding="utf-8")), name: token}
        file.write_text(json.dumps(values), encoding="utf-8")

    return change


def normalised(folder: Path) -> None:
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.normalizer = normalizers.Replace("a", "b")
    core.save(str(folder / "tokenizer.json"))


OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "swapped": (swapped, "disagree on 2 of 28 token ids[\\s\\S]*id 2 is 'a' for the teacher and 'b'"),
    "shifted": (shifted, "disagree on 27 of 29 token ids"),
    "eos": (special("eos_token", "a"), "other special tokens[\\s\\S]*the end-of-text token"),
    "pad": (special("pad_token", tiny.EOS), "other special tokens[\\s\\S]*the pad token"),
    "normaliser": (normalised, "split text differently"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_tokenizer_is_refused_before_anything_is_made(what: str, models: Path, tmp_path: Path) -> None:
    spoil, told = OTHERS[what]
    tiny.save_model(tmp_path / "student", "llama", seed=2, rows=32)
    spoil(tmp_path / "student")
    config = settings(models, lines(tmp_path / "rows.jsonl", GOOD), student=str(tmp_path / "student"))
    with pytest.raises(VocabularyMismatch, match=told):
        distill(config)
    assert not (tmp_path / "out").exists()


TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.mark.parametrize(
    ("teacher", "student", "agree"),
    [(TEMPLATE, TEMPLATE, True), (TEMPLATE, f"a {TEMPLATE}", False), (TEMPLATE, TEMPLATE.replace(" {%", "{%"), False)],
)
def test_other_chat_templates_are_refused_where_they_are_used(
    teacher: str, student: str, agree: bool, tmp_path: Path
) -> None:
    for name, template in (("teacher", teacher), ("student", student)):
        tiny.save_model(tmp_path / name, "llama", seed=1)
        (tmp_path / name / "chat_template.jinja").write_text(template, encoding="utf-8")
    file = lines(tmp_path / "rows.jsonl", GOOD)
    check_pair(settings(tmp_path, file))  # the control: with the plain template they may be as they like
    config = settings(tmp_path, file, data={"template": "chat"})
    if agree:
        check_pair(config)
        return
    with pytest.raises(VocabularyMismatch, match="have other chat templates"):
        check_pair(config)

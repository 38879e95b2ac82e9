"""``bench padding`` counts what training computes, on the lengths that a file has."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from minillm import cli
from minillm.bench.padding import Batches, measure_batches, measure_padding
from minillm.errors import ConfigError, DataError
from tests import tiny


def run(*words: str) -> int:
    return cli._guarded(lambda **options: cli.app(["bench", "padding", *words], **options))


def rows_file(folder: Path, lengths: Sequence[tuple[int, int]], *, name: str = "rows.jsonl") -> Path:
    """Prompts and responses of so many words of four bytes, the space counted."""
    lines = [json.dumps({"prompt": "abc " * one, "response": "abc " * other}) for one, other in lengths]
    file = folder / name
    text = "\n".join(lines) + "\n"
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


def of(lengths: Sequence[int], *, size: int, micro_tokens: int) -> Batches:
    return measure_batches(lengths, size=size, micro_tokens=micro_tokens, batches=1)


def test_the_shares_are_those_counted_by_hand() -> None:
    """Rows of 6, 4, 2 and 2 tokens: 14 tokens in 4 x 6 places; in 2 x 6 and 2 x 2; in 2 lines of 8."""
    found = of([6, 4, 2, 2], size=4, micro_tokens=16)
    assert found.empty == pytest.approx({"padded": 10 / 24, "padded_cut": 2 / 16, "packed": 2 / 16})
    assert found.micro_batches == {"padded": 1.0, "padded_cut": 2.0, "packed": 1.0}
    found = of([6, 4, 2, 2], size=4, micro_tokens=15)  # a line of 8 and one of 6
    assert (found.empty["packed"], found.micro_batches["packed"]) == (0.0, 2.0)


def test_rows_of_one_length_leave_nothing_over() -> None:
    found = of([5] * 16, size=16, micro_tokens=20)
    assert set(found.empty.values()) == {0.0}
    assert found.micro_batches == {"padded": 1.0, "padded_cut": 4.0, "packed": 4.0}


def test_every_batch_counts_and_rows_are_drawn_in_epochs() -> None:
    """Ten rows of 1 and ten of 3, in batches of all: each batch holds every row once."""
    found = measure_batches([1] * 10 + [3] * 10, size=20, micro_tokens=100, batches=7)
    assert found.empty["padded"] == pytest.approx(1 - 40 / 60)


@pytest.mark.parametrize(("unit", "mean", "longest"), [("words", 6.0, 8), ("bytes", 6.0, 8)])
def test_lengths_are_prompt_response_and_the_token_that_ends_it(
    unit: str, mean: float, longest: int, tmp_path: Path
) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        file = rows_file(tmp_path, [(2, 1), (3, 4)], name=name)
        found = measure_padding(str(file), unit=unit, tokenizer="world", micro_tokens=16, batches=2)
        assert (found.rows, found.left_out, found.mean, found.longest) == (2, 0, mean, longest)


def test_rows_that_cannot_be_learnt_from_are_left_out_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a b"}, {"prompt": "a", "response": " "}, {"instruction": "a", "input": "b", "output": ["c d"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = measure_padding(str(file), unit="words", tokenizer="world", micro_tokens=16, batches=1)
    assert (found.rows, found.left_out, found.longest) == (1, 2, 5)
    file.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="a prompt and a response"):
        measure_padding(str(file), unit="words", tokenizer="world", micro_tokens=16, batches=1)


def test_tokens_are_those_of_the_model_that_is_named(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", "llama", seed=0)
    file = tiny.save_prompts(tmp_path / "rows.jsonl", rows=4)  # two to five letters, and the same again
    found = measure_padding(str(file), unit="tokens", tokenizer=str(folder), micro_tokens=64, batches=1)
    assert (found.mean, found.longest) == (8.0, 11)


def test_the_command_writes_its_section_for_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    even, uneven = rows_file(tmp_path, [(4, 4)] * 20), rows_file(tmp_path, [(1, 1), (9, 9)] * 10, name="b.jsonl")
    json_file = tmp_path / "bench.json"
    words = ["--unit", "words", "--batches", "3", "--micro-tokens", "64", "--json", str(json_file)]
    assert run(str(even), str(uneven), *words) == 0
    found = json.loads(json_file.read_text(encoding="utf-8"))["padding"]
    assert [one["rows"] for one in found["files"]] == [20, 20]
    assert [one["rows"] for one in found["files"][0]["batches"]] == [16, 64, 256]
    shares = [one["empty"]["packed"] for file in found["files"] for one in file["batches"]]
    assert found["fraction"] == max(shares) and set(shares[:3]) == {0.0} and max(shares) > 0.0
    assert (found["unit"], found["tokenizer"], found["micro_tokens"]) == ("words", None, 64)
    assert found["files"][1]["batches"][2]["micro_batches"]["packed"] > 1
    assert "words between white space" in capsys.readouterr().out


def test_without_files_it_counts_the_embedded_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--batches", "2") == 0
    out = capsys.readouterr().out
    assert "world:train" in out and "60,000" in out and "tokens of world" in out


def test_text_that_the_tokenizer_cannot_read_is_not_counted_some_other_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = rows_file(tmp_path, [(2, 1)])
    assert run(str(file)) == DataError.exit_code
    error = capsys.readouterr().err
    assert "--unit words" in error and "--tokenizer" in error and "'world'" in error
    assert run(str(file), "--unit", "letters") == ConfigError.exit_code
    assert "tokens, words, bytes" in capsys.readouterr().err

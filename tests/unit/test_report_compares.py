"""Promises of a report of several models: it reads its folders as ``compare`` does, compares what can be compared,
names what is missing, keeps every difference that was asked for, and overwrites nothing of an evaluation's.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minillm.cli import comparisons
from minillm.errors import ConfigError, DataError
from minillm.measures import OF_TEACHER, OF_TOKENS
from minillm.report import build_report, combine
from minillm.report_files import named_folders, read_results
from minillm.report_words import describe
from tests.unit.test_report import evaluation

Record = dict[str, Any]
PAIR = ("new", "old")
KEY = "new,old"


def two(place: Path, *, temperatures: Sequence[Sequence[float]] = ((1.0, 0.6),) * 2) -> dict[str, Path]:
    skills = (0.9, 0.5)
    return {
        name: evaluation(place / name, skill=skill, prompts=12, temperatures=at)
        for name, skill, at in zip(PAIR, skills, temperatures, strict=True)
    }


def told(folder: Path, **about: Any) -> None:
    """Changes what an evaluation says of itself."""
    (folder / "results.json").write_text(json.dumps(read_results(folder) | about), encoding="utf-8")


def put_together(given: dict[str, Path], *pairs: tuple[str, str]) -> Record:
    return combine(given, differences=pairs or (PAIR,), resamples=60, seed=0, seconds=None)


def words(combined: Record) -> str:
    return " ".join(describe(combined))


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
    assert "ConfigError" in imported and not stored & imported


@pytest.mark.parametrize(
    ("about", "note", "gone"),
    [
        ({"asked": {"teacher_weights": "u"}}, "different teachers", OF_TEACHER),
        ({"data": {"sha256": "x"}}, "as other tokens", OF_TOKENS),
    ],
)
def test_a_report_compares_what_compare_would(about: Record, note: str, gone: Sequence[str], tmp_path: Path) -> None:
    given = two(tmp_path)
    for folder in given.values():
        told(folder, asked={"teacher_weights": "t"})
    before = put_together(given)
    assert before["notes"] == []  # control
    told(given["old"], **about)
    found = put_together(given)
    assert note in found["notes"][0] and note in words(found)
    for at, changes in found["temperatures"].items():
        assert set(before["temperatures"][at]["differences"][KEY]) - set(changes["differences"][KEY]) == set(gone)
    assert "closer to its teacher" in words(before) and "closer to its teacher" not in words(found)


def test_a_report_knows_settings_that_came_later(tmp_path: Path) -> None:
    given = two(tmp_path)
    decoding = read_results(given["old"])["decoding"]
    told(given["old"], decoding=decoding | {"no_repeat_ngram_size": 0, "repetition_penalty": 1.0})
    assert put_together(given)["differences"][KEY]
    told(given["old"], decoding=decoding | {"repetition_penalty": 1.2})  # control
    with pytest.raises(DataError, match="repetition_penalty"):
        put_together(given)


def test_other_references_are_refused(tmp_path: Path) -> None:
    given = two(tmp_path)
    file = given["old"] / "samples.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("bob feeds the cat", "bob feeds a dog"), encoding="utf-8")
    with pytest.raises(DataError, match="another text of its references"):
        put_together(given)


@pytest.mark.parametrize("several", [False, True])
def test_a_report_does_not_overwrite_an_evaluation(several: bool, tmp_path: Path) -> None:
    given = two(tmp_path)
    if several:
        (given["old"] / "results.json").write_text('{"schema": 1, "model": {}, "sets": {"s": {}}}', encoding="utf-8")
    before = {file.name: file.read_bytes() for file in given["old"].iterdir()}
    with pytest.raises(ConfigError, match="is that of an evaluation"):
        build_report({"new": given["new"]}, out=given["old"])
    assert {file.name: file.read_bytes() for file in given["old"].iterdir()} == before
    for _ in range(2):  # the control; a report's own results may be replaced
        build_report({"new": given["new"]}, out=tmp_path)


def test_the_first_table_is_at_a_temperature_that_all_have(tmp_path: Path) -> None:
    given = two(tmp_path, temperatures=((1.0, 0.8, 0.6), (0.8, 0.6)))
    found = put_together(given)
    assert found["temperature"] == "0.8" and all(found["models"].values())
    assert found["pairs"] == {KEY: list(PAIR)} and found["differences"][KEY]["validity"]["mean"] is not None
    assert "at 0.8, the hottest temperature that all models have; only some have 1.0." in words(found)
    # Control: with 1 in both it is 1, and nothing is to be said.
    usual = put_together(two(tmp_path / "usual"))
    assert usual["temperature"] == "1.0" and "first table is at" not in words(usual)


def test_who_is_missing_is_named_and_no_difference_is_lost(tmp_path: Path) -> None:
    given = two(tmp_path, temperatures=((0.8, 0.6), (0.6,)))
    given["hot"] = evaluation(tmp_path / "hot", skill=0.7, prompts=12, temperatures=(1.0,))
    found = put_together(given)
    assert list(found["models"]) == ["new", "old", "hot"] and found["temperature"] == "1.0"
    assert "where new, old were not evaluated" in words(found)
    assert found["pairs"] == {KEY: list(PAIR)} and found["differences"] == {KEY: {}}
    assert found["temperatures"]["0.6"]["differences"][KEY]["validity"]["mean"] is not None
    assert "the difference is in the table of temperatures, at 0.6" in words(found)
    build_report(given, out=tmp_path / "out", differences=[PAIR], resamples=20)
    with pytest.raises(DataError, match=r"temperature is 0\.6 for old and 1\.0 for hot"):
        put_together(given, ("hot", "old"))


def test_two_differences_never_have_one_name(tmp_path: Path) -> None:
    folder = two(tmp_path)["new"]
    given = dict.fromkeys(("a-b", "c", "a", "b-c"), folder)
    found = put_together(given, ("a-b", "c"), ("a", "b-c"))
    assert list(found["pairs"].values()) == [["a-b", "c"], ["a", "b-c"]] and len(found["differences"]) == 2
    with pytest.raises(ConfigError, match="have one name"):
        put_together(dict.fromkeys(("a,b", "c", "a", "b,c"), folder), ("a,b", "c"), ("a", "b,c"))


def test_sharpening_is_the_best_that_a_lower_temperature_gives_and_of_a_sure_gain_only(tmp_path: Path) -> None:
    found = copy.deepcopy(put_together(two(tmp_path, temperatures=((1.0, 0.8, 0.3),) * 2)))
    found["differences"][KEY]["validity"] = {"mean": 0.1, "ci95": [0.05, 0.15]}
    found["models"]["new"]["validity"]["mean"], found["models"]["old"]["validity"]["mean"] = 0.30, 0.20
    for at, value in (("0.8", 0.205), ("0.3", 0.31)):
        found["temperatures"][at]["models"]["old"]["validity"]["mean"] = value
    assert "has validity 0.310 when sampled at 0.3 instead of 1.0, which is all of the gain" in words(found)
    found["differences"][KEY]["validity"]["ci95"] = [-0.01, 0.2]
    assert "sharpening" not in words(found) and "sampled at" not in words(found)

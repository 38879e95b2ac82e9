"""Promises: the teacher and the nearest training answer are measured once, as the cells are, made again where what they
depend on changed, and stand below the arms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import cli
from minillm.records import Row
from minillm.study import nearest as nearest_module
from minillm.study import yardsticks as yardsticks_module
from minillm.study.cells import read_cell
from minillm.study.config import StudyConfig, load_study
from minillm.study.nearest import nearest, words_of
from minillm.study.yardsticks import asked_yardsticks, at_temperature, make_yardsticks, read_yardsticks, told
from tests.unit.test_study import place, study_file

__all__ = ["place"]  # a fixture


def prompts(file: Path, rows: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"id": f"r{n}", "prompt": asked, "response": said}) for n, (asked, said) in enumerate(rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


KNOWN = [("a b c", "x"), ("a a d", "y"), ("d e", "z"), ("e d", "w")]
"""Of 4 prompts a and d are in 2 and 3, b and c in 1: weights ln 3, ln 7/3, ln 5; e is in 2."""


@pytest.fixture(scope="module")
def measured(place: Path) -> StudyConfig:
    train = prompts(place / "known.jsonl", KNOWN)
    # The same words, another order; all a; a rare word; nothing shared.
    test = prompts(place / "asked.jsonl", [("c b a", "x"), ("a a a", "q"), ("b d", "x"), ("q", "q")])
    settings = {"data.train": train, "data.test": test, "data.test_limit": None}
    study = load_study(study_file(place, name="yard", student=None, settings=settings, yardsticks=True, seeds=[3]))
    said: list[str] = []
    make_yardsticks(study, again=False, say=said.append)
    assert said == ["yardstick teacher: made", "yardstick nearest: made"]
    return study


def test_the_nearest_by_hand() -> None:
    """b d: with a b c it shares ln(5)², with a a d ln(7/3)² and with d e the same, over lengths of 2.528, 2.355, 1.388:
    1.025, 0.305, 0.517."""
    known = [asked.split() for asked, _ in KNOWN]
    assert nearest(known, [["c", "b", "a"], ["a", "a", "a"], ["b", "d"], ["q"], []]) == [0, 1, 0, None, None]
    assert nearest(known, [["e", "d"]]) == [2]  # of equally near ones the earlier
    assert nearest([], [["a"]]) == [None] and nearest([[]], [["a"]]) == [None]


def test_control_unweighted_a_common_word_would_count_as_a_rare_one(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [["the", "of", "dog"], ["cat", "bird", "fish"], *([["the", "of", word] for word in "uvwxyz"])]
    asked = [["the", "of", "cat"]]
    assert nearest(known, asked) == [1]
    monkeypatch.setattr(nearest_module.math, "log", lambda value: 1.0)
    assert nearest(known, asked) == [0]


def test_words_are_those_of_the_row_and_not_of_a_template() -> None:
    row = Row(uid="1", instruction="Add, PLEASE:", input="2+2", responses=("4",))
    assert words_of(row) == ["add", "please", "2", "2"]
    assert words_of(Row(uid="1", messages=(("user", "Hi"), ("assistant", "Yes?")))) == ["hi", "yes"]


def test_the_nearest_answers_are_judged_as_a_cells_are(measured: StudyConfig) -> None:
    """Answers x, y, x and none, to x, q, x and q."""
    stored = read_yardsticks(measured)[0]["nearest"]
    assert stored["prompts"] == {"test": 4, "train": 4, "same": 1, "without": 1}
    assert stored["measures"]["rouge_l"] == stored["measures"]["exact_match"] == 0.5
    assert stored["measures"]["mean_length"] == 0.75 and "reverse_kl" not in stored["measures"]
    assert stored["measures"]["by_length"]["0-5"]["prompts"] == 4
    assert at_temperature(stored, "0.3") == stored["measures"]


def test_the_teacher_is_measured_by_itself(measured: StudyConfig) -> None:
    stored = read_yardsticks(measured)[0]["teacher"]
    assert list(stored["temperatures"]) == ["1.0", "0.5"]  # those of the recipe
    assert stored["temperatures"]["1.0"]["reverse_kl"] == pytest.approx(0, abs=1e-4)
    assert stored["temperatures"]["1.0"]["mean_length"] > 0
    assert stored["config"]["seed"] == 3 and stored["made_from"]["teacher"]


def test_what_is_there_is_not_made_again(measured: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yardsticks_module, "_make", lambda *args, **kwargs: pytest.fail("made again"))
    make_yardsticks(measured, again=False, say=pytest.fail)
    assert read_yardsticks(measured)[1] == []


def changed(study: StudyConfig, **settings: Any) -> dict[str, list[str]]:
    """By yardstick, what is said to differ under further settings."""
    other = study.model_copy(
        update={"settings": {**study.settings, **{k.replace("__", "."): settings[k] for k in settings}}}
    )
    return {name: yardsticks_module._stored(name, wanted)[1] for name, wanted in asked_yardsticks(other).items()}


def test_what_a_yardstick_depends_on_makes_it_again_and_nothing_else(place: Path, measured: StudyConfig) -> None:
    assert changed(measured, **{"stages.0.steps": 3, "data.validation": str(place / "prompts.jsonl")}) == {
        "teacher": [], "nearest": [],
    }  # fmt: skip
    assert changed(measured, **{"data.train_limit": 3}) == {"teacher": [], "nearest": ["data.train_limit"]}
    more = prompts(place / "more_known.jsonl", KNOWN[:2])
    assert changed(measured, **{"data.train": more}) == {"teacher": [], "nearest": ["data.train", "train data"]}
    assert all(changed(measured, **{"decoding.max_new_tokens": 5}).values())
    assert all(changed(measured, **{"evaluation.seeds": [1, 2]}).values())
    assert all(changed(measured, teacher=str(place / "student")).values())
    stale = measured.model_copy(update={"seeds": (4,)})
    assert len(read_yardsticks(stale)[1]) == 2 and read_yardsticks(stale)[0] == {}


def test_a_study_that_wants_none_has_none(place: Path, measured: StudyConfig) -> None:
    plain = load_study(study_file(place, name="bare", student=None))
    assert asked_yardsticks(plain) == {} and read_yardsticks(plain) == ({}, []) and told({}) == []
    wanting = load_study(study_file(place, name="wanting", student=None, yardsticks=True))
    assert [note.endswith("not there yet") for note in read_yardsticks(wanting)[1]] == [True, True]


def test_the_command_makes_them_and_shows_them_below_the_arms(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    file = study_file(
        place, name="shown", student=None, arms={"plain": {}}, compare_with="plain", seeds=[1], yardsticks=True
    )
    monkeypatch.setattr("sys.argv", ["minillm", "study", "--config", str(file), "--json", str(place / "shown.json")])
    assert cli._guarded(cli.app) == 0
    out = capsys.readouterr().out
    assert "yardstick teacher: made" in out and "nearest answer: to each test prompt" in out
    below = out[out.index("  plain ") :]
    assert below.index("teacher  ") < below.index("nearest answer ")
    stored = json.loads((place / "shown.json").read_text(encoding="utf-8"))["yardsticks"]
    assert stored["nearest"] == read_cell(place / "shown" / "yardsticks" / "nearest.json")
    # Train and test prompts are the same file: what looks things up is right every time.
    assert stored["nearest"]["measures"]["exact_match"] == 1

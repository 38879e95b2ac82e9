"""Promises: what an evaluation cannot work with is told before a weight is read, and what is there is not touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

from minillm import evaluate
from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError, UnsupportedCombination, VocabularyMismatch
from minillm.pairs import check_pair
from tests import tiny


class Loaded(Exception):
    """Weights were about to be read."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts with and without references, and the results of one evaluation."""
    place = tmp_path_factory.mktemp("refused")
    swapped = [*tiny.WORDS[:2], *reversed(tiny.LETTERS)]
    tiny.save_model(place / "teacher", "llama", seed=1)
    tiny.save_model(place / "student", "llama", seed=2)
    tiny.save_model(place / "other", "llama", seed=3)
    tiny.save_model(place / "other-tokens", "llama", seed=1, words=swapped)
    tiny.save_prompts(place / "prompts.jsonl", rows=4)
    tiny.save_prompts(place / "bare.jsonl", rows=4, responses=False)
    (place / "empty.jsonl").write_text("", encoding="utf-8")
    (place / "blank.jsonl").write_text('{"id": "a", "prompt": " "}\n', encoding="utf-8")
    evaluate(place / "student", settings(place), out=place / "there")
    return place


def settings(place: Path, *, test: str = "prompts.jsonl", teacher: str = "teacher", **asked: Any) -> RunConfig:
    return tiny.minillm_config(
        place, teacher=place / teacher, student=place / "student", prompts=place / "prompts.jsonl",
        run_data={"train": str(place / "prompts.jsonl"), "test": str(place / test), "max_prompt_tokens": 8},
        run_evaluation={"seeds": (1,), "bootstrap": 5, **asked},
    )  # fmt: skip


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> NoReturn:
        raise Loaded

    for name in ("api.load_teacher", "results.opened", "evaluation_sets.opened"):
        monkeypatch.setattr(f"minillm.{name}", load)


def held(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"test": "empty.jsonl"}, DataError, r"empty.jsonl is empty: it holds no rows"),
    ({"test": "blank.jsonl"}, DataError, r"blank"),
    (
        {"test": "bare.jsonl", "calibration": True},
        DataError,
        r"calibration: true, and none of the 4 test prompts has a",
    ),
    ({"exposure": {"samples": 1}}, DataError, r"4 responses of each model, wanted at least 20"),
    ({"teacher": "other-tokens"}, VocabularyMismatch, r"26 of 28 token ids[\s\S]*id 2 is 'z' for the teacher and 'a'"),
    ({"teacher": "nowhere"}, ConfigError, r"nowhere"),
]


@pytest.mark.parametrize(("changed", "error", "words"), BAD, ids=[str(next(iter(case[0].values()))) for case in BAD])
def test_bad_input_is_told_before_a_weight_is_read(  # noqa: PLR0917 (pytest fills them by name)
    changed: dict[str, Any], error: type[Exception], words: str, place: Path, no_weights: None, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        evaluate(place / "student", settings(place, **changed), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_control_good_input_goes_on_to_the_weights(place: Path, no_weights: None, tmp_path: Path) -> None:
    with pytest.raises(Loaded):
        evaluate(place / "student", settings(place), out=tmp_path / "out")


def test_results_of_another_model_teacher_or_set_are_not_touched(place: Path, no_weights: None) -> None:
    before, there = held(place / "there"), place / "there"
    with pytest.raises(DataError, match=r"other results \(they differ in: model, weights\); nothing was touched"):
        evaluate(place / "other", settings(place), out=there)
    with pytest.raises(DataError, match=r"differ in: teacher, teacher_weights"):
        evaluate(place / "student", settings(place, teacher="other"), out=there)
    with pytest.raises(DataError, match=r"differ in: data"):
        evaluate(place / "student", settings(place, test="bare.jsonl"), out=there)
    assert held(there) == before and {"results.json", "samples.jsonl"} == set(before)
    assert evaluate(place / "student", settings(place), out=there)["asked"]["seed"] == 10, (
        "the same question is answered"
    )


def test_weights_that_changed_under_the_same_name_are_another_model(place: Path, no_weights: None) -> None:
    before, file = held(place / "there"), place / "student" / "model.safetensors"
    own = file.read_bytes()
    file.write_bytes((place / "other" / "model.safetensors").read_bytes())
    try:
        with pytest.raises(DataError, match=r"differ in: weights"):
            evaluate(place / "student", settings(place), out=place / "there")
    finally:
        file.write_bytes(own)
    assert held(place / "there") == before


def test_samples_that_are_nobodys_are_not_touched(place: Path, no_weights: None, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a samples\.jsonl without results\.json"):
        evaluate(place / "student", settings(place), out=tmp_path)
    assert held(tmp_path) == {"samples.jsonl": b"{}\n"}
    with pytest.raises(Loaded):
        evaluate(place / "student", settings(place), out=tmp_path, fresh=True)


def test_a_set_without_references_is_told_and_lacks_what_needs_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(place / "student", settings(place, test="bare.jsonl"), out=tmp_path)
    assert "test: no row has a reference: no ROUGE-L, no exact match" in capsys.readouterr().out
    assert not {"rouge_l", "exact_match", "gold_nll"} & set(found["measures"])
    row = json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["references"] == [] and "rouge_l" not in row["measures"]


def test_a_teachers_card_is_evaluated_whole(place: Path, tmp_path: Path) -> None:
    """Where it would be sharded to teach is nothing to an evaluation; a run's student it cannot be."""
    card = tmp_path / "sharded.yaml"
    card.write_text(f"model: {place / 'student'}\nplacement: zero3\n", encoding="utf-8")
    found = evaluate(card, settings(place), out=tmp_path / "out")
    plain = json.loads((place / "there" / "results.json").read_text(encoding="utf-8"))
    assert found["measures"] == plain["measures"]
    with pytest.raises(UnsupportedCombination, match="placement 'zero3' is a teacher's setting"):
        check_pair(settings(place).model_copy(update={"student": str(card)}))

"""Sequence-level distillation trains on what the teacher wrote, never on the gold answers; and text that is not the
teacher's is refused before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import api, distill
from minillm.config import RunConfig
from minillm.errors import ConfigError, DataError, ManifestError
from minillm.generation import generate
from minillm.references import References
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, prompts with gold answers, and the teacher's own answers to them."""
    made = tmp_path_factory.mktemp("seqkd")
    tiny.save_model(made / "teacher", "gpt2", seed=1)
    tiny.save_model(made / "other", "gpt2", seed=5)
    tiny.save_model(made / "student", "gpt2", seed=2)
    tiny.save_prompts(made / "prompts.jsonl")
    generate(made / "teacher", config(made, kind="sft"), out=made / "taught.jsonl", samples=3)
    return made


def config(place: Path, *, kind: str = "seqkd", name: str = "run", **changes: Any) -> RunConfig:
    data: dict[str, Any] = {"train": str(place / "prompts.jsonl")}
    if kind == "seqkd":
        data = {"teacher_text": str(place / "taught.jsonl")}
    data |= {"max_prompt_tokens": 8, **changes.pop("data", {})}
    values: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"), "teacher": str(place / "teacher"),
        "data": data, "decoding": {"max_new_tokens": 10}, "engine": {"student": "zero0"},
        "stages": ({"kind": kind, "steps": 3, "batch": 4, "optimiser": {"lr": 1e-2}},), **changes,
    }  # fmt: skip
    return RunConfig(**values)


def test_what_is_trained_on_is_the_teachers_and_never_gold(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    plain = References.collect

    def noted(self: References, step: int, student: Any) -> Any:
        rows, figures = plain(self, step, student)
        seen.extend((row.text, row.responses[0]) for row in rows)
        return rows, figures

    monkeypatch.setattr(References, "collect", noted)
    distill(config(place), fresh=True)
    written = [json.loads(line) for line in (place / "taught.jsonl").read_text(encoding="utf-8").splitlines()]
    gold = [json.loads(line) for line in (place / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs, answers = {(row["prompt"], row["response"]) for row in written}, {row["response"] for row in gold}
    assert len(seen) == 12
    assert set(seen) <= pairs
    assert not {response for _, response in seen} & answers
    # The control: fine-tuning on the same prompts does learn from gold.
    seen.clear()
    distill(config(place, kind="sft", name="gold"), fresh=True)
    assert {response for _, response in seen} <= answers


def test_the_teacher_is_not_loaded_to_learn_from_its_text(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(api, "load_teacher", loaded)
    assert (distill(config(place, name="light"), fresh=True) / "student").is_dir()
    with pytest.raises(AssertionError, match="the teacher was loaded"):  # the control: kd asks it at every token
        distill(config(place, kind="kd", name="heavy"), fresh=True)


def test_a_run_without_a_teacher_takes_the_manifests_word(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    distill(config(place, name="alone", teacher=None), fresh=True)
    assert f"responses of {place / 'teacher'} to" in capfd.readouterr().out


def test_training_rows_that_nobody_reads_are_told(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    distill(config(place, name="both", data={"train": str(place / "prompts.jsonl")}), fresh=True)
    assert "data.train is not read; no stage learns from it" in capfd.readouterr().out


def test_both_kinds_may_follow_each_other(place: Path) -> None:
    stages = tuple(
        {"kind": kind, "steps": 2, "batch": 4, "optimiser": {"lr": 1e-2}} for kind in ("sft", "seqkd")
    )  # fmt: skip
    folder = distill(
        config(place, name="mixed", stages=stages, data={"train": str(place / "prompts.jsonl")}), fresh=True
    )
    assert [line["stage"] for line in tiny.logged(folder)] == ["sft", "sft", "seqkd", "seqkd"]


def test_text_of_another_teacher_is_refused(place: Path) -> None:
    with pytest.raises(ManifestError, match=r"written by .*teacher with weights .*, and the run's teacher other has"):
        distill(config(place, name="wrong", teacher=str(place / "other")))
    assert not (place / "runs" / "wrong").exists()


def test_another_template_is_refused(place: Path) -> None:
    with pytest.raises(ManifestError, match=r"read with template 'plain', and data\.template is 'alpaca'"):
        distill(config(place, name="wrong", data={"template": "alpaca"}))


def test_a_file_without_a_manifest_is_refused(place: Path) -> None:
    with pytest.raises(ManifestError, match=r"prompts\.jsonl has no manifest beside it"):
        distill(config(place, name="wrong", data={"teacher_text": str(place / "prompts.jsonl")}))


def test_an_edited_file_is_refused(place: Path, tmp_path: Path) -> None:
    for name in ("taught.jsonl", "taught.jsonl.manifest.json"):
        (tmp_path / name).write_bytes((place / name).read_bytes())
    with (tmp_path / "taught.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ManifestError, match="is not the file that its manifest was written with"):
        distill(config(place, name="wrong", data={"teacher_text": str(tmp_path / "taught.jsonl")}))


@pytest.mark.parametrize("held_out", ["validation", "test", "set"])
def test_text_written_to_held_out_prompts_is_refused(
    place: Path, held_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest knows which prompts it answers, by whatever path the run calls them."""
    monkeypatch.chdir(place)
    data = {"test": {"one": "prompts.jsonl"}} if held_out == "set" else {held_out: "prompts.jsonl"}
    with pytest.raises(
        DataError, match=r"answers the prompts of data\.(validation|test|test\.one).*, which are held out"
    ):
        distill(config(place, name="leaky", data=data))
    assert not (place / "runs" / "leaky").exists()
    # The control: prompts that the run names as its training rows too are not held out.
    distill(config(place, name=f"own-{held_out}", data={"train": str(place / "prompts.jsonl"), **data}))


@pytest.mark.parametrize(
    ("changes", "told", "error"),
    [
        ({"teacher_text": None, "train": "world:train"}, "data.teacher_text is missing; a seqkd stage", ConfigError),
        ({"teacher_text": "world:train"}, "wanted a .jsonl file that 'minillm generate' wrote", ConfigError),
        ({"teacher_text": "nowhere.jsonl"}, "nowhere.jsonl: no such file", DataError),
    ],
)
def test_a_missing_file_is_told(place: Path, changes: dict[str, Any], told: str, error: Any) -> None:
    with pytest.raises(error, match=told):
        distill(config(place, name="wrong", data=changes))

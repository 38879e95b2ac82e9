"""Promises: exposure bias and calibration of an evaluation are what row-by-row forwards give; mistakes are told first.

Legend: B rows, T response positions, V vocabulary columns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm import api
from minillm.batches import prompt_batch
from minillm.calibration import Answers, calibration
from minillm.config import RunConfig
from minillm.decode import roll_out
from minillm.errors import DataError, UnsupportedCombination
from minillm.exposure import Texts, exposure_curve
from minillm.models import CausalLM, ModelReader
from minillm.records import parse_record
from minillm.types import Decoding, DrawKey, Prompt, Purpose
from tests import tiny

ROWS, SAMPLES, LONGEST, CLOSE = 12, 2, 10, 2e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extras")
    tiny.save_model(root / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(root / "student", "llama", seed=2)
    tiny.save_model(root / "positions", "gpt2", seed=3)
    tiny.save_prompts(root / "prompts.jsonl", rows=ROWS, labelled=True)
    return root


def config_of(folders: Path, *, teacher: str = "teacher", student: str = "student", **evaluation: Any) -> RunConfig:
    prompts = folders / evaluation.pop("prompts", "prompts.jsonl")
    return tiny.minillm_config(
        folders / "runs",
        teacher=folders / teacher,
        student=folders / student,
        prompts=prompts,
        run_data={"train": str(folders / "prompts.jsonl"), "test": str(prompts), "max_prompt_tokens": 8},
        run_evaluation={"seeds": (1,), "bootstrap": 50, **evaluation},
    )


def evaluated(folders: Path, out: Path, **changed: Any) -> dict[str, Any]:
    config = config_of(folders, **changed)
    return api.evaluate(config.student, config, out=out)


def logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids])).logits[0, :, : len(tiny.WORDS)].double()
    return found


def prompts_of(folders: Path) -> list[Prompt]:
    rows = [json.loads(line) for line in (folders / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    own = tiny.tokenizer()
    return [
        Prompt(
            uid=row["id"],
            text=row["prompt"],
            ids=tuple(own(row["prompt"])["input_ids"]),
            choices=tuple(row.get("choices", ())),
        )
        for row in rows
    ]


def reader_of(model: Any) -> ModelReader:
    root = CausalLM(model)
    root.head.real_ids = len(tiny.WORDS)
    return ModelReader(root.eval(), device=torch.device("cpu"), lockstep=False)


def spelled_out(folders: Path, *, seed: int, eos: tuple[int, ...], reverse: bool = False) -> dict[str, Any]:
    """The curve again: one row at a time, and both models' own forward of the whole row."""
    models = {name: AutoModelForCausalLM.from_pretrained(folders / name).eval() for name in ("student", "teacher")}
    sides = []
    for drawing in models.values():
        rows, places = [], []
        for sample in range(SAMPLES):
            for place, prompt in enumerate(prompts_of(folders)):
                rollout = roll_out(
                    prompt_batch([prompt], [sample], pad_id=0, device="cpu"),
                    student=reader_of(drawing),
                    decoding=Decoding(max_new_tokens=LONGEST),
                    key=DrawKey(seed=seed, stage="", purpose=Purpose.EXPOSURE, rollout=0),
                    eos_ids=eos,
                    pad_id=0,
                )
                said = rollout.response_BT[0, : int(rollout.length_B[0])].tolist()
                logq, logp = (
                    logits(model, [*prompt.ids, *said])[len(prompt.ids) - 1 : -1].log_softmax(-1)
                    for model in models.values()
                )
                first, second = (logq, logp) if reverse else (logp, logq)
                rows.append((first.exp() * (first - second)).sum(-1).numpy())
                places.append(place)
        width = max(map(len, rows))
        kl_BT = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        alive_BT = np.stack([np.arange(width) < len(row) for row in rows])
        sides.append(Texts(kl_BT=kl_BT, alive_BT=alive_BT, prompt_B=np.array(places)))
    return exposure_curve(*sides, prompts=ROWS, resamples=50, seed=seed)


def test_exposure_is_what_forwards_row_by_row_give(folders: Path, tmp_path: Path) -> None:
    found = evaluated(folders, tmp_path, exposure={"samples": SAMPLES})["exposure"]
    want = spelled_out(folders, seed=10, eos=(1,))
    assert (found.pop("samples"), found.pop("temperature")) == (SAMPLES, 1.0)
    assert found.keys() == want.keys() and found["alive"] == want["alive"]
    assert found["alive"]["student"][-1] < found["alive"]["student"][0] == ROWS * SAMPLES  # some have ended by then
    assert found["positions"] > 1 and found["ex_acc_err"][0] == pytest.approx(0.0, abs=1e-3)
    for name in ("student_kl", "teacher_kl", "accumulated", "expected"):
        np.testing.assert_allclose(found[name], want[name], atol=CLOSE)
    np.testing.assert_allclose(found["ex_acc_err"], want["ex_acc_err"], atol=0.01)
    np.testing.assert_allclose(np.array(found["ci95"]), np.array(want["ci95"]), atol=0.01)
    # The controls: the divergence of the other direction, and other random numbers, give another curve.
    for wrong in (spelled_out(folders, seed=10, eos=(1,), reverse=True), spelled_out(folders, seed=11, eos=(1,))):
        shared = min(len(wrong["student_kl"]), len(found["student_kl"]))
        assert abs(np.array(wrong["student_kl"][:shared]) - found["student_kl"][:shared]).max() > 100 * CLOSE


@pytest.mark.parametrize("batch", [1, 5])
def test_batches_change_neither(batch: int, folders: Path, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"exposure": {"samples": SAMPLES}, "calibration": True}
    one, other = (
        evaluated(folders, tmp_path / str(size), student="student", batch=size, **wanted) for size in (256, batch)
    )
    for name in ("student_kl", "teacher_kl"):
        np.testing.assert_allclose(one["exposure"][name], other["exposure"][name], atol=CLOSE)
    assert one["exposure"]["alive"] == other["exposure"]["alive"]
    for kind in ("references", "choices"):
        assert one["calibration"][kind]["ece"] == pytest.approx(other["calibration"][kind]["ece"], abs=CLOSE)


def test_a_model_held_against_itself_has_none(folders: Path, tmp_path: Path) -> None:
    same = evaluated(folders, tmp_path / "same", student="teacher", exposure={"samples": SAMPLES})["exposure"]
    assert same["positions"] > 1 and set(same["ex_acc_err"]) == {0.0}
    assert same["ci95"] == [[0.0, 0.0]] * same["positions"]
    # The control is the figure of another student.
    other = evaluated(folders, tmp_path / "other", exposure={"samples": SAMPLES})["exposure"]
    assert max(map(abs, other["ex_acc_err"])) > 1


def test_continuations_are_those_of_the_models_as_they_are(folders: Path, tmp_path: Path) -> None:
    """Truncation and temperature are the evaluation's and not the curve's."""
    plain = config_of(folders, exposure={"samples": SAMPLES})
    cold = plain.model_copy(update={"decoding": plain.decoding.model_copy(update={"top_k": 2, "temperature": 0.5})})
    one, other = (api.evaluate(c.student, c, out=tmp_path / n) for n, c in (("plain", plain), ("cold", cold)))
    assert one["exposure"] == other["exposure"]
    assert one["measures"] != other["measures"]  # the control


def spelled_out_references(folders: Path) -> Answers:
    model = AutoModelForCausalLM.from_pretrained(folders / "student").eval()
    response = [*tiny.tokenizer()("c d")["input_ids"], 1]
    sure, right, of = [], [], []
    for place, prompt in enumerate(prompts_of(folders)):
        q_TV = logits(model, [*prompt.ids, *response])[len(prompt.ids) - 1 : -1].softmax(-1)
        sure += q_TV.max(-1).values.tolist()
        right += [int(best) == token for best, token in zip(q_TV.argmax(-1), response, strict=True)]
        of += [place] * len(response)
    return Answers(confidence_K=np.array(sure), correct_K=np.array(right), prompt_K=np.array(of))


def spelled_out_choices(folders: Path, *, end: bool = True) -> Answers:
    model = AutoModelForCausalLM.from_pretrained(folders / "student").eval()
    sure, right, of = [], [], []
    for place, prompt in enumerate(prompts_of(folders)):
        chances = []
        for choice in prompt.choices:
            response = [*tiny.tokenizer()(choice)["input_ids"], *([1] if end else [])]
            logq_TV = logits(model, [*prompt.ids, *response])[len(prompt.ids) - 1 : -1].log_softmax(-1)
            chances.append(float(sum(logq_TV[t, token] for t, token in enumerate(response)).exp()))
        if chances:
            sure.append(max(chances) / sum(chances))
            right.append(chances.index(max(chances)) == 1)
            of.append(place)
    return Answers(confidence_K=np.array(sure), correct_K=np.array(right), prompt_K=np.array(of))


def test_calibration_is_what_forwards_row_by_row_give(folders: Path, tmp_path: Path) -> None:
    found = evaluated(folders, tmp_path, calibration=True)["calibration"]
    for kind, answers in (("references", spelled_out_references(folders)), ("choices", spelled_out_choices(folders))):
        want = calibration(answers, prompts=ROWS, resamples=50, seed=10)
        assert found[kind]["answers"] == want["answers"] == {"references": 3 * ROWS, "choices": ROWS // 3}[kind]
        for name in ("ece", "accuracy", "confidence"):
            assert found[kind][name] == pytest.approx(want[name], abs=CLOSE)
        np.testing.assert_allclose(found[kind]["ci95"], want["ci95"], atol=CLOSE)
        assert [b["answers"] for b in found[kind]["curve"]] == [b["answers"] for b in want["curve"]]
    # The control: choices weighed without their end token are weighed otherwise.
    wrong = calibration(spelled_out_choices(folders, end=False), prompts=ROWS, resamples=0, seed=10)
    assert abs(wrong["confidence"] - found["choices"]["confidence"]) > 100 * CLOSE


def test_what_was_not_asked_for_is_not_there_and_older_results_stand(folders: Path, tmp_path: Path) -> None:
    found = evaluated(folders, tmp_path)
    assert not {"exposure", "calibration"} & {*found, *found["asked"]["evaluation"], *found["asked"]}
    assert evaluated(folders, tmp_path) == found  # as stored, in the form that was stored before
    with pytest.raises(DataError, match="differ in: evaluation"):
        evaluated(folders, tmp_path, calibration=True)
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored == json.loads(json.dumps(found))


def test_other_choices_are_another_question(folders: Path, tmp_path: Path) -> None:
    evaluated(folders, tmp_path, calibration=True)
    text = (folders / "prompts.jsonl").read_text(encoding="utf-8").replace('"e f g"', '"e f h"')
    (folders / "other.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="differ in: choices"):
        evaluated(folders, tmp_path, calibration=True, prompts="other.jsonl")


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no reference": (
        {"response": None, "choices": None},
        {"calibration": True},
        "none of the 12 test prompts has a response",
    ),
    "none of them": ({"choices": ["a", "c e"]}, {"calibration": True}, "response is 'c d', wanted one of its choices"),
    "twice": ({"choices": ["c d", "c d"]}, {"calibration": True}, "at least two, each once"),
    "one": ({"choices": ["c d"]}, {"calibration": True}, "at least two, each once"),
    "too long": ({"choices": ["c d", "a " * 10]}, {"calibration": True}, "a choice has 11 tokens, wanted at most"),
    "few": ({}, {"exposure": {"samples": 1}}, "12 responses of each model, wanted at least 20"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_any_model_is_loaded(
    name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, settings, message = MISTAKES[name]
    rows = [json.loads(line) for line in (folders / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    file = folders / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row | change) + "\n" for row in rows), encoding="utf-8")
    for place in ("minillm.results.load", "minillm.stages.load"):
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("a model was loaded"))
    config = config_of(folders, prompts=file.name, **settings)
    with pytest.raises(DataError, match=message):
        api.evaluate(config.student, config, out=tmp_path)
    with pytest.raises(DataError, match=message):
        api.distill(config)


def test_exposure_without_a_teacher_is_refused(folders: Path) -> None:
    stages = ({"kind": "sft", "steps": 1, "batch": 4, "optimiser": {"lr": 1e-3}},)
    whole = config_of(folders, exposure={"samples": SAMPLES}).model_dump()
    with pytest.raises(UnsupportedCombination, match=r"evaluation\.exposure compares the student with its teacher"):
        RunConfig(**{**whole, "teacher": None, "stages": stages})


def test_choices_are_a_list_of_texts_or_left_out() -> None:
    base = {"prompt": "p", "response": "x"}
    row, left_out = parse_record({**base, "choices": ["x", "y"]}, default_uid="u")
    assert (row.choices, left_out, dict(row.extra)) == (("x", "y"), [], {})
    for other in ({"text": ["x"], "label": ["A"]}, ["x", 1], []):
        row, left_out = parse_record({**base, "choices": other}, default_uid="u")
        assert (row.choices, left_out) == ((), ["choices"])
    row, left_out = parse_record({**base, "choices": "x or y"}, default_uid="u")
    assert (row.choices, left_out, dict(row.extra)) == ((), [], {"choices": "x or y"})

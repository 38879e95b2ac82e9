"""The parts that an evaluation is held against do what it does: the same tokens, log-probs and scores."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from minillm import cli
from minillm.bench.commands_evaluate import _print_evaluate
from minillm.bench.evaluate import Work, measure_evaluate
from minillm.config import RunConfig, dump_config
from minillm.errors import ConfigError
from tests import tiny

PROMPTS, SEEDS, TEMPERATURES = 5, (1, 2), (1.0, 0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bench")
    tiny.save_model(place / "teacher", "llama", seed=1)
    tiny.save_model(place / "student", "llama", seed=2)
    tiny.save_prompts(place / "prompts.jsonl", rows=PROMPTS)
    (place / "run.yaml").write_text(dump_config(settings(place)), encoding="utf-8")
    return place


def settings(place: Path, test: Any = None) -> RunConfig:
    prompts = str(place / "prompts.jsonl")
    return tiny.minillm_config(
        place, teacher=place / "teacher", student=place / "student", prompts=place / "prompts.jsonl",
        run_data={"train": prompts, "test": test or prompts, "max_prompt_tokens": 8},
        run_evaluation={"seeds": SEEDS, "temperatures": TEMPERATURES, "bootstrap": 5, "batch_tokens": 45},
    )  # fmt: skip


@pytest.fixture(scope="module")
def work(place: Path) -> Work:
    return Work(str(place / "student"), settings(place))


def written(work: Work, ids_T: Tensor) -> str:
    return str(work.judge.tokenizer.decode(ids_T, skip_special_tokens=True)).strip()


def test_the_bare_loop_draws_the_tokens_of_the_evaluation(work: Work) -> None:
    work.decode()
    drawn = sorted(
        (decoding.temperature, sample, uid, written(work, ids_T[: int(length) - (stop != "length")]))
        for (decoding, prompts), rollout in zip(work._batches, work.rollouts, strict=True)
        for sample, uid, ids_T, length, stop in zip(
            prompts.sample_B, prompts.uid_B, rollout.response_BT, rollout.length_B, rollout.stop_B, strict=True
        )
    )
    rows = [(row["temperature"], row["seed"], row["uid"], row["response"]) for row in work.samples]
    assert drawn == sorted(rows) and len(drawn) == PROMPTS * len(SEEDS) * len(TEMPERATURES)
    assert len(work.rollouts) > len(TEMPERATURES), "several batches"


def test_the_forward_of_the_teacher_says_what_the_evaluation_says(work: Work) -> None:
    nats = -sum(float(values["logq"].double().sum()) for values in work.teacher())
    assert nats == pytest.approx(sum(row["measures"]["teacher_nll"] for row in work.samples), abs=1e-3)
    work.rollouts = [dataclasses.replace(each, response_BT=each.response_BT.flip(0)) for each in work.rollouts]
    other = -sum(float(values["logq"].double().sum()) for values in work.teacher())
    assert other != pytest.approx(nats, abs=1e-3), "the control: the texts of other rows"
    work.decode()


def test_rouge_score_gives_the_scores_of_the_evaluation(work: Work) -> None:
    assert work.rouge_score() == [row["measures"]["rouge_l"] for row in work.samples]


def test_generation_makes_the_same_rows_without_what_needs_more(work: Work) -> None:
    bare, whole = work.generation(), work.samples
    assert [row["response"] for row in bare] == [row["response"] for row in whole]
    assert {name for row in bare for name in row["measures"]} == {"repetition_3"}
    assert work.whole()["measures"]["rouge_l"]["mean"] > 0.0


def test_figures_are_whole_and_the_command_keeps_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place / "student"), "--config", str(place / "run.yaml"), "evaluation.temperatures=[1.0]"]
    words += ["--repeats", "1", "--json", str(place / "bench.json")]
    assert cli._guarded(lambda **options: cli.app(["bench", "evaluate", *words], **options)) in {0, None}
    found = json.loads((place / "bench.json").read_text(encoding="utf-8"))["evaluate"]
    figures = found["figures"]
    assert figures["responses"] == figures["pairs"] == PROMPTS * len(SEEDS) and figures["clock"] == "CPU"
    parts = sum(figures["seconds"][name]["median"] for name in ("decode", "teacher", "rouge_score"))
    assert found["whole_over_parts"] == pytest.approx(figures["seconds"]["whole"]["median"] / parts)
    assert re.search(r"generation / decode +\d", capsys.readouterr().out)


def test_without_a_teacher_its_part_is_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = settings(place).model_copy(update={"teacher": None})
    found = measure_evaluate(str(place / "student"), alone, repeats=1, thread_count=1)
    assert "teacher" not in found.seconds and found.whole_over_parts.median > 0
    _print_evaluate(found)
    assert "whole / (decode + rouge)" in capsys.readouterr().out


@pytest.mark.parametrize("test", [None, {"a": "a.jsonl", "b": "b.jsonl"}])
def test_anything_but_one_set_is_refused(test: Any, place: Path) -> None:
    config = settings(place)
    config = config.model_copy(update={"data": config.data.model_copy(update={"test": test})})
    with pytest.raises(ConfigError, match=r"data\.test: wanted one set"):
        measure_evaluate(str(place / "student"), config, repeats=1, thread_count=1)

"""Promises: how an evaluation is cut into batches decides memory and speed, and nothing that is written.

1. Whatever the budget in tokens, each prompt, seed and temperature has the same response and the same measures, those
   that are made from the models' numbers to rounding.
2. No batch holds more than the budget, prompts padded and with all that may be written, but for a row that does alone.
3. Results made under one budget answer the question under any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm import decode, evaluate, evaluation
from minillm.config import RunConfig
from minillm.types import DrawKey
from tests import tiny

PROMPTS, SEEDS, TEMPERATURES, NEW = 7, (10, 20), (1.0, 0.7), 10
BUDGETS = (1, 30, 61, 100)
"""Tokens: a row at a time, two, four, six or more. A row has a prompt of 2 to 5 tokens, and may have ``NEW`` more."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    tiny.save_model(folder / "teacher", "llama", seed=1)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    return folder


def settings(folder: Path, **changed: Any) -> RunConfig:
    prompts = str(folder / "prompts.jsonl")
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl",
        run_data={"train": prompts, "test": prompts, "test_limit": PROMPTS, "max_prompt_tokens": 8},
        run_decoding={"max_new_tokens": NEW},
        run_evaluation={"seeds": SEEDS, "temperatures": TEMPERATURES, "bootstrap": 20, **changed},
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    """Everything in one batch."""
    evaluate(folder / "student", settings(folder), out=folder / "whole")
    return rows(folder / "whole")


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_changes_no_response_and_no_measure(
    budget: int, folder: Path, whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = evaluation.roll_out, list[list[int]]()

    def counting(batch: Any, **options: Any) -> Any:
        held.append([batch.ids_BP.shape[1] + NEW] * batch.ids_BP.shape[0])
        return real(batch, **options)

    monkeypatch.setattr(evaluation, "roll_out", counting)
    evaluate(folder / "student", settings(folder, batch_tokens=budget), out=tmp_path)
    assert all(sum(batch) <= budget or len(batch) == 1 for batch in held)
    assert sum(map(len, held)) == len(whole) and len(held) > len(TEMPERATURES)
    for one, other in zip(rows(tmp_path), whole, strict=True):
        for name in tiny.NATS:
            assert one["measures"].pop(name) == pytest.approx(other["measures"][name], abs=1e-4), name
        assert one == {**other, "measures": {k: v for k, v in other["measures"].items() if k not in tiny.NATS}}


def test_control_random_numbers_by_place_in_the_batch_would_change_the_text(
    folder: Path, whole: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_place(key: DrawKey, uids: tuple[str, ...], samples: tuple[int, ...], **options: Any) -> torch.Tensor:
        named = tuple(str(place) for place in range(len(uids)))
        return real(key, named, (0,) * len(uids), **options)

    real = decode.row_keys
    monkeypatch.setattr(decode, "row_keys", by_place)
    found = []
    for budget in BUDGETS[1:]:
        evaluate(folder / "student", settings(folder, batch_tokens=budget), out=tmp_path / str(budget))
        found.append([row["response"] for row in rows(tmp_path / str(budget))])
    assert found[0] != found[1] != found[2]


def test_results_answer_for_every_budget(folder: Path, whole: list[dict[str, Any]], capsys: Any) -> None:
    before = (folder / "whole" / "samples.jsonl").stat().st_mtime_ns
    evaluate(folder / "student", settings(folder, batch_tokens=77, batch=3), out=folder / "whole")
    assert "evaluated already" in capsys.readouterr().out
    assert (folder / "whole" / "samples.jsonl").stat().st_mtime_ns == before

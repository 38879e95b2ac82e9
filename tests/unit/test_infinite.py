"""Promises: a token that a model forbids ends no evaluation. All infinite figures are treated alike: null in the row,
no mean over the others, counted by temperature and measure, and told.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.errors import NonFinite
from minillm.evaluation import _divergences
from minillm.measures import MAY_BE_INFINITE, infinite_rows, infinite_words, ratios_of, summarise
from minillm.report import combine
from minillm.report_words import describe
from minillm.scoring import score, token_statistics
from tests.unit.test_measures import row, teacher
from tests.unit.test_report import evaluation
from tests.unit.test_scoring import Case, OwnHead, a_rollout

OF_THE_TEACHER = {"reverse_kl": math.inf, "logp": -math.inf}
"""What a token has that the teacher forbids and the student drew."""


class Broken:
    """A student whose last scored token has these values."""

    def __init__(self, case: Case, values: dict[str, float]) -> None:
        self.case, self.values = case, values

    def statistics(self, hidden_NH: Tensor, **arguments: Any) -> dict[str, Tensor]:
        found = token_statistics(hidden_NH, head=self.case.head, **arguments)
        for name, value in self.values.items():
            found[name][-1] = value
        return found


def scored(values: dict[str, float], **options: Any) -> Any:
    case = Case()
    return score(
        a_rollout(), student=Broken(case, values), teacher_head=case.teacher.head, temperature=1.0, forward_kl=True,
        **options,
    )  # fmt: skip


def test_training_refuses_what_an_evaluation_lets_through() -> None:
    with pytest.raises(NonFinite, match="no update was made"):
        scored(OF_THE_TEACHER)
    found = scored(OF_THE_TEACHER, infinite=True)
    assert float(found.reverse_kl_BT[1, 2]) == math.inf and bool(found.reverse_kl_BT[0].isfinite().all())


@pytest.mark.parametrize("name", ["logq", "logp", "entropy", "reverse_kl", "forward_kl"])
def test_nan_is_refused_always(name: str) -> None:
    with pytest.raises(NonFinite, match=f"{name} is nan"):
        scored({name: math.nan}, infinite=True)


def test_all_of_the_teachers_figures_are_treated_alike() -> None:
    found = scored(OF_THE_TEACHER | {"forward_kl": math.inf}, infinite=True)
    whole, own = _divergences(found, rows=2)
    assert {name for name, value in own.items() if value is None} == {"reverse_kl", "forward_kl", "teacher_nll"}
    assert own["kl_tokens"] == 3 and None not in whole.values()  # control: the other row
    json.dumps(own, allow_nan=False)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "teacher_nll", "gold_nll"])
def test_an_infinity_is_no_mean_and_is_counted(name: str) -> None:
    own = {**teacher(1.0, 2), "forward_kl": 1.0, "teacher_nll": 3.0, "gold_nll": 1.0, "gold_tokens": 2}
    rows = [row(uid, seed=seed, **own) for uid in "abc" for seed in (10, 20)]
    assert infinite_rows(rows) == {} and set(MAY_BE_INFINITE) <= set(ratios_of(rows))  # control
    for each in rows[:2]:
        each["measures"] = each["measures"] | {name: None}
    gone = {"reverse_kl", "reverse_kl_per_token"} if name == "reverse_kl" else {name}
    assert infinite_rows(rows) == {"1.0": dict.fromkeys(sorted(gone), 2)}
    measures, _ = summarise(rows, temperatures=(1.0,), resamples=5, seed=0)
    assert set(MAY_BE_INFINITE) - set(measures) == gone


def test_a_report_tells_them(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "m", skill=0.7, prompts=4)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    infinite = {"1.0": {"reverse_kl": 3}, "0.6": {"gold_nll": 1}}

    def words() -> str:
        return " ".join(describe(combine({"m": folder}, differences=[], resamples=5, seed=0, seconds=None)))

    assert "infinite" not in words()  # control
    (folder / "results.json").write_text(json.dumps(results | {"infinite": infinite}), encoding="utf-8")
    assert f"m: {infinite_words(infinite)}." in words()
    assert "reverse KL in 3 at temperature 1.0; reference NLL in 1 at temperature 0.6" in infinite_words(infinite)


def test_a_finite_rollout_is_scored_as_before() -> None:
    case = Case()
    options: dict[str, Any] = {"teacher_head": case.teacher.head, "temperature": 1.0, "forward_kl": True}
    one, other = (score(a_rollout(), student=OwnHead(case.head), infinite=each, **options) for each in (False, True))
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(other, field.name))

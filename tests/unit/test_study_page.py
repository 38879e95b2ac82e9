"""Promises: a study's page has every figure of its tables, escaped, and says what is not there; in files with pictures
it is looked at in a browser (``test_pages_in_a_browser``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from minillm import cli
from minillm.errors import ConfigError
from minillm.study.command import gather, run, study_page
from minillm.study.config import BudgetConfig, StudyConfig
from minillm.study.table import summary, words
from tests.study_cells import cell, study
from tests.unit.test_study import place, study_file

__all__ = ["place"]  # a fixture
SEARCH = {"setting": "stages.0.optimiser.lr", "values": [1e-3, 1e-2], "metric": "validity", "seed": 0}


def figures(shift: float) -> dict[str, dict[str, float]]:
    """By temperature: the colder, the better and the less varied."""
    return {
        key: {"validity": 0.6 + shift + cold, "rouge_l": 0.7, "reverse_kl": 3 - 4 * shift, "distinct_4": 0.5 - cold / 2,
              "mean_length": 12.5}
        for key, cold in (("1.0", 0.0), ("0.6", 0.1))
    }  # fmt: skip


def made(long: str, hostile: str) -> tuple[StudyConfig, dict[str, dict[int, Any]]]:
    """Three seeds of four arms, one with a long name, one that failed, one that never began; more arms than colours."""
    lines = [{"tokens": 20_000.0 * n, "validity": 0.1 * n, "loss": 2.0 - 0.1 * n} for n in range(1, 7)]
    own = {
        arm: {
            seed: cell(figures(shift + wide * seed), validations=lines, alarms={"reverse_kl": 3}) for seed in (1, 2, 3)
        }
        for arm, shift, wide in (("base", 0.0, 0.01), ("better", 0.05, 0.011), (long, 0.001, 0.002))
    }
    broken = cell({}, state="failed")
    extra = {f"arm_{n}": {seed: cell(figures(0.001 * n)) for seed in (1, 2)} for n in range(8)}
    cells = {**own, "broken": {1: {**broken, "reason": f"NonFinite: {hostile}"}}, "absent": {}, **extra}
    return study(list(cells), compare_with="base", seeds=(1, 2, 3)), cells


def study_text(long: str = "long", hostile: str = "<b>") -> str:
    """The page of it."""
    chosen, cells = made(long, hostile)
    yardsticks = {
        "teacher": {"temperatures": figures(0.2)},
        "nearest": {"measures": {"validity": 0.3}, "prompts": {"test": 4, "train": 9, "same": 1, "without": 0}},
    }
    tuning = {
        "base": {
            "settings": {"stages.0.steps": 9, SEARCH["setting"]: 1e-2}, "asked": {"search": SEARCH},
            "tries": [{"value": 1e-3, "validity": 0.4}, {"value": 1e-2, "validity": 0.456}],
        },
        "better": {
            "settings": {"stages.0.steps": 8}, "asked": {"search": {**SEARCH, "values": [1e-2]}},
            "tries": [{"value": 1e-2, "validity": None}],
        },
    }  # fmt: skip
    found = {**gather(chosen, cells, diversity="distinct_4", yardsticks=yardsticks), "tuning": tuning}
    return study_page(chosen, found, cells, against="tokens", notes=[f"a note {hostile}"])


def test_the_page_has_what_the_tables_have() -> None:
    text = study_text()
    plain = re.sub(r"<[^>]+>", " ", text)
    for part in (
        "In words", "Temperature 1.0", "Differences from base", "At several temperatures", "At equal distinct-4",
        "By length of the reference", "While training", "Budgets, failed cells, alarms", "What tuning found",
        "How it was made",
    ):  # fmt: skip
        assert f"<h2>{part}</h2>" in text, part
    assert "better has the best mean" in plain and "also after correction: better" in plain
    assert "+0.052**" in text and "corrected" in plain
    assert "nearest answer" in plain and "0.800" in plain  # the teacher's
    assert "alarms rang in base: reverse_kl (3 of 3 seeds)" in plain
    assert "0.01 at the edge" in plain and '<td class="picked">0.456</td>' in text and "failed" in plain


def test_arms_that_missed_the_budget_are_told() -> None:
    chosen = study(["a", "b", "c", "none"], compare_with="a", seeds=(1, 2))
    # The first stage's tokens are beside the budget, which is the last one's.
    staged = {"tokens": 9999, "updates": 99, "last_stage": {"tokens": 1049, "updates": 3}}
    trainings = {"a": [{"tokens": 1100}, {"tokens": 1200}], "b": [{"tokens": 930}], "c": [staged], "none": []}
    cells = {
        arm: {seed: cell({"1.0": {}}, **training) for seed, training in enumerate(of, start=1)}
        for arm, of in trainings.items()
    }

    def told(**budget: Any) -> list[str]:
        return words(summary(chosen.model_copy(update={"budget": BudgetConfig(**budget)}), cells))

    assert told(unit="tokens", amount=1000) == ["not at the budget of 1,000 tokens: a +15 %, b -7 %"]
    assert told(unit="updates", amount=10) == ["not at the budget of 10 updates: c -70 %"]
    assert told(unit="seconds", amount=9) == [], "cells do not tell seconds"
    assert words(summary(chosen, cells)) == []


def test_what_a_cell_says_is_escaped() -> None:
    text = study_text(hostile="<script>alert(1)</script>")
    assert "<script" not in text and text.count("&lt;script&gt;") == 2  # the note and the reason


def test_an_arm_that_is_only_sharper_has_nothing_at_equal_diversity() -> None:
    """The line of the table of equal diversity; at equal temperature it is 0.05 better."""
    cells = {
        "base": {seed: cell(figures(0.0)) for seed in (1, 2)},
        "sharp": {seed: cell({"1.0": {"validity": 0.65, "distinct_4": 0.475}}) for seed in (1, 2)},
    }
    chosen = study(list(cells), compare_with="base", seeds=(1, 2))
    found = gather(chosen, cells, diversity="distinct_4", yardsticks={})
    assert found["equal_diversity"]["arms"]["sharp"]["differences"]["validity"]["mean"] == pytest.approx(0)
    text = study_page(chosen, found, cells, against="tokens", notes=[])
    part = text[text.index("<h2>At equal distinct-4</h2>") :]
    assert part.index("0.80</td><td>0.000") > 0 and "+0.050" in text


def test_where_nothing_is_done_the_page_says_so() -> None:
    chosen = study(["a", "b"], compare_with="a", seeds=(1,))
    found = gather(chosen, {"a": {}, "b": {}}, diversity="distinct_4", yardsticks={})
    text = study_page(chosen, found, {"a": {}, "b": {}}, against="tokens", notes=[])
    assert "No cell is done." in text and "No cell failed, and no alarm rang." in text and "<table" not in text


def test_one_seed_and_one_arm_have_no_interval_and_still_a_page() -> None:
    cells = {"a": {1: cell({"1.0": {"validity": 0.5}})}}
    chosen = study(["a"], compare_with="a", seeds=(1,))
    found = gather(chosen, cells, diversity="distinct_4", yardsticks={})
    text = study_page(chosen, found, cells, against="tokens", notes=[])
    assert "0.500" in text and "Differences from" not in text


def test_the_command_writes_it(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any cell is there; and a file that cannot be is told first."""
    file = study_file(place, name="paged", student=None)
    out = place / "paged.html"
    argv = ["minillm", "study", "--config", str(file), "--show", "--html", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    assert cli._guarded(cli.app) == 0
    assert f"written: {out}" in capsys.readouterr().out and "No cell is done." in out.read_text(encoding="utf-8")
    options: dict[str, Any] = {
        "arms": None, "seeds": None, "show": True, "again": False, "json_file": None, "plot": None, "curves": None,
        "against": "tokens",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"--html .*paged.htm: wanted a file ending in .html"):
        run(file, html=place / "paged.htm", **options)
    with pytest.raises(ConfigError, match="name two files"):
        run(file, html=out, **{**options, "json_file": out})

"""Promises: a report shows the exposure bias and calibration that evaluations measured, and nothing where none did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm import plots
from minillm.calibration import Answers, calibration
from minillm.exposure import Texts, exposure_curve
from minillm.report import combine, write_report
from minillm.report_extras import chapters
from tests.unit.test_report import Tags, evaluation

pytestmark = pytest.mark.pictures


def exposed(*, bias: float, length: int = 6, prompts: int = 12) -> dict[str, Any]:
    noise = np.random.default_rng(0)

    def side(growth: float) -> Texts:
        rows = 3 * prompts
        kl_BT = 0.1 + 0.02 * noise.random((rows, length)) + growth * np.arange(length)
        alive_BT = np.arange(length) < noise.integers(1, 2 * length, size=rows)[:, None]
        return Texts(kl_BT=kl_BT, alive_BT=alive_BT, prompt_B=np.arange(rows) % prompts)

    found = exposure_curve(side(bias), side(0.0), prompts=prompts, resamples=60, seed=0, least_alive=5)
    return {"samples": 3, "temperature": 1.0, **found}


def sure(*, skill: float, answers: int = 300) -> dict[str, Any]:
    noise = np.random.default_rng(1)
    confidence_K = noise.random(answers)
    correct_K = noise.random(answers) < skill * confidence_K
    given = Answers(confidence_K=confidence_K, correct_K=correct_K, prompt_K=noise.integers(12, size=answers))
    return calibration(given, prompts=12, resamples=60, seed=0)


def folder(path: Path, *, teacher: str = "teachers/big", **extras: Any) -> Path:
    evaluation(path, skill=0.7, prompts=4, temperatures=(1.0,))
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    results |= {"teacher": {"name": teacher}, **extras}
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return path


def written(tmp_path: Path, **folders: Path) -> str:
    combined = combine(folders, differences=[], resamples=5, seed=0, seconds=None)
    out = write_report(combined, evaluations=folders, training={}, out=tmp_path / "r.html", title="r", settings={})
    return out.read_text(encoding="utf-8")


def test_both_are_drawn_with_their_figures(tmp_path: Path) -> None:
    calibrations = {
        name: {"references": sure(skill=skill), "choices": sure(skill=skill)}
        for name, skill in (("a", 0.9), ("b", 0.5))
    }
    exposures = {"a": exposed(bias=0.02), "b": exposed(bias=0.0)}
    text = written(
        tmp_path,
        **{name: folder(tmp_path / name, exposure=exposures[name], calibration=calibrations[name]) for name in "ab"},
    )
    tags = Tags(text)
    assert len(set(tags.ids)) == len(tags.ids)
    for title in ("ExAccErr against big", "Reliability, tokens of the references", "Reliability, labelled choices"):
        assert text.count(f">{title}</title>") == 1
    for name in "ab":
        assert f"{calibrations[name]['references']['ece']:.3f}" in text
        assert f"{abs(exposures[name]['ex_acc_err'][-1]):.1f}" in text
    assert "nan" not in text
    assert "student_kl" not in text  # the long lists stay in results.json


def test_nothing_measured_nothing_shown(tmp_path: Path) -> None:
    text = written(tmp_path, a=folder(tmp_path / "a"))
    assert "ExAccErr" not in text and "Reliability" not in text and "Exposure bias" not in text
    combined = combine({"a": tmp_path / "a"}, differences=[], resamples=5, seed=0, seconds=None)
    assert chapters(combined["evaluations"], {"a": 0}) == []


def test_gaps_empty_curves_and_missing_intervals_are_borne(tmp_path: Path) -> None:
    gaps = exposed(bias=0.02)
    gaps["ex_acc_err"][2], gaps["ci95"][2] = None, None
    gaps["ex_acc_err"][-1], gaps["ci95"][-1] = None, None
    empty = exposed(bias=0.0) | {"positions": 0, "ex_acc_err": [], "ci95": [], "alive": {"student": [], "teacher": []}}
    alone = sure(skill=0.8)
    alone |= {"ci95": None, "curve": [{**part, "ci95": None} for part in alone["curve"]]}
    text = written(
        tmp_path,
        gaps=folder(tmp_path / "gaps", exposure=gaps, calibration={"references": alone}),
        empty=folder(tmp_path / "empty", exposure=empty),
    )
    Tags(text)
    assert ">Reliability, tokens of the references</title>" in text and "labelled choices" not in text


def test_a_teacher_with_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    bad = "x</title><script>alert(1)</script>\x1b[31m"
    text = written(tmp_path, a=folder(tmp_path / "a", teacher=bad, exposure=exposed(bias=0.1)))
    assert "<script" not in text and "\x1b" not in text
    Tags(text)


@pytest.mark.parametrize(
    ("teacher", "wanted"),
    [
        ("gpt2", "gpt2"),
        ("runs/a/teacher/student", "teacher"),
        ("student", "student"),
        ("o/" + "n" * 30, "n" * 23 + "…"),
    ],
)
def test_a_drawing_names_the_teacher_shortly(teacher: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(plots, "lines", lambda series, *, title, **_: titles.append(title) or "drawn")
    found = chapters({"a": {"exposure": exposed(bias=0.1), "teacher": {"name": teacher}}}, {"a": 0})
    assert titles == [f"ExAccErr against {wanted}"] and found[0].rows[0][1] == teacher


def test_long_curves_are_thinned_and_end_where_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = exposed(bias=0.02, length=200)
    drawn: list[plots.Series] = []
    monkeypatch.setattr(plots, "POINTS_AT_MOST", 20)
    monkeypatch.setattr(plots, "lines", lambda series, **_: drawn.extend(series) or "drawn")
    chapters({"a": {"exposure": found}}, {"a": 0})
    assert 10 <= len(drawn[0].x) <= 20 and drawn[0].x[-1] == found["positions"]
    assert drawn[0].y[-1] == found["ex_acc_err"][-1] and drawn[0].band

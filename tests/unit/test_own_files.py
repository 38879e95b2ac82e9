"""Promises: what --json, --plot, --curves and --html name is written over only where it is that command's own earlier
file; the same command again is no trouble; and nothing is begun where it could not be written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minillm import cli
from minillm.compare.command import own_json as compare_json
from minillm.errors import DataError
from minillm.judge.command import own_json as judge_json
from minillm.judge.likelihood_command import FIELDS
from minillm.own_files import OwnFile, generator, json_file, page_file
from minillm.plots import FILE_ENDINGS, drawing_file, drawn
from minillm.report_parts import frame
from minillm.study.command import CURVES, PAGE, PLOT
from minillm.study.command import own_json as study_json
from tests.unit.test_report import evaluation
from tests.unit.test_study import place, study_file

__all__ = ["place"]  # a fixture
MINE = "minillm tested --plot"
RECORDS: dict[str, tuple[Callable[[Path], OwnFile], list[dict[str, Any]]]] = {
    "compare": (
        compare_json,
        [
            {"schema": 1, "names": [], "options": {}, "comparisons": [], "corrected": {}, "evaluations": {}},
            {"schema": 1, "sets": {"a": {"comparisons": []}}, "notes": []},
        ],
    ),
    "judge": (
        lambda file: judge_json(file, out=file.parent / "judged"),
        [{"schema": 1, "mode": "single", "asked": {}, "endpoint": {}, "cost": {}, "unanswered": {}}],
    ),
    "win-rate": (
        lambda file: judge_json(file, out=file.parent / "judged", fields=FIELDS),
        [{"schema": 1, "mode": "pairwise", "asked": {}, "judge": {}, "win_rate": {}, "unanswered": {}}],
    ),
    "study": (study_json, [{"study": "s", "compare_with": "a", "arms": {"a": {"done": [], "temperatures": {}}}}]),
}
STRANGERS: dict[str, bytes] = {
    "nothing": b"",
    "notes": b"my notes",
    "list": b"[]",
    "object": b"{}",
    "bytes": bytes(range(256)),
    "half": b'{"schema": 1, "names": [',
    "deep": b"[" * 100_000,
    "results of an evaluation": json.dumps({"schema": 1, "measures": {}, "temperatures": {}, "model": {}}).encode(),
    "results of a report": json.dumps({"schema": 1, "sets": {"a": {"models": {}}}, "seconds": {}}).encode(),
    "a cell": json.dumps({"schema": 1, "arm": "a", "seed": 1, "state": "done", "temperatures": {}}).encode(),
    "a study's settings": json.dumps({"name": "s", "compare_with": "a", "arms": {"a": {}}}).encode(),
    "arms of another shape": json.dumps({"study": "s", "compare_with": "a", "arms": ["a"]}).encode(),
    "a self-test": json.dumps({"passed": 1, "failed": 0, "versions": {}, "checks": []}).encode(),
}


def figure() -> Any:
    from matplotlib.figure import Figure

    made = Figure(figsize=(1, 1))
    made.subplots().set_title(f"{MINE} Creator Software")
    return made


@pytest.mark.parametrize("name", list(RECORDS))
def test_figures_take_the_place_of_their_own_kind_alone(tmp_path: Path, name: str) -> None:
    """Every other kind of file is a stranger: the controls are the command's own records, which are taken."""
    own, records = RECORDS[name]
    others = {f"of {other}": json.dumps(each[0]).encode() for other, (_, each) in RECORDS.items() if other != name}
    for stranger, content in {**STRANGERS, **others}.items():
        file = tmp_path / "x.json"
        file.write_bytes(content)
        for attempt in (own(file).require, lambda there=file: own(there).write(b"{}")):
            with pytest.raises(DataError, match="is there, and not"):
                attempt()
        assert file.read_bytes() == content, stranger
    for record in records:
        file.write_text(json.dumps(record), encoding="utf-8")
        own(file).require()
        own(file).write(b"{}")
        assert file.read_bytes() == b"{}"
    own(tmp_path / "new.json").require()
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"], "looking leaves nothing behind"


@pytest.mark.parametrize("kind", FILE_ENDINGS)
def test_a_drawing_takes_the_place_of_its_own_kind_alone(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"x{kind}"
    plain = tmp_path / f"plain{kind}"
    figure().savefig(plain)
    other = drawn(figure(), kind, made_by="minillm tested --plots")
    for content in (plain.read_bytes(), other, MINE.encode(), b"%PDF" + MINE.encode(), *STRANGERS.values()):
        file.write_bytes(content)
        with pytest.raises(DataError, match="is there, and not a drawing by"):
            drawing_file(file, made_by=MINE).write(b"")
        assert file.read_bytes() == content
    for _ in range(2):
        file.write_bytes(drawn(figure(), kind, made_by=MINE))
        drawing_file(file, made_by=MINE).write(drawn(figure(), kind, made_by=MINE))
    assert file.stat().st_size > 500


def test_a_page_takes_the_place_of_its_own_kind_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.html"
    mark = generator("minillm tested")
    for text in (frame("t", mark), frame("t", "", made_by="minillm other"), f"<title>t</title>{mark}", "mine"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="is there, and not a page by `minillm tested`"):
            page_file(file, made_by="minillm tested").write(b"")
        assert file.read_text(encoding="utf-8") == text
    file.write_text(frame("t", "old", made_by="minillm tested"), encoding="utf-8")
    page_file(file, made_by="minillm tested").write(b"new")
    assert file.read_bytes() == b"new"


def test_links_and_pipes_are_somebody_s(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "notes", tmp_path / "link.json", tmp_path / "pipe.json"
    link.symlink_to(target)
    os.mkfifo(pipe)
    for file in (link, pipe):
        with pytest.raises(DataError, match="is there, and not"):
            json_file(file, what="x", fits=lambda _: True).write(b"{}")
    assert link.is_symlink() and not target.exists() and pipe.is_fifo()
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="is there, and not"):
        compare_json(link).write(b"{}")
    assert target.read_text(encoding="utf-8") == "mine"


def test_what_comes_in_the_meantime_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    own = compare_json(file)
    own.require()
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(DataError):
        own.write(b"{}")
    assert file.read_text(encoding="utf-8") == "mine"


def run(*words: str) -> int:
    return cli._guarded(lambda **options: cli.app(list(words), **options))


def test_compare_refuses_before_it_compares_and_runs_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(evaluation(tmp_path / name, skill=0.7, prompts=4)) for name in "ab"]
    out = tmp_path / "c.json"
    words = ("compare", *folders, "--resamples", "100", "--json")
    for _ in range(2):
        assert run(*words, str(out)) == 0
        assert "comparisons" in json.loads(out.read_text(encoding="utf-8"))
    capsys.readouterr()
    monkeypatch.setattr("minillm.compare.command.summary", lambda *_: pytest.fail("it compared"))
    results = tmp_path / "a" / "results.json"
    held = results.read_bytes()
    assert run(*words, str(results)) == 2
    assert "not the figures of a comparison" in capsys.readouterr().err and results.read_bytes() == held


def test_a_judging_s_own_results_are_not_its_copy(tmp_path: Path) -> None:
    """judge.json beside its judgements is what --out and --fresh are about; so is all that will be written there."""
    file, out = tmp_path / "judge.json", tmp_path / "judged"
    file.write_text(json.dumps(RECORDS["judge"][1][0]), encoding="utf-8")
    judge_json(file, out=out).require()
    (tmp_path / "judgements.jsonl").write_text("", encoding="utf-8")
    out.mkdir()
    for name in (file, out / "judge.json", out / "judgements.jsonl", out / "cache.jsonl"):
        with pytest.raises(DataError, match="is what a judging keeps for itself"):
            judge_json(name, out=out)
    judge_json(out / "copy.json", out=out).require()


def test_a_study_refuses_before_it_begins_and_runs_twice(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = study_file(place, name="kept", student=None)
    words = ("study", "--config", str(file))
    outs = {"--json": "k.json", "--plot": "k.png", "--curves": "k.svg", "--html": "k.html"}
    given = [word for option, name in outs.items() for word in (option, str(place / name))]
    for _ in range(2):
        assert run(*words, "--show", *given) == 0
    assert (place / "k.json").is_file() and (place / "k.html").is_file()
    monkeypatch.setattr("minillm.study.command.run_by_jobs", lambda *_, **__: pytest.fail("it began"))
    for option, name in outs.items():
        stranger = place / f"stranger-{name}"
        stranger.write_text("mine", encoding="utf-8")
        capsys.readouterr()
        assert run(*words, option, str(stranger)) == 2
        assert "is there, and not" in capsys.readouterr().err
        assert stranger.read_text(encoding="utf-8") == "mine"
    same = str(place / "same.png")
    assert run(*words, "--plot", same, "--curves", same) == 2
    assert "name two files" in capsys.readouterr().err
    assert len({PLOT, CURVES, PAGE}) == 3

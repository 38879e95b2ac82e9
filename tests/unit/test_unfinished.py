"""Promises: an evaluation that was stopped goes on where it was, and ends with the files of an unbroken one.

1. Rows that were kept are not drawn again; samples.jsonl and all figures are the same to the last bit.
2. With other batches, or on another number of ranks, they are the same to rounding.
3. What is kept of another model or other settings is refused, and nothing is touched; --fresh starts over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm import evaluate, evaluation, unfinished
from minillm.config import RunConfig
from minillm.errors import DataError
from minillm.ranks import Ranks
from minillm.store import RESULTS, UNFINISHED
from minillm.unfinished import Keeper
from tests import tiny

PROMPTS, SEEDS, TEMPERATURES, BATCH = 7, (10, 20), (1.0, 0.7), 3
ROWS = PROMPTS * len(SEEDS) * len(TEMPERATURES)
BATCHES = 2 * 5
"""Five of at most three rows for each temperature."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfinished")
    tiny.save_model(folder / "teacher", "llama", seed=1)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An unbroken evaluation."""
    evaluate(folder / "student", settings(folder), out=folder / "whole")
    return folder / "whole"


def settings(folder: Path, **changed: Any) -> RunConfig:
    asked = {"seeds": SEEDS, "temperatures": TEMPERATURES, "batch": BATCH, "bootstrap": 20} | changed
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl",
        run_data={
            "train": str(folder / "prompts.jsonl"), "test": str(folder / "prompts.jsonl"), "test_limit": PROMPTS,
            "max_prompt_tokens": 8,
        },
        run_evaluation=asked,
    )  # fmt: skip


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], list[int]]]:
    """Counts the rows of each batch from now on, after each of which is kept what there is; stops before batch number
    ``stop``."""
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    monkeypatch.setattr(unfinished, "SHARE", float("inf"))
    real = evaluation._judge_batch

    def counting(stop: int | None) -> list[int]:
        seen: list[int] = []

        def judge(reader: Any, judge: Any, cells: Any, **options: Any) -> Any:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(len(cells))
            return real(reader, judge, cells, **options)

        monkeypatch.setattr(evaluation, "_judge_batch", judge)
        return seen

    yield counting


def stopped(folder: Path, out: Path, batches: Callable[[int | None], list[int]], *, after: int = 4) -> None:
    batches(after)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder / "student", settings(folder), out=out)
    assert [path.name for path in out.iterdir()] == [UNFINISHED]


def figures(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for name in ("seconds", "date"):
        del results[name]
    return results


@pytest.mark.parametrize("after", [1, 4, 7, 9])
def test_a_stopped_evaluation_ends_with_the_files_of_an_unbroken_one(  # noqa: PLR0917 (pytest fills them by name)
    after: int, folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path, capsys: Any
) -> None:
    """Stopped within the first temperature, and within the second."""
    out = tmp_path / "out"
    stopped(folder, out, batches, after=after)
    seen = batches(None)
    results = evaluate(folder / "student", settings(folder), out=out)
    assert len(seen) == BATCHES - after and "going on with an unfinished evaluation" in capsys.readouterr().out
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert figures(out) == figures(whole)
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "samples.jsonl"]
    assert results["measures"] == figures(whole)["measures"]


def test_it_may_be_stopped_more_than_once_and_adds_up_its_seconds(
    folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    out, spent = tmp_path / "out", []
    for _ in range(2):
        stopped(folder, out, batches, after=3)
        spent.append(json.loads((out / UNFINISHED).read_text(encoding="utf-8").splitlines()[0])["seconds"])
    seen = batches(None)
    results = evaluate(folder / "student", settings(folder), out=out)
    assert sum(seen) < ROWS and len(seen) == BATCHES - 6
    assert 0 < spent[0] < spent[1] < results["seconds"]["evaluation"]
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_other_batches_take_the_rows_that_are_there(
    folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped(folder, out, batches)
    kept = len((out / UNFINISHED).read_text(encoding="utf-8").splitlines()) - 1
    seen = batches(None)
    evaluate(folder / "student", settings(folder, batch=5), out=out)
    assert sum(seen) == ROWS - kept and kept > 0
    for mine, theirs in zip(rows(out), rows(whole), strict=True):
        for name in tiny.NATS:
            assert mine["measures"].pop(name) == pytest.approx(theirs["measures"].pop(name), abs=1e-4), name
        assert mine == theirs


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_control_a_row_that_was_changed_in_between_is_in_the_results(
    folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    """So what was kept is what is used."""
    out = tmp_path / "out"
    stopped(folder, out, batches)
    head, first, *rest = (out / UNFINISHED).read_text(encoding="utf-8").splitlines()
    line = json.loads(first)
    line["row"]["response"] = "not drawn"
    (out / UNFINISHED).write_text("\n".join([head, json.dumps(line), *rest]) + "\n", encoding="utf-8")
    batches(None)
    evaluate(folder / "student", settings(folder), out=out)
    assert "not drawn" in {row["response"] for row in rows(out)}
    assert figures(out) != figures(whole)


def test_another_question_is_refused_and_fresh_starts_over(
    folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped(folder, out, batches)
    before, seen = (out / UNFINISHED).read_bytes(), batches(None)
    with pytest.raises(DataError, match=r"another evaluation \(they differ in: model, weights\)[\s\S]*--fresh"):
        evaluate(folder / "teacher", settings(folder), out=out)
    with pytest.raises(DataError, match=r"differ in: evaluation"):
        evaluate(folder / "student", settings(folder, seeds=(10,)), out=out)
    assert not seen and (out / UNFINISHED).read_bytes() == before
    evaluate(folder / "student", settings(folder), out=out, fresh=True)
    assert len(seen) == BATCHES and figures(out) == figures(whole)


def test_rows_of_another_version_and_a_file_that_is_something_else_are_refused(
    folder: Path, batches: Callable[[int | None], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(folder, out, batches)
    batches(None)
    with monkeypatch.context() as patch:
        patch.setattr("minillm.results.versions", lambda: {"minillm": "0.0.0"})
        with pytest.raises(DataError, match="differ in: versions"):
            evaluate(folder / "student", settings(folder), out=out)
    for text in ("", "{", "[]\n", '{"asked": {}}\n'):
        (out / UNFINISHED).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="is not what an unfinished evaluation leaves"):
            evaluate(folder / "student", settings(folder), out=out)


def test_a_fresh_evaluation_that_was_stopped_goes_on_beside_older_results(
    folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(folder / "teacher", settings(folder), out=out)
    older = figures(out)
    batches(4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder / "student", settings(folder), out=out, fresh=True)
    assert figures(out) == older
    seen = batches(None)
    evaluate(folder / "student", settings(folder), out=out)
    assert len(seen) == BATCHES - 4 and figures(out) == figures(whole)


def sets_of(folder: Path, *names: str) -> RunConfig:
    """The same prompts under several names, each in a file of its own."""
    config = settings(folder)
    for name in names:
        tiny.save_prompts(folder / f"{name}.jsonl")
    test = {name: str(folder / f"{name}.jsonl") for name in names}
    return config.model_copy(update={"data": config.data.model_copy(update={"test": test})})


def test_several_sets_go_on_each_in_its_own_folder(
    folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    """Stopped within the second of two sets: the first is left, the second goes on, and other questions are refused."""
    out, both = tmp_path / "out", sets_of(folder, "one", "two")
    batches(BATCHES + 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder / "student", both, out=out)
    assert {str(path.relative_to(out)) for path in out.rglob("*.json*")} == {
        "one/results.json", "one/samples.jsonl", f"two/{UNFINISHED}",
    }  # fmt: skip
    seen = batches(None)
    with pytest.raises(DataError, match=r"one holds other results"):
        evaluate(folder / "teacher", both, out=out)
    with pytest.raises(DataError, match=r"two holds another evaluation"):
        evaluate(folder / "teacher", sets_of(folder, "two"), out=out)
    assert not seen
    evaluate(folder / "student", both, out=out)
    assert len(seen) == BATCHES - 4 and not list(out.rglob(UNFINISHED))
    for name in ("one", "two"):
        assert (out / name / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_fresh_sets_that_were_stopped_go_on_beside_older_results_and_fresh_again_starts_over(
    folder: Path, whole: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    """Also those that were not reached: their older results are those of another model, and are replaced."""
    out, both = tmp_path / "out", sets_of(folder, "one", "two")
    evaluate(folder / "teacher", both, out=out)
    older = figures(out / "two")
    for _ in range(2):
        seen = batches(4)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder / "student", both, out=out, fresh=True)
        assert len(seen) == 4 and figures(out / "two") == older
    seen = batches(None)
    evaluate(folder / "student", both, out=out)
    assert len(seen) == 2 * BATCHES - 4 and not list(out.rglob(UNFINISHED))
    for name in ("one", "two"):
        assert (out / name / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_several_sets_beside_an_unfinished_evaluation_on_one_source_are_refused(
    folder: Path, batches: Callable[[int | None], list[int]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped(folder, out, batches)
    seen = batches(None)
    with pytest.raises(DataError, match=r"unfinished evaluation on one source"):
        evaluate(folder / "student", sets_of(folder, "one"), out=out)
    assert not seen
    evaluate(folder / "student", sets_of(folder, "one"), out=out, fresh=True)
    assert len(seen) == BATCHES and not list(out.rglob(UNFINISHED))


def test_within_a_run_what_is_of_another_question_is_left_with_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    one = Keeper(tmp_path, asked={"model": "a"}, ranks=Ranks(), say=said.append)
    one.keep("samples", [((0, 10, 0), {"uid": "u", "text": "line\u2028break"})])
    same = Keeper(tmp_path, asked={"model": "a"}, ranks=Ranks(), say=said.append)
    assert same.kept("samples") == [((0, 10, 0), {"uid": "u", "text": "line\u2028break"})]
    other = Keeper(tmp_path, asked={"model": "b"}, ranks=Ranks(), say=said.append)
    assert other.kept("samples") == [] and "differ in: model" in said[-1] and "starting over" in said[-1]
    (tmp_path / UNFINISHED).write_text("{", encoding="utf-8")
    broken = Keeper(tmp_path, asked={"model": "a"}, ranks=Ranks(), say=said.append)
    assert broken.kept("samples") == [] and "starting over" in said[-1]
    assert UNFINISHED in RESULTS  # a run that starts over removes it


def test_rows_are_written_now_and_then_and_not_after_each_batch(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path, asked={}, ranks=Ranks(), say=print)
    assert not keeper.due()
    keeper._written -= unfinished.EVERY_S
    assert keeper.due()
    keeper.keep("samples", [])
    assert not keeper.due()

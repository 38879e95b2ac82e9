"""Promises: an evaluation that was stopped while it measured exposure bias or calibration goes on there, and ends with
the files of an unbroken one.

1. No forward of either model is made twice, and the files are the same to the last bit; wherever it was stopped.
2. With other batches, or on another number of ranks, what was read is taken as it is, and only the rest is read.
3. What was kept is what is used; what is kept of another model is refused, and nothing is touched.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from minillm import calibration_run, evaluate, exposure_run, unfinished
from minillm.config import RunConfig
from minillm.errors import DataError
from minillm.micro_batches import Limits, alike
from minillm.models import ModelReader
from minillm.ranks import Ranks
from minillm.store import UNFINISHED
from minillm.sweep import in_batches
from minillm.unfinished import Keeper, Keyed
from tests import tiny

ROWS, SAMPLES, CHOICES, BATCH = 12, 2, 3, 5
READINGS = {
    "exposure": (exposure_run, "_hear", 5),
    "references": (calibration_run, "_likeliest", 3),
    "choices": (calibration_run, "_log_probabilities", 3),
}
"""What reads a batch, and how many there are: of 24 cells, 12 references and 4 times 3 choices, at most 5 at a time."""
STOPS = [("exposure", 3), ("references", 0), ("references", 2), ("choices", 2)]

Count = Callable[[], int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfinished_extras")
    tiny.save_model(folder / "teacher", "llama", seed=1, rows=32)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl", rows=ROWS, labelled=True)
    return folder


def settings(folder: Path, **changed: Any) -> RunConfig:
    prompts = folder / "prompts.jsonl"
    asked = {"seeds": (1,), "bootstrap": 20, "batch": BATCH, "exposure": {"samples": SAMPLES}, "calibration": True}
    return tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=prompts,
        run_data={"train": str(prompts), "test": str(prompts), "max_prompt_tokens": 8},
        run_evaluation=asked | changed,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def after_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is is kept after each batch, not every 20 seconds."""
    monkeypatch.setattr(unfinished, "EVERY_S", 0.0)
    monkeypatch.setattr(unfinished, "SHARE", float("inf"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Path, int]:
    """An unbroken evaluation, and how many forwards it made."""
    with pytest.MonkeyPatch.context() as patch:
        count = forwards(patch)
        evaluate(folder / "student", settings(folder), out=folder / "whole")
        return folder / "whole", count()


def forwards(patch: pytest.MonkeyPatch) -> Count:
    """Counts from now on how often either model reads something."""
    made: list[str] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*inputs: Any, **named: Any) -> Any:
            made.append("")
            return real(*inputs, **named)

        return reading

    for name in ("extend", "read"):
        patch.setattr(ModelReader, name, counted(getattr(ModelReader, name)))
    return lambda: len(made)


def batches(patch: pytest.MonkeyPatch, reading: str, *, stop: int | None = None) -> Count:
    """Counts from now on the batches of one reading, and stops before batch number ``stop``."""
    module, name, _ = READINGS[reading]
    seen, real = list[str](), getattr(module, name)

    def hear(*inputs: Any, **named: Any) -> Any:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append("")
        return real(*inputs, **named)

    patch.setattr(module, name, hear)
    return lambda: len(seen)


def stopped(folder: Path, out: Path, *, reading: str, after: int) -> int:
    """Leaves an evaluation that was stopped after so many batches of a reading; how many forwards it made."""
    with pytest.MonkeyPatch.context() as patch:
        count = forwards(patch)
        batches(patch, reading, stop=after)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder / "student", settings(folder), out=out)
        assert [path.name for path in out.iterdir()] == [UNFINISHED]
        return count()


def figures(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for name in ("seconds", "date"):
        del results[name]
    return results


def lines(out: Path) -> list[dict[str, Any]]:
    """What is kept, without the line that says of what."""
    return [json.loads(line) for line in (out / UNFINISHED).read_text(encoding="utf-8").splitlines()[1:]]


@pytest.mark.parametrize(("reading", "after"), STOPS)
def test_it_goes_on_in_the_middle_of_a_reading(  # noqa: PLR0917 (pytest fills them by name)
    reading: str, after: int, folder: Path, whole: tuple[Path, int], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    out, (unbroken, all_forwards) = tmp_path / "out", whole
    before = stopped(folder, out, reading=reading, after=after)
    assert 0 < before < all_forwards
    capsys.readouterr()
    count, left = forwards(monkeypatch), {name: batches(monkeypatch, name) for name in READINGS}
    evaluate(folder / "student", settings(folder), out=out)
    assert before + count() == all_forwards
    order = list(READINGS)
    for name, (_, _, number) in READINGS.items():
        there = number if order.index(name) < order.index(reading) else after if name == reading else 0
        assert left[name]() == number - there, name
    assert (out / "samples.jsonl").read_bytes() == (unbroken / "samples.jsonl").read_bytes()
    assert figures(out) == figures(unbroken)
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "samples.jsonl"]
    told = capsys.readouterr().out
    assert f"going on with an unfinished evaluation, {ROWS} responses" in told
    # The bar counts what was there, and one over nothing is not shown.
    assert ("exposure" in told.split("are there")[1]) == (reading == "exposure")
    assert ("5/5" in told) == (reading == "exposure")


def test_it_may_be_stopped_in_one_reading_after_the_other(
    folder: Path, whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (unbroken, all_forwards), spent = tmp_path / "out", whole, []
    made = 0
    for reading, after in (("exposure", 2), ("exposure", 1), ("references", 1), ("choices", 2)):
        made += stopped(folder, out, reading=reading, after=after)
        spent.append(json.loads((out / UNFINISHED).read_text(encoding="utf-8").splitlines()[0])["seconds"])
    count = forwards(monkeypatch)
    results = evaluate(folder / "student", settings(folder), out=out)
    assert made + count() == all_forwards and figures(out) == figures(unbroken)
    assert spent == sorted(spent) and spent[-1] < results["seconds"]["evaluation"]


def test_other_batches_take_what_is_there(
    folder: Path, whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped(folder, out, reading="exposure", after=3)
    kept = [line["key"] for line in lines(out) if line["part"] == "exposure"]
    cells: list[Any] = []
    real = exposure_run._hear

    def hear(reader: Any, judge: Any, keys: Any, **named: Any) -> Any:
        cells.extend(keys)
        return real(reader, judge, keys, **named)

    monkeypatch.setattr(exposure_run, "_hear", hear)
    evaluate(folder / "student", settings(folder, batch=7), out=out)
    assert len(kept) == 15 and sorted([*map(tuple, kept), *cells]) == [(p, s) for p in range(ROWS) for s in (0, 1)]
    mine, theirs = figures(out), figures(whole[0])
    for name in ("student_kl", "teacher_kl"):
        np.testing.assert_allclose(mine["exposure"][name], theirs["exposure"][name], atol=2e-5)
    assert mine["exposure"]["alive"] == theirs["exposure"]["alive"]
    for kind in ("references", "choices"):
        assert mine["calibration"][kind]["ece"] == pytest.approx(theirs["calibration"][kind]["ece"], abs=2e-5)


def test_control_a_piece_that_was_changed_in_between_is_in_the_results(
    folder: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    """So what was kept is what is used, of each reading."""
    out = tmp_path / "out"
    stopped(folder, out, reading="choices", after=1)
    head = (out / UNFINISHED).read_text(encoding="utf-8").splitlines()[0]
    pieces, changed = lines(out), set()
    for piece in pieces:
        if piece["part"] == "exposure":
            piece["row"][0][0] += 1.0
        elif piece["part"] == "references":
            piece["row"][0][0] /= 2
        elif piece["part"] == "choices":
            piece["row"] += 1.0
        changed.add(piece["part"])
    assert changed == {"samples", *READINGS}
    text = "".join(line + "\n" for line in [head, *map(json.dumps, pieces)])
    (out / UNFINISHED).write_text(text, encoding="utf-8")
    evaluate(folder / "student", settings(folder), out=out)
    mine, theirs = figures(out), figures(whole[0])
    # Every response of the student has one nat more at its first token.
    assert mine["exposure"]["student_kl"][0] == pytest.approx(theirs["exposure"]["student_kl"][0] + 1.0)
    assert mine["exposure"]["teacher_kl"] == theirs["exposure"]["teacher_kl"]
    for kind in ("references", "choices"):
        assert mine["calibration"][kind]["confidence"] != theirs["calibration"][kind]["confidence"]
    assert mine["measures"] == theirs["measures"]


def test_pieces_of_another_question_are_refused_and_fresh_reads_all(
    folder: Path, whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, (unbroken, all_forwards) = tmp_path / "out", whole
    stopped(folder, out, reading="references", after=1)
    before, count = (out / UNFINISHED).read_bytes(), forwards(monkeypatch)
    with pytest.raises(DataError, match=r"another evaluation \(they differ in: model, weights\)"):
        evaluate(folder / "teacher", settings(folder), out=out)
    with pytest.raises(DataError, match=r"differ in: evaluation"):
        evaluate(folder / "student", settings(folder, exposure={"samples": 3}), out=out)
    with pytest.raises(DataError, match=r"differ in: evaluation"):
        evaluate(folder / "student", settings(folder, exposure=None), out=out)
    assert count() == 0 and (out / UNFINISHED).read_bytes() == before
    evaluate(folder / "student", settings(folder), out=out, fresh=True)
    assert count() == all_forwards and figures(out) == figures(unbroken)


def test_lines_that_do_not_say_of_what_they_are_are_responses(
    folder: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    """As they were written before anything else was kept."""
    out, (unbroken, _) = tmp_path / "out", whole
    stopped(folder, out, reading="exposure", after=0)
    text = (out / UNFINISHED).read_text(encoding="utf-8")
    older = text.replace('"part": "samples", ', "")
    assert text.count('"part"') == ROWS and '"part"' not in older
    (out / UNFINISHED).write_text(older, encoding="utf-8")
    evaluate(folder / "student", settings(folder), out=out)
    assert figures(out) == figures(unbroken)


def test_a_line_of_a_reading_that_is_unknown_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(folder, out, reading="exposure", after=1)
    text = (out / UNFINISHED).read_text(encoding="utf-8").replace('"part": "exposure"', '"part": "exposures"')
    (out / UNFINISHED).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="is not what an unfinished evaluation leaves"):
        evaluate(folder / "student", settings(folder), out=out)


def test_a_batch_without_rows_is_no_more_than_a_call(
    folder: Path, whole: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank has such batches, also in between, where all that is left of one is another rank's."""

    def with_gaps(real: Callable[..., Any], *, of_ranks: bool) -> Callable[..., Any]:
        def cut(*inputs: Any, **named: Any) -> Any:
            found = real(*inputs, **named)
            gaps = [[each for batch in one for each in ([], batch)] for one in (found if of_ranks else [found])]
            return gaps if of_ranks else gaps[0]

        return cut

    monkeypatch.setattr(exposure_run, "batches_of_rank", with_gaps(exposure_run.batches_of_rank, of_ranks=False))
    monkeypatch.setattr(calibration_run, "alike", with_gaps(calibration_run.alike, of_ranks=True))
    count = batches(monkeypatch, "exposure")
    evaluate(folder / "student", settings(folder), out=tmp_path / "out")
    assert count() == 10 and figures(tmp_path / "out") == figures(whole[0])


class Side:
    """One of several ranks that are threads of this process: what ``in_batches`` and ``Keeper`` ask of ``Ranks``."""

    def __init__(self, rank: int, size: int, wall: threading.Barrier, told: dict[int, Any]) -> None:
        self.rank, self.size, self.first = rank, size, rank == 0
        self._wall, self._told = wall, told

    def _all(self, mine: Any) -> list[Any]:
        self._told[self.rank] = mine
        self._wall.wait(timeout=20)
        everyone = [self._told[rank] for rank in range(self.size)]
        self._wall.wait(timeout=20)
        return everyone

    def anyone(self, mine: bool) -> bool:
        return any(self._all(mine))

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        return [item for part in self._all(mine) for item in part]

    def of_first(self, work: Callable[[], Any]) -> Any:
        return self._all(work() if self.first else None)[0]


def read_on(size: int, out: Path, *, rows: int, stop: int | None = None) -> tuple[list[list[Keyed]], list[int]]:
    """What each of ``size`` ranks has of 13 keys in the end, at most ``rows`` at a time, and which they worked at.

    With ``stop`` all are stopped before their batch of that number.
    """
    wall, told = threading.Barrier(size), dict[int, Any]()
    found, worked = dict[int, list[Keyed]](), list[int]()
    cuts = alike([20 - key for key in range(13)], limits=Limits(rows=rows), ranks=size)

    def one(side: Side) -> None:
        ranks, count = cast(Ranks, side), [0]

        def work(_: int, keys: Sequence[tuple[int, ...]]) -> list[float]:
            if count[0] == stop:
                raise InterruptedError
            count[0] += 1
            worked.extend(key for (key,) in keys)
            return [key / 7 for (key,) in keys]

        keeper = Keeper(out, asked={"model": "a"}, ranks=ranks, say=lambda line: None)
        pieces = [[(key,) for key in batch] for batch in cuts[side.rank]]
        try:
            found[side.rank] = in_batches(pieces, work, part="references", ranks=ranks, keeper=keeper)
        except InterruptedError:
            assert stop is not None

    threads = [threading.Thread(target=one, args=(Side(rank, size, wall, told),)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in sorted(found)], sorted(worked)


@pytest.mark.parametrize(("first", "then"), [(1, 1), (2, 2), (2, 1), (1, 2), (3, 2)])
def test_any_number_of_ranks_goes_on_with_what_another_number_kept(first: int, then: int, tmp_path: Path) -> None:
    everything = [((key,), key / 7) for key in range(13)]
    ended, read = read_on(first, tmp_path, rows=2, stop=2)
    assert not ended and len(read) == 4 * first
    kept = [line["key"][0] for line in lines(tmp_path)]
    assert sorted(kept) == read
    ended, rest = read_on(then, tmp_path, rows=3)
    assert ended == [everything] * then
    assert sorted(read + rest) == list(range(13)) and not set(read) & set(rest)


def test_a_reading_without_a_keeper_is_read_whole_and_in_order() -> None:
    batches_ = [[(3,), (1,)], [(2,)]]
    found = in_batches(batches_, lambda piece, keys: [(piece, *key) for key in keys], part="choices", ranks=Ranks())
    assert found == [((1,), (0, 1)), ((2,), (1, 2)), ((3,), (0, 3))]


def test_what_was_made_since_the_last_writing_is_written_with_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of one reading falls between two writings as a rule, and the next one begins with it in hand."""
    monkeypatch.setattr(unfinished, "EVERY_S", 1000.0)
    keeper = Keeper(tmp_path, asked={}, ranks=Ranks(), say=print)
    for part in ("references", "choices"):
        in_batches([[(0,)], [(1,)]], lambda _, keys: [0.5] * len(keys), part=part, ranks=Ranks(), keeper=keeper)
    assert not (tmp_path / UNFINISHED).exists()
    keeper._written -= 1000.0
    in_batches([[(0,)]], lambda _, keys: [0.5] * len(keys), part="exposure", ranks=Ranks(), keeper=keeper)
    assert [(line["part"], line["key"]) for line in lines(tmp_path)] == [
        ("exposure", [0]), ("references", [0]), ("references", [1]), ("choices", [0]), ("choices", [1]),
    ]  # fmt: skip

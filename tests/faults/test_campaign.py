"""What the campaigns of faults judge by: their memory, their damages, their choice of points, what a life must say."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from minillm import exits
from minillm.run_listing import fault_of
from tests.campaign import damage
from tests.campaign.__main__ import parser
from tests.campaign.faults import KINDS
from tests.campaign.journal import Journal
from tests.campaign.lives import WentOn, whole_checkpoints
from tests.campaign.points import Point, kind, spread
from tests.campaign.soak import (
    CODES,
    Soak,
    begun_over,
    differing,
    events_of,
    fine,
    left_over,
    lost,
    names,
    wrongly_begun,
)
from tests.campaign.soak import KINDS as ALL_KINDS
from tests.faults.toy import save, store


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints and a log."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    for step in (1, 2):
        save(store(run), step)
    (run / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    return run


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("how", damage.OF_A_CHECKPOINT)
def test_a_damage_is_seen_and_leaves_the_one_before(how: str, seed: int, run: Path) -> None:
    before = whole_checkpoints(run)
    damage.damaged(run, how, random.Random(seed))
    assert len(before) == 2 and whole_checkpoints(run) == before[1:] and names(run) == before
    assert fault_of(run / "checkpoints" / before[0])


@pytest.mark.parametrize("how", damage.BESIDE)
def test_what_stands_beside_breaks_no_checkpoint(how: str, run: Path) -> None:
    before, log = whole_checkpoints(run), (run / "metrics.jsonl").read_text(encoding="utf-8")
    damage.damaged(run, how, random.Random(1))
    assert whole_checkpoints(run) == before
    assert bool(left_over(run)) == (how != "torn log")
    assert ((run / "metrics.jsonl").read_text(encoding="utf-8") != log) == (how == "torn log")


def test_a_life_must_go_on_from_the_newest_that_is_whole_and_name_those_that_are_not() -> None:
    there, whole = ["step-00000008", "step-00000004"], ["step-00000004"]

    def wrong(checkpoint: str, text: str, left: set[str]) -> list[str]:
        return wrongly_begun(WentOn(checkpoint, "sft", 4), text, whole=whole, there=there, left=left)

    said = "note: step-00000008 is not used: …"
    assert wrong("step-00000004", said, set()) == []
    assert len(wrong("step-00000004", "", set())) == len(wrong("step-00000008", said, set())) == 1
    assert wrong("step-00000004", said, {".staging-x"}) == [".staging-x is still there"]


def test_a_journal_goes_on_after_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    first = Journal(file)
    first.add("life", round=1)
    with file.open("a", encoding="utf-8") as lines:
        lines.write('{"what": "li')
    second = Journal(file)
    second.add("life", round=2)
    assert [line["round"] for line in Journal(file).of("life")] == [1, 2]
    assert second.elapsed >= first.lines[0]["elapsed"]


def test_steps_lost_and_what_differs_are_counted(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    for began, stood, code in ((None, 10, 5), (8, 21, -9), (None, 21, 143), (20, 40, 0)):
        journal.add("life", round=1, kind="kill rank", target=" 0", began=began, stood=stood, code=code, wrong=[])
    assert not fine(journal)  # no round is over
    journal.add("round", round=1, differs=[])
    assert fine(journal) and lost(journal) == [2, 1] and len(events_of(journal)) == 3
    journal.add("round", round=2, differs=["log"])
    assert not fine(journal) and differing(journal) == ["round 2: log"]


def test_a_spread_has_every_name_of_every_rank() -> None:
    points = [
        Point(2, rank, number, name, number)
        for rank in (0, 1)
        for number, name in enumerate(["phase save", *["disk.write"] * 200, "checkpoint.published step"])
    ]
    chosen = spread(points, 20)
    assert {(point.rank, kind(point)) for point in chosen} == {(point.rank, kind(point)) for point in points}
    assert 20 <= len(chosen) <= 24 and len({point.key for point in chosen}) == len(chosen)
    assert spread(points, 20) == chosen != sorted(chosen, key=points.index)
    assert sorted(spread(points, 1000), key=points.index) == points


def test_every_kind_has_its_exit_codes() -> None:
    assert set(CODES) - {"nothing"} == set(ALL_KINDS) >= set(KINDS)


def test_a_soak_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    Journal(tmp_path / "events.jsonl").add("begun", settings={"seed": 2})
    with pytest.raises(SystemExit, match="go on with its settings"):
        Soak(tmp_path, minutes=1, seed=1).run()


@pytest.mark.parametrize(
    "words", ["soak --minutes 0", "soak --seed -1", "soak --minutes x", "faults --part all", "faults --all --quick", ""]
)
def test_words_that_mean_nothing_are_refused(words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(words.split())


def test_a_life_that_begins_from_nothing_beside_a_checkpoint_is_seen() -> None:
    """The bits are right all the same: no comparison would tell."""
    whole = ["step-00000008"]
    assert begun_over("sft 240/240", code=exits.DONE, whole=whole)
    assert begun_over("SIGTERM: saved at step 3", code=exits.STOPPED, whole=whole)
    assert not begun_over("sft 240/240", code=exits.DONE, whole=[])
    assert not begun_over("run: done already; --fresh starts over", code=exits.DONE, whole=whole)
    assert not begun_over("", code=-9, whole=whole), "killed before it could say anything"

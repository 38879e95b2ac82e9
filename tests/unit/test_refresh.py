"""Rejected responses drawn anew when a stage begins: by its start, counted, kept, and learnt from.

1. What becomes of an answer: fresh, cut, empty or equal.
2. A stage: its fresh pairs are its start's keyed answers; the second stage's are those of the student before it.
3. Soft targets are the run's teacher's, of the fresh pairs; without a teacher that is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minillm import distill, preference_reference
from minillm.config import RunConfig
from minillm.drawing import Drawn
from minillm.errors import CacheError, UnsupportedCombination
from minillm.loading import fingerprint
from minillm.pairs import check_pair
from minillm.preference_refresh import _answer
from minillm.types import PreferencePair, Prompt, Stop
from tests import tiny
from tests.unit.test_preference_runs import LN_2, save_pairs, stage, trained

END = tiny.WORDS.index(tiny.EOS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("refresh")
    for name, seed in (("student", 2), ("teacher", 1)):
        tiny.save_model(made / name, "llama", seed=seed, spread=0.1)
    save_pairs(made / "pairs.jsonl", rows=30)
    return made


def config(place: Path, *stages: dict[str, Any], name: str, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"),
        "data": {"preferences": str(place / "pairs.jsonl"), "max_prompt_tokens": 8},
        "decoding": {"max_new_tokens": 24}, "engine": {"student": "zero0"}, "stages": stages, **changes,
    }  # fmt: skip
    return RunConfig(**values)


def fresh(**changes: Any) -> dict[str, Any]:
    optimiser = {"lr": 3e-2, "schedule": "constant"}
    return stage(**{"refresh_rejected": True, "target": "hard", "beta": 0.5, "optimiser": optimiser, **changes})


def kept(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stages" / name / "refreshed.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return distill(config(place, fresh(name="one"), fresh(name="two"), name="two-stages"))


# ---------------------------------------------------------------- 1. fates

ONE = PreferencePair(
    prompt=Prompt(uid="p", text="a", ids=(2,)), chosen="b c", rejected="d", chosen_ids=(3, 4, END),
    rejected_ids=(5, END), teacher_logps=(-1.0, -2.0),
)  # fmt: skip


@pytest.mark.parametrize(
    ("drawn", "fate"),
    [
        (Drawn((0, 0), (6, 7), "e f", Stop.EOS), "fresh"),
        (Drawn((0, 0), (5,), "d", Stop.EOS), "fresh"),  # what was rejected before may be so again
        (Drawn((0, 0), (6, 7), "e f", Stop.LENGTH), "cut"),
        (Drawn((0, 0), (3, 4), "b c", Stop.LENGTH), "cut"),
        (Drawn((0, 0), (), "", Stop.EMPTY), "empty"),
        (Drawn((0, 0), (0,), " ", Stop.EOS), "empty"),
        (Drawn((0, 0), (3, 4), "b c", Stop.EOS), "equal"),
        (Drawn((0, 0), (9, 9), "b c", Stop.EOS), "equal"),  # spelt otherwise
    ],
)
def test_what_becomes_of_an_answer(drawn: Drawn, fate: str) -> None:
    found = _answer(ONE, drawn, end=END)
    assert found.fate == fate
    assert (found.text, found.ids) == ((drawn.text, (*drawn.ids, END)) if fate == "fresh" else ("", ()))


# ---------------------------------------------------------------- 2. stages


def learnt(settings: RunConfig) -> dict[str, Sequence[PreferencePair]]:
    """The pairs that each stage of a run learns from, of a run that ends before its first step."""
    found: dict[str, Sequence[PreferencePair]] = {}
    plain = preference_reference.Prepared

    def prepared(**fields: Any) -> Any:
        found[str(len(found))] = fields["learnt"].pairs
        return plain(**fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference_reference, "Prepared", prepared)
        distill(settings)
    return found


def test_a_stage_learns_from_its_starts_answers_in_place_of_the_rejected_ones(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(place, fresh(name="one"), fresh(name="two"), name="again")
    pairs = learnt(settings)
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    card = check_pair(settings).student_card
    starts = {"one": card, "two": card.of_folder(run / "stages" / "one" / "student")}
    for name, (stage_name, start) in zip("01", starts.items(), strict=True):
        record = kept(run, stage_name)
        assert record == kept(Path(settings.out) / "again", stage_name)
        assert record["version"]["weights"] == fingerprint(start) and record["version"]["stage"] == stage_name
        fates = Counter(answer["fate"] for answer in record["answers"])
        assert fates["fresh"] > 5 and fates["fresh"] < len(rows)
        for one, row, answer in zip(pairs[name], rows, record["answers"], strict=True):
            assert (one.prompt.uid, one.chosen) == (answer["uid"], row["chosen"]) == (row["id"], row["chosen"])
            assert one.rejected == (answer["text"] if answer["fate"] == "fresh" else row["rejected"])
            read = (*(tiny.WORDS.index(word) for word in one.rejected.split()), END)
            assert one.rejected_ids == (tuple(answer["ids"]) if answer["fate"] == "fresh" else read)
            spelt = tuple(place for place in one.rejected_ids if place >= END)
            assert spelt == read  # but for special tokens that were drawn
        assert f"stage {stage_name}: {fates['fresh']} of 30 rejected responses drawn anew" in said
        assert f"{fates['cut']} cut at decoding.max_new_tokens" in said
        assert abs(trained(run, stage_name)[0]["loss"] - LN_2) < 2e-6
        reference = json.loads((run / "stages" / stage_name / "reference.json").read_text(encoding="utf-8"))
        assert reference["version"]["pairs"] != record["version"]["pairs"]  # asked about the fresh ones
    one, two = ({a["uid"]: a["text"] for a in kept(run, name)["answers"]} for name in starts)
    assert one != two
    assert "empty" in said or "the same as the chosen one" in said or fates["cut"] == 30 - fates["fresh"]


def test_without_it_the_run_is_another(place: Path, run: Path) -> None:
    plain = distill(config(place, fresh(name="one", refresh_rejected=False), name="plain"))
    assert not (plain / "stages" / "one" / "refreshed.json").exists()
    assert trained(plain, "one")[-1]["loss"] != trained(run, "one")[-1]["loss"]


def test_a_stage_of_another_name_or_seed_draws_other_answers(place: Path, run: Path) -> None:
    texts = [[answer["text"] for answer in kept(run, "one")["answers"]]]
    for name, stage_name, seed in (("seed", "one", 11), ("stage", "other", 10)):
        out = distill(config(place, fresh(name=stage_name, steps=1), name=f"key-{name}", seed=seed))
        texts.append([answer["text"] for answer in kept(out, stage_name)["answers"]])
    assert texts[0] != texts[1] != texts[2] != texts[0]


# ---------------------------------------------------------------- 3. targets


@pytest.mark.parametrize("target", ["soft", None])
def test_a_target_that_is_or_may_be_soft_needs_the_runs_teacher(place: Path, target: str | None) -> None:
    with pytest.raises(UnsupportedCombination, match=r"refresh_rejected with target .* names no teacher"):
        config(place, fresh(target=target), name="x")
    config(place, fresh(target=target), name="x", teacher=str(place / "teacher"))
    config(place, fresh(target=target, refresh_rejected=False), name="x")
    for other in ({"target": "hard"}, {"target": "smoothed", "label_noise": 0.1}, {"target": None, "link": "ipo"}):
        config(place, fresh(**other), name="x")


@pytest.mark.parametrize(("target", "wanted"), [("soft", "soft"), (None, "soft"), ("hard", "hard")])
def test_the_teacher_says_how_likely_the_fresh_pairs_are(
    place: Path, target: str | None, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where each pair brings its teacher's numbers labels are soft by default, and still so when they hold no more."""
    bringing = place / "bringing.jsonl"
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    bringing.write_text("".join(json.dumps(row | {"teacher_logps": [-1.0, -2.0]}) + "\n" for row in rows))
    data = {"preferences": str(bringing), "max_prompt_tokens": 8}
    settings = config(
        place, fresh(target=target, steps=1), name=f"taught-{target}", data=data, teacher=str(place / "teacher")
    )
    pairs = learnt(settings)["0"]
    said = capsys.readouterr().out
    assert f"target {wanted}" in said and ("asked the teacher about 60 responses" in said) == (wanted == "soft")
    assert all(one.teacher_logps is None for one in pairs)
    # The control: without the refresh the pairs' own are taken.
    own = config(place, stage(target=target, steps=1), name=f"own-{target}", data=data, teacher=str(place / "teacher"))
    assert all(one.teacher_logps == (-1.0, -2.0) for one in learnt(own)["0"])
    assert "asked the teacher" not in capsys.readouterr().out


def test_answers_of_other_weights_pairs_or_keys_are_refused_where_a_stage_goes_on(place: Path, run: Path) -> None:
    from minillm.preference_refresh import DrawnVersion, _read

    file = run / "stages" / "two" / "refreshed.json"
    right = DrawnVersion(**kept(run, "two")["version"])
    taken = _read(file, right, goes_on=True)
    assert taken is not None and len(taken.answers) == 30  # the control
    other = DrawnVersion(**kept(run, "one")["version"])
    with pytest.raises(CacheError, match=r"rejected responses of another model or of other pairs: weights .*stage two"):
        _read(file, other, goes_on=True)
    assert _read(file, other, goes_on=False) is None  # a stage that begins draws its own
    with pytest.raises(CacheError, match="seed 10, wanted 11"):
        _read(file, right.model_copy(update={"seed": 11}), goes_on=True)

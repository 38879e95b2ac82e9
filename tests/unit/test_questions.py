"""Promises: what decides the figures of an evaluation is part of its question, and weights have a name that tells them
from others.

1. Other references (the second, one too long to be learnt from), other fields, another source, another precision or
   dtype are another question; what an evaluation of before did not say is told as such.
2. A model that is built is named by how, and by its seed; a hub model by the commit in the cache; a name alone is no
   proof of the same weights.
3. Evaluations that an older version made can be read by report and compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import loading, results
from minillm.cards import UNKNOWN_REVISION, BuildSpec, Card, may_differ
from minillm.compare.command import compare
from minillm.compare.summary import Options
from minillm.errors import DataError
from minillm.loading import by_name, fingerprint
from minillm.measures import ratios_of
from minillm.preflight import Split
from minillm.prompts import data_hash
from minillm.report import combine
from minillm.report_files import read_samples
from minillm.results import already, asked_of, judged_by
from minillm.types import Prompt
from tests.unit.test_compare_command import evaluation

Record = dict[str, Any]
HUB = Card(name="m", model="owner/m")


def prompt(**changed: Any) -> Prompt:
    given: Record = {
        "uid": "u", "text": "p", "ids": (1, 2), "responses": ("a b", "c"), "response_ids": (3, 4), "extra": {"k": 1},
    }  # fmt: skip
    return Prompt(**{"choices": (), **given, **changed})


def split(one: Prompt, source: str = "rows.jsonl") -> Split:
    return Split(source=source, prompts=[one], sha256=data_hash([one]), words=())


@pytest.mark.parametrize(
    "changed",
    [{"responses": ("a b", "d")}, {"responses": ("a b",)}, {"extra": {"k": 2}}, {"extra": {}}],
    ids=["another second", "no second", "another field", "no field"],
)
def test_what_responses_are_judged_by_is_in_the_question(changed: Record) -> None:
    before, now = split(prompt()), split(prompt(**changed))
    assert before.sha256 == now.sha256  # which is why there is another
    assert judged_by(before, checker="") != judged_by(now, checker="")
    assert judged_by(before, checker="") == judged_by(split(prompt()), checker="")  # control


def test_a_first_reference_too_long_to_be_learnt_from_is_in_the_question() -> None:
    one, other = (split(prompt(responses=(text,), response_ids=())) for text in ("long", "longer"))
    assert one.sha256 == other.sha256 and judged_by(one, checker="") != judged_by(other, checker="")


def test_the_source_decides_who_checks() -> None:
    assert (
        len({judged_by(split(prompt(), source), checker="") for source in ("rows.jsonl", "world:test", "other.jsonl")})
        == 3
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What an evaluation is asked, of made-up settings."""
    monkeypatch.setattr(results, "asked_extras", lambda config, split: {})
    monkeypatch.setattr(results, "idle_extras", lambda config: set())

    class Plain:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update(fields)

        def model_dump(self, **options: Any) -> Record:
            return {}

    def ask(
        *, precision: str = "fp32", model: str = "float32", teacher: str = "float32", one: Prompt | None = None
    ) -> Any:
        config: Any = Plain(
            teacher="t",
            seed=1,
            decoding=Plain(),
            evaluation=Plain(),
            engine=Plain(precision=precision),
            data=Plain(checker=None),
        )
        pair: Any = Plain(teacher_card=HUB.model_copy(update={"dtype": teacher, "revision": "a" * 40}))
        start: Any = Plain(card=HUB.model_copy(update={"dtype": model, "revision": "b" * 40}))
        return asked_of(config, pair, split(one or prompt()), start=start)

    return ask


def stored(out: Path, question: Record) -> Record:
    out.mkdir(exist_ok=True)
    found = {"schema": 1, "asked": question}
    (out / "results.json").write_text(json.dumps(found), encoding="utf-8")
    return found


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"precision": "bf16"}, "differ in: precision"),
        ({"model": "bfloat16"}, "differ in: dtypes"),
        ({"teacher": "bfloat16"}, "differ in: dtypes"),
        ({"one": prompt(responses=("a b", "x"))}, "differ in: references"),
    ],
)
def test_another_question_is_refused(changed: Record, told: str, asked: Any, tmp_path: Path) -> None:
    before = stored(tmp_path, asked())
    assert already(tmp_path, asked) == before  # control
    with pytest.raises(DataError, match=told) as error:
        already(tmp_path, lambda: asked(**changed))
    assert "older version" not in str(error.value)


def test_results_of_an_older_version_are_another_question_and_said_to_be(asked: Any, tmp_path: Path) -> None:
    new = ("references", "precision", "dtypes")
    stored(tmp_path, {name: value for name, value in asked().items() if name not in new})
    with pytest.raises(DataError, match="an older version made them, which did not say: references, precision, dtypes"):
        already(tmp_path, asked)


def test_weights_without_a_revision_are_never_those_of_before(asked: Any, tmp_path: Path) -> None:
    question = asked() | {"weights": f"owner/m@{UNKNOWN_REVISION}"}
    stored(tmp_path, question)
    with pytest.raises(DataError, match="differ in: weights"):
        already(tmp_path, lambda: question)


# Names of weights


def built(**changed: Any) -> Card:
    given: Record = {"architecture": "gpt2", "tokenizer": "world", "config": {"n_layer": 2}}
    return Card(name="tiny", build=BuildSpec(**{**given, **changed}))


def test_a_built_model_is_named_by_how_and_by_its_seed() -> None:
    others = [built(config={"n_layer": 4}), built(tokenizer="other"), built(architecture="llama")]
    bf16 = built().model_copy(update={"dtype": "bfloat16"})
    names = [fingerprint(card) for card in (built(), *others, bf16)]
    assert len({*names, fingerprint(built(), seed=1)}) == len(names) + 1
    assert fingerprint(built()) == fingerprint(copied(built()))  # control


def copied(card: Card) -> Card:
    return Card(**card.model_dump())


def test_a_hub_model_is_named_by_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.try_to_load_from_cache
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *a, **k: real(*a, cache_dir=tmp_path, **k))
    assert fingerprint(HUB) == f"owner/m@{UNKNOWN_REVISION}"
    for commit in ("a" * 40, "b" * 40):
        folder = tmp_path / "models--owner--m"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        assert fingerprint(HUB) == f"owner/m@{commit}"
    old = HUB.model_copy(update={"revision": "a" * 40})
    assert fingerprint(old) == "owner/m@" + "a" * 40
    assert fingerprint(HUB.model_copy(update={"revision": "v1"})) == "owner/m@v1"  # a tag that the cache has not


def test_a_name_alone_is_no_proof_of_the_same_weights() -> None:
    for weights in ("owner/m@None", f"owner/m@{UNKNOWN_REVISION}"):
        assert may_differ(weights, weights)
    assert not may_differ("owner/m@v1", "owner/m@v1") and may_differ("owner/m@v1", "owner/m@v2")


def test_a_study_names_models_by_their_cards_whatever_is_in_the_cache() -> None:
    """Its digest holds the rest of the card; the cells that are committed were made so."""
    assert (by_name(built()), by_name(HUB)) == ("tiny@None", "owner/m@None")


# Older evaluations


def test_older_evaluations_are_read_by_report_and_compare(tmp_path: Path) -> None:
    given = {name: evaluation(tmp_path / name) for name in "ab"}
    for folder in given.values():  # "asked" came later than the first results
        measures = {name: {} for name in ratios_of([row for row in read_samples(folder) if row["temperature"] == 1.0])}
        told = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        (folder / "results.json").write_text(
            json.dumps({name: value for name, value in told.items() if name != "asked"} | {"measures": measures}),
            encoding="utf-8",
        )
    assert compare(given, options=Options(resamples=100), quiet=True)["notes"] == []
    assert combine(given, differences=[("b", "a")], resamples=20, seed=0, seconds=None)["notes"] == []


@pytest.mark.parametrize("by", ["None", UNKNOWN_REVISION])
def test_teachers_known_by_name_only_are_told(by: str, tmp_path: Path) -> None:
    def about(name: str, teacher: str) -> Record:
        return {"asked": {"weights": name, "teacher_weights": f"owner/m@{teacher}"}}

    given = {name: evaluation(tmp_path / name, **about(name, by)) for name in "ab"}
    sure = {name: evaluation(tmp_path / f"sure-{name}", **about(name, "c" * 40)) for name in "ab"}
    options = Options(resamples=100)
    found = compare(given, options=options, quiet=True)
    assert "known by name only (owner/m)" in found["notes"][0]
    assert "reverse_kl" in found["comparisons"][0]["changes"]
    assert compare(sure, options=options, quiet=True)["notes"] == []  # control

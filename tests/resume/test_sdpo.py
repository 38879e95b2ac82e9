"""sDPO goes on to the same bits: the order of chunks and the rejected responses that were drawn anew stand in the run's
folder, and are those that the run began with.

Two stages of which each draws its rejected responses. The run is stopped after each of its updates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm import distill, preference_refresh
from minillm.config import RunConfig
from minillm.errors import CacheError
from tests import tiny
from tests.resume.test_preference_stages import STEPS, outcome, same, stopped
from tests.unit.test_preference_runs import save_pairs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sdpo")
    tiny.save_model(made / "student", "llama", seed=2, spread=0.1)
    save_pairs(made / "one.jsonl", rows=12)
    save_pairs(made / "two.jsonl", rows=12, first=40)
    return made


def config(place: Path, name: str) -> RunConfig:
    stage = {
        "kind": "preference", "steps": STEPS, "batch": 4, "beta": 0.5, "target": "hard", "refresh_rejected": True,
        "optimiser": {"lr": 1e-2, "schedule": "constant"},
    }  # fmt: skip
    sources = {source: str(place / f"{source}.jsonl") for source in ("one", "two")}
    values: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"), "threads": 1,
        "data": {"preferences": sources, "chunks": {}, "max_prompt_tokens": 8},
        "decoding": {"max_new_tokens": 24}, "engine": {"student": "zero0"},
        "stages": tuple({**stage, "name": f"s{number}", "chunk": number} for number in (1, 2)),
    }  # fmt: skip
    return RunConfig(**values)


@pytest.fixture(scope="module")
def unbroken(place: Path) -> Path:
    return distill(config(place, "unbroken"))


@pytest.mark.parametrize("after", [1, STEPS, STEPS + 1])
def test_a_run_stopped_inside_either_stage_ends_with_the_same_bits(
    place: Path, unbroken: Path, after: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(place, f"after-{after}")
    folder = stopped(settings, after=after)
    drawn = []
    plain = preference_refresh._answers
    monkeypatch.setattr(preference_refresh, "_answers", lambda *at, **of: drawn.append(at[1]) or plain(*at, **of))
    capsys.readouterr()
    assert same(distill(settings), unbroken)
    assert drawn == (["s2"] if after <= STEPS else [])  # what had begun draws nothing again
    said = capsys.readouterr().out
    assert (f"rejected responses from {folder}/stages" in said) == (after != STEPS)
    assert f"in the order of {folder}/chunks.json" in said
    assert [line["kind"] for line in outcome(folder)[0]].count("chunks") == 1


def test_answers_that_were_changed_would_be_seen(place: Path, unbroken: Path) -> None:
    """The control: other text under the right name trains another student; under another name it is refused."""
    settings = config(place, "changed")
    folder = stopped(settings, after=1)
    file = folder / "stages" / "s1" / "refreshed.json"
    right = json.loads(file.read_text(encoding="utf-8"))
    stale = {**right, "version": {**right["version"], "weights": "other"}}
    file.write_text(json.dumps(stale), encoding="utf-8")
    with pytest.raises(CacheError, match="weights other, wanted"):
        distill(settings)
    fresh = [each for each in right["answers"] if each["fate"] == "fresh"]
    assert len(fresh) > 2
    fresh[0]["ids"], fresh[0]["text"] = fresh[1]["ids"], fresh[1]["text"]
    file.write_text(json.dumps(right), encoding="utf-8")
    with pytest.raises(CacheError, match=r"reference\.json: .*pairs"):  # the reference was asked about others
        distill(settings)


@pytest.mark.parametrize("name", ["weights", "pairs"])
def test_an_order_of_another_run_is_refused(place: Path, unbroken: Path, name: str) -> None:
    settings = config(place, f"order-{name}")
    folder = stopped(settings, after=1)
    right = (folder / "chunks.json").read_text(encoding="utf-8")
    other = json.loads(right)
    other["version"][name] = "other"
    (folder / "chunks.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(CacheError, match=f"chunks of another model or of other pairs: {name} other"):
        distill(settings)
    (folder / "chunks.json").write_text(right, encoding="utf-8")
    assert same(distill(settings), unbroken)


def test_answers_that_are_gone_are_drawn_again_and_said_so(
    place: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(place, "gone")
    folder = stopped(settings, after=STEPS + 1)
    for file in (folder / "stages" / "s2" / "refreshed.json", folder / "chunks.json"):
        file.unlink()
    capsys.readouterr()
    assert same(distill(settings), unbroken)
    assert "refreshed.json is gone; the rejected responses are drawn again" in capsys.readouterr().out

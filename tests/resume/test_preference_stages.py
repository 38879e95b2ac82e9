"""A stage that learns from pairs goes on beside the reference that it began with, to the same bits.

Two such stages, as sDPO has them: the second's reference is the first one's student. The run is stopped after each of
its updates.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm import distill, stages
from minillm.config import RunConfig
from minillm.errors import CacheError, CheckpointError, Stopped
from minillm.loading import inspect
from minillm.run_log import OF_THE_PROCESS
from minillm.stops import Stops
from tests import tiny
from tests.unit.test_preference_runs import save_pairs

VALUES = ("dpo", "tdpo2")
STEPS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("going-on")
    tiny.save_model(made / "student", "llama", seed=2)
    save_pairs(made / "easy.jsonl", rows=12)
    save_pairs(made / "hard.jsonl", rows=12, first=40)
    save_pairs(made / "held-out.jsonl", rows=5, first=80)
    return made


def config(place: Path, name: str, value: str) -> RunConfig:
    stage = {
        "kind": "preference", "value": value, "steps": STEPS, "batch": 4, "beta": 0.5, "validate_every": 2,
        "optimiser": {"lr": 1e-2, "schedule": "constant"},
    }  # fmt: skip
    data = {
        "preferences": {"easy": str(place / "easy.jsonl"), "hard": str(place / "hard.jsonl")},
        "preferences_validation": str(place / "held-out.jsonl"), "max_prompt_tokens": 8,
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"), "threads": 1, "data": data,
        "decoding": {"max_new_tokens": 10}, "engine": {"student": "zero0"},
        "stages": tuple({**stage, "name": source, "sources": (source,)} for source in ("easy", "hard")),
    }  # fmt: skip
    return RunConfig(**values)


def stopped(settings: RunConfig, *, after: int) -> Path:
    """The folder of a run that a signal stopped after so many updates."""
    asked = [0]

    def agreed(self: Stops, ranks: Any) -> str:
        asked[0] += 1
        return "SIGTERM" if asked[0] == after else ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stops, "agreed", agreed)
        with pytest.raises(Stopped):
            distill(settings)
    return Path(settings.out) / settings.name


def outcome(folder: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The log without clocks, and the last student."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    log = [{name: value for name, value in json.loads(line).items() if name not in OF_THE_PROCESS} for line in lines]
    return log, load_file(folder / "student" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    (log, weights), (log_then, weights_then) = outcome(one), outcome(other)
    return log == log_then and all(torch.equal(weights[name], weights_then[name]) for name in weights)


@pytest.fixture(scope="module")
def unbroken(place: Path) -> dict[str, Path]:
    return {value: distill(config(place, f"unbroken-{value}", value)) for value in VALUES}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("after", [1, STEPS, STEPS + 1, STEPS + 2])
def test_a_run_stopped_inside_either_stage_ends_with_the_same_bits(
    place: Path, unbroken: dict[str, Path], after: int, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(place, f"after-{after}-{value}", value)
    stopped(settings, after=after)
    capsys.readouterr()
    folder = distill(settings)
    assert same(folder, unbroken[value])
    said = capsys.readouterr().out
    first = "hard" if after >= STEPS else "easy"
    again = after not in {STEPS}  # between the stages nothing was asked about the second one's pairs
    assert (f"stage {first}: log-probs of the reference from" in said) == (value == "dpo" and again)


@pytest.mark.parametrize("value", VALUES)
def test_a_reference_of_the_weights_that_go_on_would_be_seen(
    place: Path, unbroken: dict[str, Path], value: str
) -> None:
    """The control: the reference is made of the student as the checkpoint has it, and nothing stops that."""
    settings = config(place, f"current-{value}", value)
    folder = stopped(settings, after=STEPS + 2)
    prepared = stages.prepared

    def current(config: RunConfig, stage: Any, **more: Any) -> Any:
        best = folder / "student"  # published at the stage's second step, which is the one that was saved
        assert best.is_dir() and stage.name == "hard"
        card = more["card"].of_folder(best)
        return prepared(config, stage, **{**more, "card": card, "facts": inspect(card)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "prepared", current)
        with pytest.raises((CacheError, CheckpointError), match=r"reference|another model"):
            distill(settings)
        # And where nobody compares whose the numbers are:
        patch.setattr("minillm.preference_reference._require", lambda *_, **__: None)
        patch.setattr("minillm.preferences.Preferences.restore", lambda *_: None)
        (folder / "stages" / "hard" / "reference.json").unlink(missing_ok=True)
        distill(settings)
    assert not same(folder, unbroken[value])


def test_what_a_stage_kept_is_not_exchanged_behind_its_back(place: Path, unbroken: dict[str, Path]) -> None:
    """The first stage's numbers in the place of the second's."""
    settings = config(place, "exchanged", "dpo")
    folder = stopped(settings, after=STEPS + 1)
    notes = folder / "stages" / "hard" / "reference.json"
    right = notes.read_bytes()
    notes.write_bytes((folder / "stages" / "easy" / "reference.json").read_bytes())
    with pytest.raises(CacheError, match="of another model or of other pairs"):
        distill(settings)
    notes.write_bytes(right)
    assert same(distill(settings), unbroken["dpo"])


def test_a_file_that_is_gone_is_made_again_and_said_so(
    place: Path, unbroken: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(place, "gone", "dpo")
    folder = stopped(settings, after=STEPS + 1)
    (folder / "stages" / "hard" / "reference.json").unlink()
    capsys.readouterr()
    assert same(distill(settings), unbroken["dpo"])
    assert "once each again: the file is gone" in capsys.readouterr().out

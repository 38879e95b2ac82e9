"""Whole runs with stages that learn from pairs: each begins at its own reference, is validated, and says what it does.

1. Two stages of one run: the first loss of each is ln 2, and the second's reference is the first one's student.
2. Validation measures held-out pairs, decides on the student, and stops the stage.
3. A low-rank adapter, a teacher for soft targets, sources, and the alarm.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minillm import distill
from minillm.config import RunConfig, load_config
from minillm.errors import DataError, UnsupportedCombination
from minillm.loading import fingerprint
from minillm.pairs import check_pair
from minillm.preference_reading import pairs_in
from minillm.preference_stage import PreferenceStage
from minillm.run_splits import read_splits
from tests import tiny

LN_2 = math.log(2)
OPTIMISER = {"lr": 3e-3, "schedule": "constant"}
RECIPES = Path(__file__).parents[2] / "recipes" / "preference"


def save_pairs(file: Path, *, rows: int = 24, first: int = 0) -> Path:
    """The chosen response is the prompt backwards, the rejected one the prompt."""
    lines = []
    for number in range(first, first + rows):
        letters = [tiny.LETTERS[(number * 7 + step * 3) % 26] for step in range(2 + number % 4)]
        pair = {"prompt": " ".join(letters), "chosen": " ".join(letters[::-1]), "rejected": " ".join(letters)}
        lines.append(json.dumps({"id": f"pair-{number}", **pair}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("preferences")
    tiny.save_model(made / "student", "llama", seed=2)
    tiny.save_model(made / "teacher", "llama", seed=1)
    tiny.save_prompts(made / "prompts.jsonl")
    save_pairs(made / "easy.jsonl")
    save_pairs(made / "hard.jsonl", first=40)
    save_pairs(made / "held-out.jsonl", rows=9, first=80)
    return made


def stage(**changes: Any) -> dict[str, Any]:
    return {"kind": "preference", "steps": 3, "batch": 6, "micro_batch": 4, "optimiser": OPTIMISER, **changes}


def config(place: Path, *stages: dict[str, Any], name: str, **changes: Any) -> RunConfig:
    data = {
        "preferences": {"easy": str(place / "easy.jsonl"), "hard": str(place / "hard.jsonl")},
        "preferences_validation": str(place / "held-out.jsonl"), "max_prompt_tokens": 8, **changes.pop("data", {}),
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": name, "out": str(place / "runs"), "student": str(place / "student"), "data": data,
        "decoding": {"max_new_tokens": 10}, "engine": {"student": "zero0"}, "stages": stages, **changes,
    }  # fmt: skip
    return RunConfig(**values)


def trained(folder: Path, name: str = "preference") -> list[dict[str, Any]]:
    return [line for line in tiny.logged(folder) if line["stage"] == name]


@pytest.mark.parametrize("value", ["dpo", "tdpo1", "tdpo2"])
def test_the_first_loss_of_every_stage_is_ln_2(place: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [stage(name=name, value=value, sources=(name,), beta=0.5) for name in ("easy", "hard")]
    out = distill(config(place, *stages, name=f"two-{value}"))
    for name in ("easy", "hard"):
        lines = trained(out, name)
        assert abs(lines[0]["loss"] - LN_2) < 2e-6 and abs(lines[0]["chosen_log_ratio"]) < 2e-5
        assert lines[-1]["loss"] < LN_2 - 0.01
        assert all(0 <= line["accuracy"] <= 1 and line["entropy"] > 0 for line in lines)
        assert ("chosen_kl" in lines[0]) == (value != "dpo")
    said = capsys.readouterr().out
    assert f"stage easy: 24 pairs; {value}, link sigmoid, target hard (by default)" in said
    notes = {name: out / "stages" / name / "reference.json" for name in ("easy", "hard")}
    assert [file.is_file() for file in notes.values()] == [value == "dpo"] * 2
    if value == "dpo":
        weights = {name: json.loads(file.read_text())["version"]["weights"] for name, file in notes.items()}
        card = check_pair(config(place, stages[0], name="x")).student_card
        assert weights["easy"] == fingerprint(card)
        assert weights["hard"] == fingerprint(card.of_folder(out / "stages" / "easy" / "student"))


@pytest.mark.parametrize("value", ["dpo", "tdpo2"])
def test_in_bf16_the_first_loss_is_near_ln_2(place: Path, value: str) -> None:
    """What DPO keeps of its reference was read in other shapes, which bf16 rounds in other places."""
    run = config(
        place, stage(value=value, beta=0.5), name=f"bf16-{value}", engine={"student": "zero1", "precision": "bf16"}
    )
    first = trained(distill(run))[0]
    assert abs(first["loss"] - LN_2) < 0.005 and abs(first["chosen_log_ratio"]) < 0.02


def test_a_reference_that_is_not_the_stages_start_begins_elsewhere(place: Path) -> None:
    """The control: 'init from the first student', with the first reference."""
    from minillm import stages as module

    prepared = module.prepared

    def stale(config: RunConfig, stage: PreferenceStage, **more: Any) -> Any:
        card = check_pair(config).student_card
        return prepared(config, stage, **{**more, "card": card, "facts": check_pair(config).student})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "prepared", stale)
        stages = [stage(name=name, sources=(name,), beta=0.5) for name in ("easy", "hard")]
        out = distill(config(place, *stages, name="stale"))
    assert abs(trained(out, "easy")[0]["loss"] - LN_2) < 2e-6
    assert abs(trained(out, "hard")[0]["loss"] - LN_2) > 1e-3


def test_log_ratios_of_stages_add_up_to_that_of_the_run(place: Path) -> None:
    """Sum over stages of log M_t - log M_(t-1) is log M_T - log S where each stage's reference is what the one before
    handed on: so what stage two kept of its pairs is what M_1 says of them, asked anew, and not what S does."""
    settings = config(place, *(stage(name=name, sources=(name,), beta=0.5) for name in ("easy", "hard")), name="sum")
    out = distill(settings)
    kept = json.loads((out / "stages" / "hard" / "reference.json").read_text(encoding="utf-8"))
    pairs = [
        one for one in pairs_in(read_splits(settings, check_pair(settings))["preferences"]) if one.source == "hard"
    ]

    def said_by(folder: Path) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        found = []
        for one in pairs:
            ids = torch.tensor([[*one.prompt.ids, *one.chosen_ids]])
            with torch.no_grad():
                logq_TV = model(ids).logits[0, :-1].log_softmax(-1)
            logq_T = logq_TV.gather(1, ids[0, 1:, None])[:, 0]
            found.append(float(logq_T[len(one.prompt.ids) - 1 :].sum()))
        return found

    first, middle, last = map(said_by, (place / "student", out / "stages" / "easy" / "student", out / "student"))
    assert kept["chosen"] == pytest.approx(middle, abs=1e-4)
    card = (out / "student" / "README.md").read_text(encoding="utf-8")
    assert f"{len(pairs):,} rows used" in card and ", sources hard`" in card, "what the stage learnt from, and no more"
    assert max(abs(one - other) for one, other in zip(kept["chosen"], first, strict=True)) > 1e-2, "the control: S"
    assert max(abs(one - other) for one, other in zip(kept["chosen"], last, strict=True)) > 1e-2, "the control: M_2"


def test_validation_on_held_out_pairs_decides_and_stops(place: Path) -> None:
    out = distill(
        config(
            place, stage(steps=12, validate_every=1, patience=2, keep={"metric": "preference_loss"}, beta=2.0,
                         optimiser={"lr": 0.5, "schedule": "constant"}), name="held-out",
        )
    )  # fmt: skip
    lines = tiny.logged(out, "validation")
    assert {"preference_loss", "preference_accuracy", "preference_margin"} <= set(lines[0])
    assert all(0 <= line["preference_accuracy"] <= 1 for line in lines)
    done = json.loads((out / "run.json").read_text())["stages"]["preference"]
    losses = [line["preference_loss"] for line in lines]
    assert done["best"] == min(losses) and done["best_step"] == 1 + losses.index(min(losses))
    assert done["stopped_early"] and len(lines) < 12  # the rate is far too high


@pytest.mark.parametrize(("every", "read"), [(0, False), (3, True)])
def test_held_out_pairs_that_nobody_measures_on_are_not_read_and_told(
    place: Path, every: int, read: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    held = str(place / "held-out.jsonl") if read else "nowhere.jsonl"
    out = distill(
        config(place, stage(validate_every=every), name=f"idle-{every}", data={"preferences_validation": held})
    )
    said = capsys.readouterr().out
    assert ("preferences_validation: 9 pairs read" in said) == read
    words = "data.preferences_validation is not read; no stage that learns from pairs validates (validate_every 0)"
    assert (words in said) == (not read)
    made_from = json.loads((out / "run.json").read_text())["made_from"]
    assert ("preferences_validation prompts" in made_from) == read


def test_a_measure_of_prompts_may_decide_instead(place: Path) -> None:
    held = {"metric": "rouge_l", "mode": "max"}
    data = {"validation": str(place / "prompts.jsonl"), "validation_limit": 4, "preferences_validation": None}
    out = distill(config(place, stage(validate_every=3, keep=held), name="rouge", data=data))
    (line,) = tiny.logged(out, "validation")
    assert "rouge_l" in line and "preference_loss" not in line


def test_rows_to_validate_on_are_wanted_before_anything_is_read(place: Path) -> None:
    with pytest.raises(UnsupportedCombination, match=r"data\.preferences_validation"):
        config(place, stage(validate_every=1), name="x", data={"preferences_validation": None})


def test_a_source_that_is_not_there_is_told(place: Path) -> None:
    with pytest.raises(DataError, match=r"no pair is of source 'esay'; did you mean 'easy'"):
        distill(config(place, stage(sources=("esay",)), name="unknown"))


def save_taught(file: Path, pairs: Path) -> Path:
    """The same pairs with log-probabilities of a teacher."""
    lines = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    taught = [json.dumps({**line, "teacher_logps": [-5.0, -7.0]}) for line in lines]
    file.write_text("\n".join(taught) + "\n", encoding="utf-8")
    return file


def test_targets_that_nothing_gives_are_refused_before_a_model_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the second stage too, and of validation pairs."""
    from minillm import stages as module

    def loads(*_: Any, **__: Any) -> None:
        pytest.fail("a model is loaded")

    for name in ("load", "prepared", "load_teacher"):
        monkeypatch.setattr(module, name, loads)
    stages = [stage(name="first"), stage(name="second", target="soft", sources=("hard",))]
    with pytest.raises(UnsupportedCombination, match=r"stage second: target 'soft', but 24 of 24 pairs of data"):
        distill(config(place, *stages, name="untaught"))
    taught = {"preferences": str(save_taught(place / "taught.jsonl", place / "easy.jsonl"))}
    with pytest.raises(UnsupportedCombination, match=r"9 of 9 pairs of data\.preferences_validation"):
        distill(config(place, stage(target="soft", validate_every=1), name="untaught", data=taught))
    assert not (place / "runs" / "untaught").exists()


def test_a_default_is_not_soft_where_held_out_pairs_could_not_be(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = {"preferences": str(save_taught(place / "taught.jsonl", place / "easy.jsonl"))}
    for name, every, want in (("held-out-bare", 3, "hard"), ("no-held-out", 0, "soft")):
        distill(config(place, stage(validate_every=every), name=name, data=taught))
        assert f"target {want} (by default)" in capsys.readouterr().out


def test_a_teacher_that_nothing_else_needs_is_loaded_for_soft_targets_alone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = distill(config(place, stage(target="soft", sources=("easy",)), name="soft", teacher=str(place / "teacher")))
    said = capsys.readouterr().out
    assert "asked the teacher about 48 responses, once each" in said and "target soft\n" in said
    assert (out / "stages" / "preference" / "teacher.json").is_file()
    hard = distill(config(place, stage(sources=("easy",)), name="hard-labels", teacher=str(place / "teacher")))
    assert "asked the teacher" not in capsys.readouterr().out
    assert trained(out)[-1]["loss"] != trained(hard)[-1]["loss"]


def test_an_adapter_learns_beside_its_base(place: Path) -> None:
    pytest.importorskip("peft")
    stages = [stage(name=name, sources=(name,), beta=0.5) for name in ("easy", "hard")]
    out = distill(config(place, *stages, name="lora", lora={"rank": 4, "alpha": 8}))
    for name in ("easy", "hard"):
        assert abs(trained(out, name)[0]["loss"] - LN_2) < 5e-6
        assert trained(out, name)[-1]["loss"] < LN_2
    assert (out / "student" / "adapter").is_dir()


def test_the_alarm_rings_where_chosen_responses_fall(place: Path) -> None:
    for name, limit in (("near", 1e-6), ("far", 1e6)):
        alarms = {"chosen_floor": {"limit": limit}}
        wild = {"lr": 0.05, "schedule": "constant"}
        out = distill(config(place, stage(steps=8, alarms=alarms, optimiser=wild, beta=1.0), name=f"alarm-{name}"))
        rung = tiny.logged(out, "alarm")
        low = min(line["chosen_log_ratio"] for line in trained(out))
        assert low < -1.0, "the run of this test is to go wrong"
        assert [line["name"] for line in rung] == (["chosen_floor"] if name == "near" else [])
    words = next(iter(tiny.logged(place / "runs" / "alarm-near", "alarm")))["words"]
    assert "chosen_log_ratio is -" in words and "sft_weight" in words


def test_a_run_of_one_chunk_is_dpo_bit_for_bit(place: Path) -> None:
    found = []
    for name, sources in (("all", None), ("chunk", ("easy", "hard"))):
        out = distill(config(place, stage(sources=sources), name=f"one-{name}"))
        found.append(load_file(out / "student" / "model.safetensors"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", ["dpo", "soft_dpo", "tdpo1", "tdpo2"])
def test_a_recipe_trains_what_its_name_says(name: str) -> None:
    """An implementation whose command for one trained the other is why this is asked."""
    (chosen,) = [one for one in load_config(RECIPES / f"{name}.yaml").stages if isinstance(one, PreferenceStage)]
    assert chosen.value == name.removeprefix("soft_")
    assert chosen.target == ("soft" if name == "soft_dpo" else "hard")
    assert chosen.alpha == 0.5

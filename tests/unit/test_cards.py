"""Promises of cards and engine settings:

1. a name means the same in this order: model folder, file, card, hub name; anything else names the nearest card;
2. every shipped card and engine file is read, and engine files hold engine settings only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm import cards
from minillm.cards import Card, find_engine_settings, known_names, load_card
from minillm.config import load_config
from minillm.errors import ConfigError, UnsupportedCombination

ROOT = Path(cards.__file__).parent.parent
SHIPPED = [(kind, path.stem) for kind in ("teachers", "students") for path in sorted((ROOT / kind).glob("*.yaml"))]
ENGINES = sorted((ROOT / "ds_configs").glob("*.json"))
DECIDED_ELSEWHERE = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "lr",
    "gradient_clipping", "scheduler", "fp16", "bf16",
}  # fmt: skip
BUILD = {"architecture": "llama", "tokenizer": "world"}


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problem(name: str, kind: cards.Kind = "students") -> str:
    with pytest.raises(ConfigError) as caught:
        load_card(name, kind=kind)
    return str(caught.value)


def test_the_globs_saw_the_shipped_files() -> None:
    assert {name for _, name in SHIPPED} >= {
        "micro-world-64x3", "micro-world-16x1", "gpt2", "qwen2.5-0.5b", "micro-world", "gpt2-xl", "qwen2.5-7b",
    }  # fmt: skip
    assert {path.stem for path in ENGINES} >= {"zero0", "zero1", "zero2", "zero3", "teacher-zero3", "teacher-offload"}


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_shipped_cards_are_found_from_any_folder(kind: cards.Kind, name: str) -> None:
    card = load_card(name, kind=kind)
    assert card == load_card(f"{kind}/{name}", kind=kind) == load_card(f"{name}.yaml", kind=kind)
    assert card == load_card(str(ROOT / kind / f"{name}.yaml"), kind=kind)
    assert card.name == name
    assert card.licence
    assert card.notes
    assert card.figures.layers and card.figures.hidden and card.figures.positions


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_name_cards_that_exist(path: Path) -> None:
    run = load_config(path)
    if not run.student.startswith("runs/"):
        load_card(run.student, kind="students")
    if run.teacher is not None:
        load_card(run.teacher, kind="teachers")
    find_engine_settings(run.engine.student)


def test_the_micro_world_heads_divide() -> None:
    for name in ("micro-world-64x3", "micro-world-16x1"):
        card = load_card(name, kind="students")
        assert card.build is not None
        hidden, heads = card.build.config["hidden_size"], card.build.config["num_attention_heads"]
        assert int(hidden) % (2 * int(heads)) == 0  # rotary positions turn pairs
        assert card.figures.hidden == hidden


def test_a_model_folder_wins(working_folder: Path) -> None:
    write(working_folder / "gpt2" / "config.json", "{}")
    assert load_card("gpt2", kind="students") == Card(name="gpt2", model="gpt2")
    assert load_card("students/gpt2", kind="students").model == "openai-community/gpt2"


def test_the_working_folder_wins_over_the_package(working_folder: Path) -> None:
    write(working_folder / "students" / "gpt2.yaml", "model: mine")
    assert load_card("gpt2", kind="students").model == "mine"


def test_an_explicit_folder_wins_over_the_kind() -> None:
    assert load_card("teachers/gpt2-xl", kind="students").model == "openai-community/gpt2-xl"


def test_one_slash_and_no_card_is_a_hub_name() -> None:
    assert load_card("owner/model-1", kind="teachers") == Card(name="model-1", model="owner/model-1")


def test_a_misspelt_path_is_not_taken_for_a_hub_name(working_folder: Path) -> None:
    assert load_card("runs/x", kind="students").model == "runs/x"  # negative control: without the folder it is
    (working_folder / "runs").mkdir()
    assert "the folder 'runs' here hides it" in problem("runs/x")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt3", "did you mean 'gpt2'?"),
        ("teachers/gpt3-xl", "in teachers/; did you mean 'gpt2-xl'?"),
        ("zzzz", "known cards: bench-1.3b, bench-4m, bench-gpt2, gemma-2-2b, "),
        ("", "known cards: bench-1.3b, bench-4m, bench-gpt2, gemma-2-2b, "),
        ("runs/a/b/student", "finish that run first"),
        ("../../etc/passwd", "no card of that name"),
        ("students/../../x", "no card of that name"),
        ("owner/model.yaml", "no card of that name"),
        ("./x", "no card of that name"),
    ],
)
def test_an_unknown_name_is_refused(name: str, words: str) -> None:
    assert words in problem(name)


def test_a_folder_that_is_no_model_is_told(working_folder: Path) -> None:
    (working_folder / "empty").mkdir()
    assert "a folder without config.json" in problem("empty")


def test_a_card_is_called_as_its_file(working_folder: Path) -> None:
    write(working_folder / "x.yaml", "{name: y, model: m}")
    assert problem("x.yaml") == "x.yaml: name: got 'y', wanted 'x' as the file is called; leave it out"


def test_a_broken_card_is_named(working_folder: Path) -> None:
    write(working_folder / "students" / "x.yaml", "modell: m\ndtype: float16\n")
    message = problem("x")
    assert message.startswith("students/x.yaml: 2 problems\n")
    assert "modell: no setting of this name; did you mean 'model'?" in message
    write(working_folder / "students" / "x.yaml", "model: m\nmodel: n\n")
    assert problem("x").startswith("students/x.yaml:2:1: key 'model' is given twice")
    write(working_folder / "students" / "x.yaml", "")
    assert "holds nothing" in problem("x")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "got neither, wanted exactly one"),
        ({"model": "m", "build": BUILD}, "got both, wanted exactly one"),
        ({"build": BUILD, "revision": "v1"}, "'revision' names a version of a hub model"),
    ],
)
def test_a_card_is_loaded_or_built(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedCombination, match=words):
        Card(name="x", **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"build": {**BUILD, "architecture": "lama"}},
            "build.architecture: got 'lama', wanted .* did you mean 'llama'",
        ),
        ({"build": {**BUILD, "config": {"vocab_size": 5}}}, "config.vocab_size: comes from the tokenizer"),
        ({"build": {**BUILD, "config": {"x": [5]}}}, "build.config.x: got list, wanted a number"),
        ({"model": "m", "figures": {"layer": 3}}, "figures.layer: no setting of this name; did you mean 'layers'"),
        (
            {"model": "m", "placement": "zeroo"},
            "^placement: got 'zeroo', wanted 'replicated', 'zero3' or 'offload'; did you mean 'zero3'",
        ),
        ({"model": "m", "placement": 3}, "^placement: got 3, wanted 'replicated', 'zero3' or 'offload'$"),
        ({"model": "m", "figures": {"layers": 0}}, "figures.layers: got 0, wanted a number of at least 1"),
    ],
)
def test_wrong_card_values_are_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Card(name="x", **values)


def test_a_placement_that_is_refused_later_is_read() -> None:
    assert Card(name="x", model="m", placement="tp").placement == "tp"


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_engine_files_hold_engine_settings_only(path: Path) -> None:
    assert DECIDED_ELSEWHERE.isdisjoint(keys_of(json.loads(path.read_text(encoding="utf-8"))))


def test_a_forbidden_engine_setting_is_noticed_at_any_depth() -> None:
    bad = {"zero_optimization": {"stage": 0}, "x": [{"params": {"lr": 1}}]}
    assert not DECIDED_ELSEWHERE.isdisjoint(keys_of(bad))


@pytest.mark.parametrize("path", ENGINES, ids=lambda path: path.stem)
def test_engine_files_say_the_stage_of_their_name(path: Path) -> None:
    zero = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]
    if path.stem == "teacher-offload":
        assert zero["stage"] == 3 and "offload_param" in zero and "offload_optimizer" not in zero
        return
    stem = path.stem.removesuffix("-offload")
    assert stem.endswith(f"zero{zero['stage']}")
    assert (stem != path.stem) == ("offload_optimizer" in zero) >= ("offload_param" in zero)
    if zero["stage"] == 3:
        assert zero["stage3_param_persistence_threshold"] == 0


def test_deepspeed_knows_every_engine_setting() -> None:
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config", reason="deepspeed is not installed")
    for path in ENGINES:
        zero_config.DeepSpeedZeroConfig(**json.loads(path.read_text(encoding="utf-8"))["zero_optimization"])
    with pytest.raises(ValueError, match="stage9"):  # negative control: a misspelt setting would not pass
        zero_config.DeepSpeedZeroConfig(stage=3, stage9_x=0)


def test_engine_settings_are_found_by_name_and_path(working_folder: Path) -> None:
    assert json.loads(find_engine_settings("zero2").read_text(encoding="utf-8"))["zero_optimization"]["stage"] == 2
    assert find_engine_settings("ds_configs/zero2.json").read_text() == find_engine_settings("zero2").read_text()
    write(working_folder / "mine" / "fast.json", '{"a": 1}')
    assert find_engine_settings("mine/fast.json").read_text() == '{"a": 1}'
    with pytest.raises(ConfigError, match="no such name in ds_configs/; did you mean 'zero"):
        find_engine_settings("zero4")


def test_known_names_are_sorted_and_single(working_folder: Path) -> None:
    write(working_folder / "students" / "gpt2.yaml", "model: mine")
    names = known_names("students", suffix=".yaml")
    assert names == sorted(set(names))
    assert "gpt2" in names

"""Promises of the figures on cards:

1. a model built on no device from a card's figures has exactly the published number of weights;
2. figures that do not fit together are refused;
3. the published settings of a card are stages that a run takes, with a global batch that no number of GPUs changes;
4. a tokenizer that ends text otherwise than the card says is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import cards
from minillm.cards import Card, load_card
from minillm.config import RunConfig
from minillm.errors import ConfigError, ModelError
from minillm.figures import Figures, SftTraining, Training, stages_yaml
from minillm.loading import inspect
from minillm.meta_models import count_parameters, meta_model
from minillm.shapes import config_of
from minillm.stage_config import MinillmStage, SftStage
from minillm.yaml_reader import read_yaml

ROOT = Path(cards.__file__).parent.parent
SHIPPED: list[tuple[cards.Kind, str]] = [
    (kind, path.stem) for kind in ("teachers", "students") for path in sorted((ROOT / kind).glob("*.yaml"))
]
FROM_HUB = [(kind, name) for kind, name in SHIPPED if (load_card(name, kind=kind).model or "").count("/") == 1]
TRAINED = [(kind, name) for kind, name in SHIPPED if load_card(name, kind=kind).training is not None]
BUILT = [(k, n) for k, n in SHIPPED if (build := load_card(n, kind=k).build) and build.tokenizer == "world"]
FAMILIES = {
    "teachers": {"gpt2-xl", "opt-13b", "llama-13b", "qwen2.5-7b", "qwen2.5-14b", "qwen3-8b", "qwen3-14b"}
    | {"llama-3.1-8b", "gemma-2-9b", "gemma-3-1b"},
    "students": {"gpt2", "gpt2-medium", "gpt2-large", "opt-1.3b", "opt-2.7b", "opt-6.7b", "llama-7b"}
    | {"qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b"}
    | {"llama-3.2-1b", "llama-3.2-3b", "gemma-2-2b", "gemma-3-1b"},
}


def count(figures: Figures) -> int:
    return count_parameters(meta_model(config_of(Card(name="x", model="x/y", figures=figures))))


def test_every_family_has_its_cards() -> None:
    for kind, names in FAMILIES.items():
        assert {name for of, name in FROM_HUB if of == kind} == names


@pytest.mark.parametrize(("kind", "name"), FROM_HUB)
def test_the_model_of_a_card_has_the_published_number_of_weights(kind: cards.Kind, name: str) -> None:
    figures = load_card(name, kind=kind).figures
    assert figures.complete and figures.parameters and figures.layers
    assert count(figures) == figures.parameters
    less = Figures(**{**figures.model_dump(exclude_none=True), "layers": figures.layers - 1})  # negative control
    assert count(less) < figures.parameters


@pytest.mark.parametrize(("kind", "name"), BUILT)
def test_a_card_with_build_has_a_shape_without_figures_of_an_architecture(kind: cards.Kind, name: str) -> None:
    card = load_card(name, kind=kind)
    assert config_of(card).num_hidden_layers == card.figures.layers
    assert count_parameters(meta_model(config_of(card))) > 0


def test_a_configuration_stays_as_it_was() -> None:
    config = config_of(Card(name="x", model="x/y", figures=Figures(**SMALL)))
    before = repr(vars(config))
    meta_model(config)
    assert repr(vars(config)) == before
    with torch.device("meta"):  # the control: transformers writes its choice of attention into what it is given
        AutoModelForCausalLM.from_config(config)
    assert repr(vars(config)) != before


def test_a_card_that_says_too_little_is_told() -> None:
    with pytest.raises(ModelError, match="no figures with an architecture"):
        config_of(Card(name="x", model="owner/x", figures=Figures(layers=2, hidden=8)))


DATA: Any = {
    "data": {"train": "a.jsonl", "validation": "b.jsonl", "max_prompt_tokens": 256},
    "decoding": {"max_new_tokens": 256},
}
SMALL: dict[str, Any] = {
    "architecture": "llama", "layers": 1, "hidden": 64, "heads": 4, "intermediate": 128, "vocabulary": 100,
    "positions": 64, "tied": True,
}  # fmt: skip


def test_what_is_left_out_is_implied() -> None:
    implied = {"kv_heads": 4, "head_dim": 16}
    assert Figures(**SMALL).config_fields() == Figures(**SMALL, **implied).config_fields()
    assert count(Figures(**{**SMALL, "kv_heads": 2})) < count(Figures(**SMALL))
    assert count(Figures(**{**SMALL, "tied": False})) == count(Figures(**SMALL)) + 64 * 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intermediate": None}, "intermediate: is missing"),
        ({"projection": 32}, "projection: a llama has no such size"),
        ({"kv_heads": 3}, "do not divide"),
        ({"heads": 5}, "do not divide"),
        ({"layer": 1}, "did you mean 'layers'"),
        ({"architecture": "gpt3"}, "gpt2"),
    ],
)
def test_figures_that_do_not_fit_together_are_refused(change: dict[str, Any], words: str) -> None:
    values = {name: value for name, value in {**SMALL, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=words):
        Figures(**values)


@pytest.mark.parametrize(("kind", "name"), TRAINED)
def test_published_settings_are_stages_of_a_run(kind: cards.Kind, name: str) -> None:
    training = load_card(name, kind=kind).training
    assert training is not None and training.minillm is not None
    stages: Any = read_yaml(stages_yaml(training), source="printed")
    run = RunConfig(name="x", student=name, teacher="gpt2-xl", **DATA, **stages)
    sft, ours = run.stages
    assert isinstance(sft, SftStage) and isinstance(ours, MinillmStage)
    assert sft.batch == training.sft.batch and ours.prompts == training.minillm.rollouts
    # The rows of an update are the published global batch, whatever ranks there are.
    assert ours.prompts / ours.inner_batches == training.minillm.batch
    assert training.minillm.updates <= ours.steps * ours.updates_per_step < training.minillm.updates + 16


def test_epochs_become_steps_by_the_rows() -> None:
    training = Training(sft=SftTraining(lr=1e-4, epochs=3, batch=8, source="me"))
    assert "steps: 4\n" in stages_yaml(training, rows=10)
    assert "minillm" not in stages_yaml(training, rows=10)


def test_recomputed_activations_are_the_published_engine_setting() -> None:
    """They were on the cards and nowhere in what is to be copied."""
    for name, on in (("llama-7b", True), ("gpt2", False)):
        training = load_card(name, kind="students").training
        assert training is not None and training.minillm is not None
        assert training.minillm.activation_checkpointing is on
        copied: Any = read_yaml(stages_yaml(training), source="printed")
        assert copied.get("engine") == ({"activation_checkpointing": True} if on else None)
        engine = RunConfig(name="x", student=name, teacher="gpt2-xl", **DATA, **copied).engine
        assert engine.activation_checkpointing is on


def test_the_students_of_the_paper_have_its_settings() -> None:
    assert {name for _, name in TRAINED} >= {
        *("gpt2", "gpt2-medium", "gpt2-large", "opt-1.3b", "opt-2.7b", "opt-6.7b", "llama-7b", "qwen2.5-1.5b"),
    }


def test_another_end_than_the_card_says_is_refused() -> None:
    build = {"architecture": "llama", "tokenizer": "world", "config": {"hidden_size": 16, "num_attention_heads": 2}}
    facts = inspect(Card(name="x", build=build))  # type: ignore[arg-type]
    eos = facts.tokenizer.eos_token
    inspect(Card(name="x", build=build, eos=eos))  # type: ignore[arg-type]
    for what in ("eos", "pad"):
        with pytest.raises(ModelError, match=f"the card says {what} '<x>'"):
            inspect(Card(name="x", build=build, **{what: "<x>"}))  # type: ignore[arg-type]


def test_the_command_shows_every_card_and_stages_to_copy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from minillm import cli

    monkeypatch.setenv("COLUMNS", "120")

    assert cli._guarded(lambda **options: cli.app(["cards"], **options)) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for _, name in SHIPPED) and "13.02 B" in listed
    assert cli._guarded(lambda **options: cli.app(["cards", "students/gpt2", "--rows", "320"], **options)) == 0
    shown = capsys.readouterr().out
    assert "parameters: 124,439,808" in shown and "openai-community/gpt2" in shown
    stages: Any = read_yaml("stages:" + shown.split("stages:", 1)[1], source="copied")
    assert [stage["steps"] for stage in stages["stages"]] == [200, 1250]
    assert cli._guarded(lambda **options: cli.app(["cards", "gpt9"], **options)) == 2

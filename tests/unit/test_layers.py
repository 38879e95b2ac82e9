"""A student of some of a model's layers: the model that one would make by hand of them, with a cache too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minillm import distill
from minillm.cards import Card, load_card
from minillm.errors import ConfigError, ModelError, UnsupportedCombination
from minillm.loading import fingerprint, inspect, load
from minillm.models import CausalLM, ModelReader
from minillm.yaml_reader import write_yaml
from tests import quick, tiny

LAYERS = (3, 0, 4)
PLACE = {"gpt2": "transformer.h.", "opt": "model.decoder.layers.", "llama": "model.layers.", "qwen2": "model.layers."}
NEAR = 1e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five layers of every family."""
    folder = tmp_path_factory.mktemp("layers")
    with pytest.MonkeyPatch.context() as patch:
        for family in tiny.FAMILIES:
            sizes = {**tiny.SIZES[family], "n_layer" if family == "gpt2" else "num_hidden_layers": 5}
            if family == "qwen2":
                sizes |= {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
            patch.setitem(tiny.SIZES, family, sizes)
            tiny.save_model(folder / family, family, seed=3)
    tiny.save_prompts(folder / "prompts.jsonl")
    return folder


def by_hand(folder: Path, family: str, layers: tuple[int, ...]) -> Any:
    """A model of the family with so many layers, and the weights of those."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    state = {}
    for name, weight in whole.state_dict().items():
        head, found, rest = name.partition(PLACE[family])
        if not found:
            state[name] = weight
            continue
        number, _, tail = rest.partition(".")
        if int(number) in layers:
            state[f"{head}{found}{layers.index(int(number))}.{tail}"] = weight
    model.load_state_dict(state, strict=True)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(2, 20).view(2, 9)).logits
    return found


def picked(folder: Path, layers: tuple[int, ...] = LAYERS) -> Any:
    card = Card(name="picked", model=str(folder), layers=layers)
    return load(card, inspect(card), seed=0).eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_the_model_made_by_hand(models: Path, family: str) -> None:
    found = picked(models / family)
    torch.testing.assert_close(logits(found), logits(by_hand(models / family, family, LAYERS)), rtol=0, atol=NEAR)
    for other in ((0, 3, 4), (3, 0, 2)):
        assert float((logits(found) - logits(picked(models / family, other))).abs().max()) > 0.01, "the control"
    assert found.config.num_hidden_layers == len(LAYERS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decoding_with_a_cache_is_the_forward(models: Path, family: str) -> None:
    model = picked(models / family)
    reader = ModelReader(CausalLM(model), device=torch.device("cpu"), lockstep=False)
    ids_BL = torch.arange(2, 20).view(2, 9)
    cache, states = None, []
    for column in range(ids_BL.shape[1]):
        mask_BL = torch.ones(2, column + 1, dtype=torch.bool)
        hidden_B1H, cache = reader.extend(ids_BL[:, column : column + 1], mask_BL, cache)
        states.append(hidden_B1H)
    stepwise = reader.logits(torch.cat(states, dim=1).flatten(0, 1))
    torch.testing.assert_close(stepwise, logits(model).flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_control_layers_that_keep_their_numbers_have_no_place_in_a_cache(models: Path) -> None:
    model = picked(models / "llama")
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0
    reader = ModelReader(CausalLM(model), device=torch.device("cpu"), lockstep=False)
    ids_BL = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        first, _ = reader.extend(ids_BL[:, :5], torch.ones(2, 5, dtype=torch.bool), None)
    assert (
        float((reader.logits(first.flatten(0, 1)) - logits(picked(models / "llama"))[:, :5].flatten(0, 1)).abs().max())
        > 0.01
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_published_is_an_ordinary_folder(models: Path, tmp_path: Path, family: str) -> None:
    picked(models / family).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(picked(models / family)), rtol=0, atol=NEAR)
    types = getattr(again.config, "layer_types", None)
    whole = getattr(AutoConfig.from_pretrained(models / family), "layer_types", None)
    assert types is None or types == [whole[layer] for layer in LAYERS]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_run_starts_from_layers_of_its_teacher(models: Path, tmp_path: Path, stage: str) -> None:
    values = {"model": str(models / "qwen2"), "layers": [0, 2, 4]}
    (tmp_path / "short.yaml").write_text(write_yaml(values), encoding="utf-8")
    config = tiny.minillm_config(
        tmp_path, teacher=models / "qwen2", student=tmp_path / "short.yaml", prompts=models / "prompts.jsonl",
        name=stage, optimiser={"lr": 1e-9}, run_engine={"student": stage},
    )  # fmt: skip
    with quick.undrawn():
        folder = distill(config)
    published = AutoModelForCausalLM.from_pretrained(folder / "student").eval()
    start = logits(by_hand(models / "qwen2", "qwen2", (0, 2, 4)))
    torch.testing.assert_close(logits(published), start, rtol=1e-3, atol=1e-3)


def test_the_fingerprint_is_of_the_layers_too(models: Path) -> None:
    prints = {
        fingerprint(Card(name="it", model=str(models / "gpt2"), layers=layers))
        for layers in (None, (0, 1), (1, 0), (0, 1, 2, 3, 4))
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("layers", "words"),
    [((), "wanted one layer or more"), ((1, 1), "each once"), ((-1,), "layers.0")],
)
def test_layers_that_are_no_choice_are_refused_by_the_card(layers: tuple[int, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Card(name="it", model="somewhere", layers=layers)


def test_layers_of_a_model_that_is_built_are_refused(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text("build: {architecture: llama, tokenizer: world}\nlayers: [0]\n", encoding="utf-8")
    with pytest.raises(UnsupportedCombination, match="'layers' is of a model that is loaded"):
        load_card(str(tmp_path / "it.yaml"), kind="students")


def test_a_layer_that_is_not_there_is_refused_before_weights_are_read(models: Path) -> None:
    with pytest.raises(ModelError, match="it has no layer 5; wanted numbers from 0 to 4"):
        inspect(Card(name="it", model=str(models / "gpt2"), layers=(0, 5)))

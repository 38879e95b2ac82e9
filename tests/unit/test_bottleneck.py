"""A student that learns by a small MLP beside that of each block.

1. It begins as its base to the bit, and only the adapter trains, in every stage of a run.
2. What is handed on is an ordinary model whose MLPs are wider, and the adapter on the base is the same model.
3. What cannot be adapted, and what is no such adapter, is refused before any weight is read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from minillm import bottleneck, distill, student_engine
from minillm.adaptation import adaptation_of, kept_adapter
from minillm.bottleneck import Bottleneck, Units
from minillm.cards import Card
from minillm.config import BottleneckConfig, RunConfig
from minillm.errors import ConfigError, MinillmError, ModelError, RunExists, UnsupportedCombination
from minillm.loading import fingerprint, inspect, load
from minillm.merging import merge_adapter
from minillm.mlps import FORMS, mlps, width_of
from minillm.models import CausalLM
from minillm.optimisers import learning_rate_factor
from minillm.pairs import check_pair
from minillm.store import RunFolder
from minillm.yaml_reader import write_yaml
from tests import quick, tiny
from tests.broken_off import assert_it_goes_on_to_the_same_bits

SIZE = 5
SFT = {"kind": "sft", "steps": 3, "batch": 6, "optimiser": {"lr": 1e-2}}
MINILLM = {"kind": "minillm", "steps": 3, "prompts": 6, "teacher_mix": 0.2, "optimiser": {"lr": 1e-2}}
NEAR = 1e-5
HALF = {"student": "zero1", "precision": "bf16"}
IDS = torch.arange(2, 20).view(2, 9)


def tiny_config(family: str) -> PreTrainedConfig:
    """A model of any architecture that we know, with its own biases, norms and scales."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8} if len(FORMS[family].reads) > 1 else {}
    sizes |= {} if family == "gpt2" else {FORMS[family].width: 24}
    sizes |= {"word_embed_proj_dim": 16} if family == "opt" else {}
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return AutoConfig.for_model(family, vocab_size=30, **ids, **sizes)


def made(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with weights, gains and biases that are none of them what an initialisation makes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
        stir(model.parameters())
    return model


def stir(parameters: Any) -> None:
    with torch.no_grad():
        for weight in parameters:
            weight.add_(torch.randn_like(weight) * 0.2)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits[:, :, : len(tiny.WORDS)]
    return found


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def put_on(model: PreTrainedModel, *, size: int = SIZE, seed: int = 3) -> Bottleneck:
    made_by = adaptation_of(BottleneckConfig(size=size), seed=seed, base="it")
    assert isinstance(made_by, Bottleneck)
    made_by.put_on(model)
    return made_by


def trained(family: str) -> tuple[PreTrainedModel, Bottleneck]:
    model = made(tiny_config(family))
    adaptation = put_on(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        stir(p for p in model.parameters() if p.requires_grad)
    return model, adaptation


def merged(model: PreTrainedModel, adaptation: Bottleneck) -> PreTrainedModel:
    root = CausalLM(model)
    state = {name: p.detach() for name, p in root.named_parameters(remove_duplicate=False)}
    wide: PreTrainedModel = AutoModelForCausalLM.from_config(adaptation.merged_config(model.config)).eval()
    found = adaptation.merged(state, root)
    other = CausalLM(wide)
    assert found.keys() == dict(other.named_parameters(remove_duplicate=False)).keys()
    other.load_state_dict(found, strict=False)
    return wide


@pytest.mark.parametrize("family", FORMS)
def test_it_begins_as_its_base_to_the_bit_and_draws_nothing_from_the_common_stream(family: str) -> None:
    model = made(tiny_config(family))
    before, state = logits(model), torch.get_rng_state()
    put_on(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", FORMS)
def test_only_the_adapter_has_gradients_and_all_of_it_learns(family: str) -> None:
    model, adaptation = trained(family)
    model(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if adaptation.is_adapter(name)} != set()
    assert all(p.grad is None or bool(p.grad.abs().max() > 0) for p in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adaptation.parameters(tiny_config(family))


@pytest.mark.parametrize("family", FORMS)
def test_the_merged_model_is_the_adapted_one_and_wider(family: str) -> None:
    model, adaptation = trained(family)
    wide = merged(model, adaptation)
    torch.testing.assert_close(logits(wide), logits(model), rtol=NEAR, atol=NEAR)
    assert float((logits(made(tiny_config(family))) - logits(wide)).abs().max()) > 0.05, "the adapter says something"
    assert width_of(wide.config) == width_of(model.config) + SIZE
    mlps(wide)  # each block has the width that the configuration says


@pytest.mark.parametrize(
    ("family", "parameter", "wrong"),
    [
        ("gpt2", "c_fc.bias", torch.zeros_like),  # D without its bias
        ("opt", "fc1.bias", torch.zeros_like),
        ("gpt2", "c_proj.weight", lambda t: t.flip(1)),  # U's columns in another order than D's rows
        ("llama", "gate_proj.weight", lambda t: t.flip(0)),  # gates beside other units than their own
        ("llama", "down_proj.weight", torch.zeros_like),
    ],
)
def test_control_units_that_are_appended_otherwise_are_another_model(
    family: str, parameter: str, wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adaptation = trained(family)
    those = {p.data_ptr() for name, p in model.named_parameters() if name.endswith(f".bottleneck.{parameter}")}
    append = bottleneck.widened  # type: ignore[attr-defined]
    assert those

    def otherwise(own: Tensor, added: Tensor, **how: Any) -> Tensor:
        return append(own, wrong(added) if added.data_ptr() in those else added, **how)

    monkeypatch.setattr(bottleneck, "widened", otherwise)
    assert float((logits(merged(model, adaptation)) - logits(model)).abs().max()) > 1e-3


def test_the_rows_that_read_are_of_the_seed_and_the_mlp_s_name() -> None:
    def first(seed: int) -> list[Tensor]:
        model = made(tiny_config("llama"))
        put_on(model, seed=seed)
        return [p.detach() for name, p in model.named_parameters() if name.endswith("bottleneck.up_proj.weight")]

    one, again, other = first(1), first(1), first(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0]) and not torch.equal(one[0], one[1])


def test_dropout_of_an_mlp_falls_on_its_units_too() -> None:
    """As in the wider model: where all of what an MLP says is dropped, its units say nothing either."""
    model, _ = trained("gpt2")
    block: Any = model.get_submodule("transformer.h.0.mlp")
    block.train()
    block.dropout.p = 1.0
    assert not bool(block(torch.ones(1, 2, 16)).any())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bottleneck")
    for family in tiny.FAMILIES:
        tiny.save_model(folder / f"teacher-{family}", family, seed=1, rows=31)
        tiny.save_model(folder / family, family, seed=2, rows=30, tied=family != "llama")
    tiny.save_prompts(folder / "prompts.jsonl")
    return folder


def config(inputs: Path, family: str = "gpt2", *, name: str, stages: Any = (SFT, MINILLM), **more: Any) -> RunConfig:
    return tiny.minillm_config(
        inputs / "runs", teacher=inputs / f"teacher-{family}", student=inputs / family,
        prompts=inputs / "prompts.jsonl", name=name, run_stages=tuple(stages),
        **{f"run_{key}": value for key, value in {"bottleneck": {"size": SIZE}, **more}.items()},
    )  # fmt: skip


Seen = dict[str, list[dict[str, Tensor]]]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def run(inputs: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path, Seen]]:
    """(Base, run's folder, what each engine had at its start and end): sft, then minillm."""
    seen: Seen = {"start": [], "end": []}

    class Watched(student_engine.Student):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            seen["start"].append(weights(self))

        def close(self) -> None:
            seen["end"].append(weights(self))
            super().close()

    with pytest.MonkeyPatch.context() as patch, quick.undrawn():
        patch.setattr("minillm.stages.Student", Watched)
        yield inputs / request.param, distill(config(inputs, request.param, name=request.param)), seen


def weights(student: student_engine.Student) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in student.root.named_parameters()}


def test_the_adapter_changes_and_the_base_does_not_by_a_bit(run: tuple[Path, Path, Seen]) -> None:
    base, _, seen = run
    whole = {name.partition(".")[2]: p for name, p in CausalLM(opened(base)).named_parameters()}
    for start, end in zip(seen["start"], seen["end"], strict=True):
        changed = {name for name, weight in end.items() if not torch.equal(weight, start[name])}
        assert changed == {name for name in end if ".bottleneck." in name} != set()
        for name, weight in end.items():
            assert name in changed or torch.equal(weight, whole[name.partition(".")[2]]), name


def test_a_later_stage_goes_on_with_the_adapter_of_the_earlier(run: tuple[Path, Path, Seen]) -> None:
    _, _, seen = run
    assert all(torch.equal(weight, seen["end"][0][name]) for name, weight in seen["start"][1].items())
    assert any(bool((weight != 0).any()) for name, weight in seen["start"][1].items() if "bottleneck.fc2" in name
               or "bottleneck.c_proj" in name or "bottleneck.down_proj" in name)  # fmt: skip


def test_the_adapter_on_the_base_is_the_student(run: tuple[Path, Path, Seen], tmp_path: Path) -> None:
    base, folder, _ = run
    for number, student in enumerate((folder / "student", RunFolder(folder, writes=False).student_of("sft"))):
        plain = opened(student)  # transformers alone
        assert width_of(plain.config) == width_of(opened(base).config) + SIZE
        card = Card(name="both", model=str(base), adapter=str(student / "adapter"))
        torch.testing.assert_close(logits(load(card, inspect(card), seed=0)), logits(plain), rtol=NEAR, atol=NEAR)
        assert width_of(inspect(card).config) == width_of(plain.config)
        assert float((logits(opened(base)) - logits(plain)).abs().max()) > 0.01, "the control: it has learnt something"
        assert merge_adapter(str(base), student / "adapter", tmp_path / str(number)) == 2
        torch.testing.assert_close(logits(opened(tmp_path / str(number))), logits(plain), rtol=NEAR, atol=NEAR)
        assert "pytorch_model.bin" not in {path.name for path in (student / "adapter").iterdir()}


def test_its_card_and_its_record_say_what_it_is(run: tuple[Path, Path, Seen]) -> None:
    base, folder, _ = run
    width = width_of(opened(base).config)
    text = (folder / "student" / "README.md").read_text(encoding="utf-8")
    assert f"| learnt by an adapter | bottleneck: {SIZE} units beside the {width} of each MLP" in text
    assert f"weights have {width + SIZE}" in text
    record = json.loads((folder / "student" / "adapter" / "bottleneck.json").read_text(encoding="utf-8"))
    assert record["base_model_name_or_path"] == str(base) and record["size"] == SIZE
    says = json.loads((folder / "student" / "adapter" / "base.json").read_text(encoding="utf-8"))
    assert says == {"weights": fingerprint(Card(name="b", model=str(base)))}


def test_it_is_put_on_no_other_model_and_not_twice(run: tuple[Path, Path, Seen], tmp_path: Path) -> None:
    base, folder, _ = run
    adapter = shutil.copytree(folder / "student" / "adapter", tmp_path / "adapter")
    with pytest.raises(ModelError, match="was trained on other weights"):
        inspect(Card(name="twice", model=str(folder / "student"), adapter=str(adapter)))
    (adapter / "base.json").unlink()
    changed("base_model_name_or_path", "")(adapter)  # nobody says what it was trained on; the sizes do
    with pytest.raises(ModelError, match=r"(?s)intermediate_size .* merged into already is wider"):
        inspect(Card(name="twice", model=str(folder / "student"), adapter=str(adapter)))
    inspect(Card(name="once", model=str(base), adapter=str(adapter)))


def test_it_goes_on_after_a_break_to_the_same_bits(inputs: Path) -> None:
    saves = {"every_steps": 1, "keep": 9, "every_minutes": 0}
    files = ("student/model.safetensors", "student/adapter/bottleneck.safetensors")
    broken = config(inputs, name="broken", checkpoints=saves)
    assert_it_goes_on_to_the_same_bits(config(inputs, name="whole"), broken, files=files)


def test_other_settings_are_another_run(inputs: Path) -> None:
    broken = config(inputs, name="other", stages=(SFT,), checkpoints={"every_steps": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minillm.api._evaluate", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        distill(broken)
    with pytest.raises(RunExists, match=r"bottleneck\.size was 5, is 2"):
        distill(broken.model_copy(update={"bottleneck": BottleneckConfig(size=2)}))


def test_schedule_best_weights_and_early_stopping_are_those_of_any_stage(inputs: Path) -> None:
    """A rate far too high: the validation loss rises, the stage ends by patience, and what is handed on is the adapter
    of the best step, not of the last."""
    after: list[dict[str, Tensor]] = []
    update = student_engine.Student.update

    def watched(self: Any, losses: Any) -> Any:
        found = update(self, losses)
        after.append({name: weight for name, weight in weights(self).items() if ".bottleneck." in name})
        return found

    stage = {
        "kind": "sft", "steps": 30, "batch": 6, "validate_every": 1, "patience": 2,
        "optimiser": {"lr": 0.05, "schedule": "cosine", "warmup_steps": 2},
        "keep": {"metric": "loss", "mode": "min"},
    }  # fmt: skip
    others = tiny.save_prompts(inputs / "others.jsonl", labelled=True)
    data = {"train": str(inputs / "prompts.jsonl"), "validation": str(others), "max_prompt_tokens": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(student_engine.Student, "update", watched)
        folder = distill(config(inputs, name="best", stages=(stage,), data=data))
    lines, scores = tiny.logged(folder), [line["loss"] for line in tiny.logged(folder, "validation")]
    best = min(range(len(scores)), key=scores.__getitem__)
    assert len(lines) == len(scores) == len(after) == best + 3 < 30, "it ended two validations after the best"
    kept = load_file(folder / "student" / "adapter" / "bottleneck.safetensors")
    for name, weight in kept.items():
        own = name.replace("transformer.", "backbone.", 1)
        assert torch.equal(weight, after[best][own]) and not torch.equal(weight, after[-1][own]), name
    for number, line in enumerate(lines):
        factor = learning_rate_factor(number, total=30, schedule="cosine", warmup=2, final_fraction=0.0)
        assert math.isclose(line["lr"], 0.05 * factor, rel_tol=1e-6, abs_tol=1e-9)


def test_activation_checkpointing_changes_nothing_and_bf16_trains(inputs: Path) -> None:
    plain = distill(config(inputs, "llama", name="plain", stages=(MINILLM,)))
    saving = {"student": "zero0", "activation_checkpointing": True}
    less = distill(config(inputs, "llama", name="less", stages=(MINILLM,), engine=saving))
    assert [line["loss"] for line in tiny.logged(less)] == [line["loss"] for line in tiny.logged(plain)]
    half = distill(config(inputs, "llama", name="half", stages=(SFT,), engine=HALF))
    kept = load_file(half / "student" / "adapter" / "bottleneck.safetensors")
    assert any(bool((t != 0).any()) for name, t in kept.items() if "down_proj" in name)
    assert width_of(opened(half / "student").config) == 24 + SIZE


@pytest.mark.parametrize("family", ["phi3", "bloom", "qwen3_moe", "mixtral", "gpt_bigcode"])
def test_other_architectures_are_refused_with_those_that_we_know(family: str) -> None:
    with pytest.raises(UnsupportedCombination, match=rf"(?s)MLPs of a {family}.*gpt2, opt, .*take lora"):
        adaptation_of(BottleneckConfig()).require(AutoConfig.for_model(family))


def test_a_block_without_its_mlp_is_refused() -> None:
    model = made(tiny_config("llama"))
    model.get_submodule("model.layers.1.mlp").gate_proj = nn.Linear(16, 23)
    with pytest.raises(UnsupportedCombination, match="an MLP of 24 units in each of 2 blocks"):
        mlps(model)


def test_what_excludes_it_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCombination, match="lora and bottleneck"):
        config(inputs, name="both", lora={"rank": 2})
    with pytest.raises(UnsupportedCombination, match="muon with bottleneck"):
        config(inputs, name="muon", stages=({**SFT, "optimiser": {"name": "muon", "lr": 1e-2}},))
    with pytest.raises(ConfigError, match="size"):
        config(inputs, name="none", bottleneck={"size": 0})
    (tmp_path / "it.yaml").write_text(write_yaml({"model": str(inputs / "llama"), "layers": [1]}), encoding="utf-8")
    with pytest.raises(UnsupportedCombination, match="bottleneck with a card that has 'layers'"):
        check_pair(config(inputs, name="x").model_copy(update={"student": str(tmp_path / "it.yaml")}))


@pytest.fixture(scope="module")
def adapter(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny llama."""
    folder = tmp_path_factory.mktemp("kept") / "adapter"
    model = opened(inputs / "llama")
    adaptation = put_on(model)
    state = {name: p.detach() for name, p in CausalLM(model).named_parameters()}
    adaptation.adapter(state, prefix="model", config=model.config).write(folder)
    kept_adapter(folder)
    return folder


def changed(field: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        record = json.loads((folder / "bottleneck.json").read_text(encoding="utf-8"))
        (folder / "bottleneck.json").write_text(json.dumps({**record, field: value}), encoding="utf-8")

    return change


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "bottleneck.safetensors")
        change(found)
        save_file(found, folder / "bottleneck.safetensors")

    return apply


ONE = "model.layers.1.mlp.bottleneck.gate_proj.weight"
READ = [f"model.layers.{number}.mlp.bottleneck.{part}" for number in (0, 1) for part in ("gate_proj", "up_proj")]
BIASES = {f"{layer}.bias": torch.zeros(SIZE) for layer in READ}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed("size", "5"), "the fields of bottleneck.json are not"),
        (changed("size", True), "the fields of bottleneck.json are not"),
        (changed("more", 1), "the fields of bottleneck.json are not"),
        (changed("size", 4), "has not 4 units"),
        (changed("model_type", "phi3"), "is none of gpt2"),
        (changed("model_type", "gpt2"), "has not 5 units"),
        (changed("model_type", "qwen2"), "was trained on a model of model_type qwen2"),
        (changed("intermediate_size", 20), "was trained on a model of intermediate_size 20"),
        (changed("base_model_name_or_path", "/some/other"), "was trained on '/some/other'"),
        (tensors(lambda found: found.pop(ONE)), "has not 5 units"),
        (tensors(lambda found: found.update({ONE: torch.zeros(SIZE, 15)})), "has not 5 units"),
        (tensors(lambda found: found.update({"head.weight": torch.zeros(2)})), "has not 5 units"),
        (tensors(lambda found: found.clear()), "is empty"),
        (tensors(lambda found: [found.pop(n) for n in list(found) if ".1." in n]), "has units for"),
        (tensors(lambda found: found.update(BIASES)), "has a bias, other than"),
        (lambda folder: (folder / "bottleneck.safetensors").write_bytes(b"no"), "not a whole safetensors file"),
        (lambda folder: (folder / "bottleneck.safetensors").rename(folder / "w.bin"), "only pickled weights"),
        (lambda folder: (folder / "bottleneck.json").write_text("{"), "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_such_adapter_or_another_s_is_refused(
    inputs: Path, adapter: Path, tmp_path: Path, change: Callable[[Path], Any], words: str
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "it")
    changed("base_model_name_or_path", str(inputs / "llama"))(folder)
    card = Card(name="both", model=str(inputs / "llama"), adapter=str(folder))
    load(card, inspect(card), seed=0)  # the control
    change(folder)
    with pytest.raises(ModelError, match=words):
        load(card, inspect(card), seed=0)


def test_an_adapter_s_folder_is_no_model(inputs: Path, adapter: Path) -> None:
    with pytest.raises(MinillmError, match=r"holds an adapter \(bottleneck.json\)"):
        check_pair(config(inputs, "llama", name="x").model_copy(update={"student": str(adapter)}))


def test_it_is_beside_the_weights_and_takes_no_name_of_theirs() -> None:
    before = dict(made(tiny_config("opt")).named_parameters())
    model, adaptation = trained("opt")
    after = {name: p for name, p in model.named_parameters() if not adaptation.is_adapter(name)}
    assert after.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in after.items())
    assert sum(isinstance(module, Units) for module in model.modules()) == 2

"""A student that learns by an adapter.

1. Only the adapter trains, in every stage of a run, and the later goes on with the adapter of the earlier.
2. What is handed on is whole, and its adapter on the base is the same model, to peft as to us.
3. What cannot be adapted is refused before any weight is read.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm import adapters, distill, loading, student_engine
from minillm.adapter_files import require_base
from minillm.adapters import Adapter, merge, read_adapter
from minillm.cards import UNKNOWN_REVISION, Card
from minillm.config import LoraConfig, RunConfig
from minillm.errors import ConfigError, DataError, MinillmError, ModelError, RunExists, UnsupportedCombination
from minillm.loading import fingerprint, inspect, load
from minillm.lora import Lora, adapted_layers, is_adapter
from minillm.merging import merge_adapter
from minillm.pairs import check_pair
from minillm.store import RunFolder
from minillm.yaml_reader import write_yaml
from tests import quick, tiny
from tests.broken_off import assert_it_goes_on_to_the_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own

LORA = {"rank": 4, "alpha": 8}
SFT = {"kind": "sft", "steps": 3, "batch": 6, "optimiser": {"lr": 1e-2}}
MINILLM = {"kind": "minillm", "steps": 3, "prompts": 6, "teacher_mix": 0.2, "optimiser": {"lr": 1e-2}}
NEAR = 1e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    for family in tiny.FAMILIES:
        tiny.save_model(folder / f"teacher-{family}", family, seed=1, rows=31)
        tiny.save_model(folder / family, family, seed=2, rows=30, tied=family != "llama")
    tiny.save_prompts(folder / "prompts.jsonl")
    return folder


def config(inputs: Path, family: str = "gpt2", *, name: str, stages: Any = (SFT, MINILLM), **more: Any) -> RunConfig:
    return tiny.minillm_config(
        inputs / "runs", teacher=inputs / f"teacher-{family}", student=inputs / family,
        prompts=inputs / "prompts.jsonl", name=name,
        run_stages=tuple(stages), **{f"run_{key}": value for key, value in {"lora": LORA, **more}.items()},
    )  # fmt: skip


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def run(inputs: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, Path, dict[str, list[Any]]]]:
    """(Base, run's folder, what each engine had at its end): sft, then minillm."""
    seen: dict[str, list[Any]] = {"start": [], "end": []}

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


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(2, 20).view(2, 9)).logits[:, :, : len(tiny.WORDS)]
    return found


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_the_adapter_changes_and_the_base_does_not_by_a_bit(run: tuple[Path, Path, dict[str, list[Any]]]) -> None:
    base, _, seen = run
    whole = dict(opened(base).named_parameters())
    for start, end in zip(seen["start"], seen["end"], strict=True):
        changed = {name for name, weight in end.items() if not torch.equal(weight, start[name])}
        assert changed == {name for name in end if is_adapter(name)} != set()
        frozen = {name.replace("base_layer.", ""): w for name, w in end.items() if not is_adapter(name)}
        for name, weight in frozen.items():
            assert any(torch.equal(weight, other) for other in whole.values() if other.shape == weight.shape), name


def test_a_later_stage_goes_on_with_the_adapter_of_the_earlier(run: tuple[Path, Path, dict[str, list[Any]]]) -> None:
    _, _, seen = run
    assert seen["start"][1].keys() == seen["end"][0].keys()
    assert all(torch.equal(weight, seen["end"][0][name]) for name, weight in seen["start"][1].items())
    assert any(bool(weight.abs().max() > 0) for name, weight in seen["start"][1].items() if ".lora_B." in name)


def test_the_adapter_on_the_base_is_the_student(run: tuple[Path, Path, dict[str, list[Any]]]) -> None:
    base, folder, _ = run
    for student in (folder / "student", RunFolder(folder, writes=False).student_of("sft")):
        merged = logits(opened(student))
        adapted = logits(PeftModel.from_pretrained(opened(base), student / "adapter").eval())
        torch.testing.assert_close(adapted, merged, rtol=NEAR, atol=NEAR)
        assert float((logits(opened(base)) - merged).abs().max()) > 0.01, "the control: it has learnt something"
    record = json.loads((folder / "student" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert record["base_model_name_or_path"] == str(base) and record["r"] == 4


def test_the_adapter_is_of_its_base_s_weights_and_of_no_folder_of_that_name(
    run: tuple[Path, Path, dict[str, list[Any]]], tmp_path: Path
) -> None:
    """All students' folders are called alike; a copy elsewhere by another name is the same model."""
    base, folder, _ = run
    adapter = folder / "student" / "adapter"
    assert json.loads((adapter / "base.json").read_text(encoding="utf-8")) == {
        "weights": fingerprint(Card(name="b", model=str(base)))
    }
    copy = shutil.copytree(base, tmp_path / "copy")
    other = shutil.copytree(base, tmp_path / base.name)
    weights = load_file(other / "model.safetensors")
    save_file({name: w + 1 for name, w in weights.items()}, other / "model.safetensors", {"format": "pt"})
    inspect(Card(name="both", model=str(copy), adapter=str(adapter)))
    with pytest.raises(ModelError, match="was trained on other weights"):
        inspect(Card(name="both", model=str(other), adapter=str(adapter)))
    bare = shutil.copytree(adapter, tmp_path / "bare")
    (bare / "base.json").unlink()
    for model in (copy, other):  # both folders are there, and neither is the one that the record names
        with pytest.raises(ModelError, match=r"was trained on .*, and is to be put on"):
            inspect(Card(name="both", model=str(model), adapter=str(bare)))
    inspect(Card(name="both", model=str(base.parent / "." / base.name), adapter=str(bare)))
    (bare / "base.json").write_text('{"weight": 1}', encoding="utf-8")
    with pytest.raises(ModelError, match="wanted one entry"):
        inspect(Card(name="both", model=str(base), adapter=str(bare)))


HUB = "owner/name"


@pytest.mark.parametrize(
    ("recorded", "name", "weights", "fits"),
    [
        (f"{HUB}@1", HUB, f"{HUB}@1", True),
        (f"{HUB}@1", HUB, f"{HUB}@2", False),
        (f"{HUB}@1", "new/other", "new/other@1", True),
        (f"{HUB}@1", HUB, f"{HUB}@{UNKNOWN_REVISION}", True),
        (f"{HUB}@1", "new/other", f"new/other@{UNKNOWN_REVISION}", False),
        (f"{HUB}@1", "models/name", "ab12", True),
        (f"{HUB}@1", "models/other", "ab12", False),
        ("ab12", "moved/anything", "ab12", True),
        ("ab12", "moved/name", "cd34", False),
        ("", "moved/Name", "cd34", True),
    ],
)
def test_commits_and_contents_are_compared_where_both_are_known(
    recorded: str, name: str, weights: str, fits: bool
) -> None:
    adapter = Adapter(base=HUB, scaling=1.0, pairs={}, source=Path("it"), base_weights=recorded)
    with contextlib.nullcontext() if fits else pytest.raises(ModelError, match="was trained on"):
        require_base(adapter, name, weights=lambda: weights)


def test_a_card_with_the_adapter_is_the_student(run: tuple[Path, Path, dict[str, list[Any]]]) -> None:
    base, folder, _ = run
    card = Card(name="both", model=str(base), adapter=str(folder / "student" / "adapter"))
    torch.testing.assert_close(
        logits(load(card, inspect(card), seed=0)), logits(opened(folder / "student")), rtol=NEAR, atol=NEAR
    )
    prints = {fingerprint(card), fingerprint(card.model_copy(update={"adapter": None}))}
    earlier = RunFolder(folder, writes=False).student_of("sft") / "adapter"
    assert len(prints | {fingerprint(card.model_copy(update={"adapter": str(earlier)}))}) == 3


def test_the_teacher_has_no_adapter_and_its_weights_are_its_own(inputs: Path) -> None:
    """Also where teacher and student are of one base: #306 of the official code had one adapter for both."""
    taught = config(inputs, name="shared", stages=(MINILLM,))
    own = tiny.save_model(inputs / "runs" / "twin", "gpt2", seed=2, rows=30)
    first = distill(taught.model_copy(update={"teacher": str(inputs / "teacher-gpt2")}))
    card = inputs / "adapted.yaml"
    values = {"model": str(inputs / "gpt2"), "adapter": str(first / "student" / "adapter")}
    card.write_text(write_yaml(values), encoding="utf-8")
    both = taught.model_copy(update={"name": "shared-2", "teacher": str(card), "student": str(own)})
    pair = check_pair(both)
    assert pair.teacher_card is not None and pair.student_card.adapter is None
    second = distill(both)
    kl = [tiny.logged(path)[0]["reverse_kl"] for path in (first, second)]
    assert kl[1] > 0.01, "a teacher with an adapter is not the student without"


def test_it_goes_on_after_a_break_and_really_trains(inputs: Path) -> None:
    """The official code loaded it frozen. Here the bits are those of a run that nothing happened to."""
    saves = {"every_steps": 1, "keep": 9, "every_minutes": 0}
    files = ("student/model.safetensors", "student/adapter/adapter_model.safetensors")
    broken = config(inputs, name="broken", checkpoints=saves)
    assert_it_goes_on_to_the_same_bits(config(inputs, name="whole"), broken, files=files)


def test_other_settings_are_another_run(inputs: Path) -> None:
    broken = config(inputs, name="other", stages=({**SFT, "steps": 4},), checkpoints={"every_steps": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minillm.api._evaluate", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        distill(broken)
    with pytest.raises(RunExists, match=r"lora\.rank was 4, is 2"):
        distill(broken.model_copy(update={"lora": LoraConfig(rank=2, alpha=8)}))
    with pytest.raises(RunExists, match="lora was"):
        distill(broken.model_copy(update={"lora": None}))


def test_the_best_adapter_is_put_back_with_the_best_student(inputs: Path) -> None:
    broken = config(inputs, name="best", checkpoints={"every_steps": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minillm.api._evaluate", lambda *given, **options: (_ for _ in ()).throw(KeyboardInterrupt()))
        distill(broken)
    student = inputs / "runs" / "best" / "student"
    before = {path.name: path.read_bytes() for path in (student / "adapter").iterdir()}
    shutil.rmtree(student)
    distill(broken)
    assert {path.name: path.read_bytes() for path in (student / "adapter").iterdir()} == before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_linear_layers_of_the_blocks_and_nothing_else(inputs: Path, family: str) -> None:
    model = opened(inputs / family)
    found = adapted_layers(model, None)
    matrices = {
        name.removesuffix(".weight")
        for name, p in model.base_model.named_parameters()
        if p.dim() == 2 and "emb" not in name
    }
    wanted = {f"{model.base_model_prefix}.{name}" for name in matrices if name.rpartition(".")[2] not in {"wte", "wpe"}}
    assert set(found) == wanted
    one = found[0].rpartition(".")[2]
    assert adapted_layers(model, (one,)) == [name for name in found if name.endswith(one)]


def test_chosen_layers_are_what_the_record_says(inputs: Path) -> None:
    folder = distill(
        config(inputs, "llama", name="chosen", stages=(SFT,), lora={**LORA, "targets": ["q_proj", "1.mlp.down_proj"]})
    )
    adapter = read_adapter(folder / "student" / "adapter")
    assert {name.removeprefix("model.layers.") for name in adapter.pairs} == {
        "0.self_attn.q_proj", "1.self_attn.q_proj", "1.mlp.down_proj",
    }  # fmt: skip
    adapted = PeftModel.from_pretrained(opened(inputs / "llama"), folder / "student" / "adapter").eval()
    torch.testing.assert_close(logits(adapted), logits(opened(folder / "student")), rtol=NEAR, atol=NEAR)


def test_the_first_adapter_is_of_the_seed_and_adds_nothing(inputs: Path) -> None:
    models = {}
    for seed in (1, 1, 2):
        before = torch.get_rng_state()
        model = opened(inputs / "gpt2")
        after = torch.get_rng_state()
        Lora(settings=LoraConfig(), seed=seed, base="it").put_on(model)
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(logits(model.eval()), logits(opened(inputs / "gpt2")))
        first = next(p.detach() for name, p in model.named_parameters() if ".lora_A." in name)
        models.setdefault(seed, []).append(first)
        torch.set_rng_state(before)
    assert torch.equal(*models[1]) and not torch.equal(models[1][0], models[2][0])


@pytest.mark.parametrize(
    ("targets", "kind", "words"),
    [
        (
            ["c_atn"],
            ConfigError,
            "names no linear layer of a GPT2LMHeadModel; did you mean 'c_attn'.* c_attn, c_fc, c_proj",
        ),
        (["ln_1"], ConfigError, "names no linear layer"),
        (["wte"], UnsupportedCombination, "is the embedding"),
        (["lm_head"], UnsupportedCombination, "is the head"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_weights_are_read(
    inputs: Path, targets: list[str], kind: type[MinillmError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        check_pair(config(inputs, name="refused", lora={**LORA, "targets": targets}))


@pytest.mark.parametrize("changed", ["build", "layers", "adapter"])
def test_a_base_that_stands_in_no_folder_is_refused(inputs: Path, tmp_path: Path, changed: str) -> None:
    values: dict[str, Any] = {"model": str(inputs / "llama")}
    if changed == "build":
        build = {"architecture": "llama", "tokenizer": str(inputs / "llama"), "config": tiny.SIZES["llama"]}
        values = {"build": build}
    elif changed == "layers":
        values["layers"] = [1]
    else:
        values["adapter"] = str(write_adapter(inputs / "llama", tmp_path / "adapter"))
    (tmp_path / "it.yaml").write_text(write_yaml(values), encoding="utf-8")
    taught = config(inputs, "llama", name="refused").model_copy(update={"student": str(tmp_path / "it.yaml")})
    with pytest.raises(UnsupportedCombination, match=f"lora with a card that has '{changed}'"):
        check_pair(taught)
    assert check_pair(taught.model_copy(update={"lora": None})).student_card.name == "it"


def test_muon_and_lora_exclude_each_other(inputs: Path) -> None:
    with pytest.raises(UnsupportedCombination, match="muon with lora"):
        config(inputs, name="muon", stages=({**SFT, "optimiser": {"name": "muon", "lr": 1e-2}},))


def test_without_peft_a_run_says_what_to_install(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = builtins.__import__

    def without(name: str, *given: Any, **options: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return inside(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'minillm\[lora\]'"):
        distill(config(inputs, name="none"))
    assert not (inputs / "runs" / "none").exists()


def write_adapter(base: Path, folder: Path, *, seed: int = 0, scale: float = 1.0, **record: Any) -> Path:
    """A random adapter of a model, as peft itself writes it."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = opened(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model, PeftConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        )
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=scale)
    adapted.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **record}), encoding="utf-8")
    return folder


def test_an_adapter_of_peft_s_own_is_merged_as_peft_merges_it(inputs: Path, tmp_path: Path) -> None:
    for record in ({}, {"use_rslora": True}):
        folder = write_adapter(inputs / "llama", tmp_path / str(len(record)), **record)
        card = Card(name="both", model=str(inputs / "llama"), adapter=str(folder))
        theirs = logits(PeftModel.from_pretrained(opened(inputs / "llama"), folder).eval())
        torch.testing.assert_close(logits(load(card, inspect(card), seed=0)), theirs, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
        ({"init_lora_weights": 1}, "init_lora_weights is 1,"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights is"),
        ({"r": 3}, "do not fit rank 3"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"base_model_name_or_path": "/some/other"}, "was trained on '/some/other'"),
    ],
)
def test_an_adapter_that_is_more_or_another_s_is_refused(
    inputs: Path, tmp_path: Path, record: dict[str, Any], words: str
) -> None:
    folder = write_adapter(inputs / "llama", tmp_path / "it", **record)
    with pytest.raises(ModelError, match=words):
        inspect(Card(name="both", model=str(inputs / "llama"), adapter=str(folder)))


def begun(base: Path, folder: Path, start: Any) -> tuple[Path, Tensor]:
    """(An adapter that began so, as peft writes it; the logits of the model that it was made on and with)."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        adapted = get_peft_model(
            opened(base), PeftConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=start)
        )
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_" in name:
                    p.add_(torch.randn_like(p), alpha=0.1)
    adapted.save_pretrained(folder)
    return folder, logits(adapted.eval())


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_an_adapter_whose_start_left_the_base_alone_is_the_model(inputs: Path, tmp_path: Path, start: Any) -> None:
    folder, wanted = begun(inputs / "llama", tmp_path / "it", start)
    card = Card(name="both", model=str(inputs / "llama"), adapter=str(folder))
    torch.testing.assert_close(logits(load(card, inspect(card), seed=0)), wanted, rtol=NEAR, atol=NEAR)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_changed_the_base_is_refused(
    inputs: Path, tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, wanted = begun(inputs / "llama", tmp_path / "it", start)
    card = Card(name="both", model=str(inputs / "llama"), adapter=str(folder))
    with pytest.raises(ModelError, match=f"init_lora_weights is '{start}', which changes the base"):
        inspect(card)
    monkeypatch.setattr(adapters, "_PLAIN_STARTS", (start,))  # the control: without the refusal it is another model
    assert float((logits(load(card, inspect(card), seed=0)) - wanted).abs().max()) > 0.1


def test_an_adapter_of_another_shape_or_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    folder = write_adapter(inputs / "llama", tmp_path / "it", base_model_name_or_path="")
    for other, words in (("qwen2", None), ("gpt2", "is no linear layer")):
        card = Card(name="both", model=str(inputs / other), adapter=str(folder))
        if words is None:
            load(card, inspect(card), seed=0)  # the same layers in the same shapes: nothing shows that it is another's
            continue
        with pytest.raises(ModelError, match=words):
            load(card, inspect(card), seed=0)
    weights = load_file(folder / "adapter_model.safetensors")
    wider = {name: torch.cat([w, w], dim=1) if "lora_A" in name else w for name, w in weights.items()}
    save_file(wider, folder / "adapter_model.safetensors")
    card = Card(name="both", model=str(inputs / "llama"), adapter=str(folder))
    with pytest.raises(ModelError, match="from 48 to 16, and that of"):
        load(card, inspect(card), seed=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_writes_the_merged_model_in_its_own_precision(inputs: Path, tmp_path: Path, dtype: str) -> None:
    base = tmp_path / "base"
    opened(inputs / "llama").to(getattr(torch, dtype)).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    adapter = write_adapter(base, tmp_path / "adapter")
    assert merge_adapter(str(base), adapter, tmp_path / "merged") == 4
    theirs = PeftModel.from_pretrained(opened(base), adapter).merge_and_unload()
    found, wanted = opened(tmp_path / "merged").state_dict(), theirs.state_dict()
    assert {str(weight.dtype) for weight in found.values()} == {f"torch.{dtype}"}
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2 if dtype == "bfloat16" else NEAR, atol=NEAR)
    assert inspect(Card(name="it", model=str(tmp_path / "merged"))).tokenizer.get_vocab()
    with pytest.raises(DataError, match="holds something already"):
        merge_adapter(str(base), adapter, tmp_path / "merged")
    with pytest.raises(ModelError, match="was trained on"):
        merge_adapter(str(inputs / "qwen2"), adapter, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_base_in_eight_bits_is_not_merged_into(inputs: Path, tmp_path: Path) -> None:
    adapter = write_adapter(inputs / "llama", tmp_path / "adapter")
    (tmp_path / "eight.yaml").write_text(write_yaml({"model": str(inputs / "llama"), "quantise": "int8"}), "utf-8")
    with pytest.raises(ModelError, match="'quantise: int8', and an adapter cannot be added"):
        merge_adapter(str(tmp_path / "eight.yaml"), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model = opened(inputs / "llama")
    codes = model.model.layers[0].self_attn.q_proj
    codes.weight = torch.nn.Parameter(codes.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(AssertionError):
        merge(read_adapter(adapter), model)


def test_the_base_may_be_a_student_s_card(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(inputs / "llama", tmp_path / "adapter")
    for kind, name in (("students", "mine"), ("students", "both"), ("teachers", "both")):
        (tmp_path / kind).mkdir(exist_ok=True)
        model = inputs / "llama" if name == "mine" or kind == "teachers" else tmp_path / "nowhere"
        (tmp_path / kind / f"{name}.yaml").write_text(write_yaml({"model": str(model)}), "utf-8")
    monkeypatch.chdir(tmp_path)
    for base in ("mine", "both", "students/mine"):
        assert merge_adapter(base, adapter, tmp_path / "merged" / base.replace("/", "-")) == 4
    with pytest.raises(ConfigError, match="no card of that name"):
        merge_adapter("neither", adapter, tmp_path / "merged" / "neither")


def test_weights_that_are_quantised_already_are_refused(inputs: Path, tmp_path: Path) -> None:
    """As a student they would end in an error after the whole stage; as a teacher no placement is known to hold."""
    taught = config(inputs, "llama", name="refused", lora=None)
    for field in ("student", "teacher"):
        folder = shutil.copytree(getattr(taught, field), tmp_path / field)
        check_pair(taught.model_copy(update={field: str(folder)}))
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        record["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
        (folder / "config.json").write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(ModelError, match=r"quantised already (.|\n)*quantise: int8"):
            check_pair(taught.model_copy(update={field: str(folder)}))


def test_pickled_broken_and_missing_adapters_are_refused(inputs: Path, tmp_path: Path) -> None:
    folder = write_adapter(inputs / "llama", tmp_path / "it")
    card = Card(name="both", model=str(inputs / "llama"), adapter=str(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        inspect(card)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(adapter_model.bin\)"):
        inspect(card)
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        inspect(card.model_copy(update={"adapter": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_in_an_adapter_is_refused_before_it_is_read(inputs: Path, tmp_path: Path, name: str) -> None:
    """What it leads to is not even opened: an error of its reader would show that it is there, and what it holds."""
    folder = write_adapter(inputs / "llama", tmp_path / "it")
    (tmp_path / "secret").write_text("pass=word", encoding="utf-8")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="a link that leads out"):
        read_adapter(folder)


def test_an_adapter_in_the_hub_s_cache_is_read_through_its_links(inputs: Path, tmp_path: Path) -> None:
    folder = write_adapter(inputs / "llama", tmp_path / "it")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert read_adapter(snapshot).pairs.keys() == read_adapter(folder).pairs.keys()


def test_a_folder_that_is_an_adapter_is_no_student(inputs: Path, tmp_path: Path) -> None:
    folder = write_adapter(inputs / "llama", tmp_path / "it")
    taught = config(inputs, "llama", name="refused")
    for field in ("student", "teacher"):
        with pytest.raises(ConfigError, match=r"holds an adapter (.|\n)*minillm merge-adapter BASE"):
            check_pair(taught.model_copy(update={field: str(folder)}))


def test_an_adapter_beside_a_model_of_the_hub_is_refused(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With peft there transformers would put it on without a word, and read what it names."""
    inside = loading._hub_call
    monkeypatch.setattr(loading, "asked_once", contextlib.nullcontext)
    monkeypatch.setattr(
        loading, "_hub_call", lambda function, _, **more: inside(function, str(inputs / "gpt2"), **more)
    )
    for found in (None, "there"):
        monkeypatch.setattr(loading, "find_adapter_config_file", lambda name, found=found, **more: found)
        with contextlib.nullcontext() if found is None else pytest.raises(ModelError, match="holds an adapter beside"):
            inspect(Card(name="it", model="owner/it"))


def test_a_sharded_teacher_with_an_adapter_is_refused_with_the_way_out(inputs: Path, tmp_path: Path) -> None:
    folder = write_adapter(inputs / "llama", tmp_path / "it")
    values = {"model": str(inputs / "llama"), "adapter": str(folder), "placement": "zero3"}
    (tmp_path / "t.yaml").write_text(write_yaml(values), encoding="utf-8")
    taught = config(inputs, "llama", name="refused").model_copy(update={"teacher": str(tmp_path / "t.yaml")})
    with pytest.raises(UnsupportedCombination, match=r"minillm merge-adapter .* --out FOLDER"):
        check_pair(taught)

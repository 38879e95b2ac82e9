"""Folders of models that were trained from one start become one folder.

1. What is written is the formula, group by group, of any architecture, cut into files and pieces anyhow.
2. End points come back bit by bit, and what failed leaves everything as it was.
3. What does not belong together is refused, with the name of what differs.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minillm import merge_sources, tensor_files
from minillm.adaptation import kept_adapter
from minillm.adapters import read_adapter
from minillm.errors import ConfigError, DataError, ModelError
from minillm.merge_models import Merging, merge_folders, shards_of
from minillm.model_files import adapter_record
from minillm.plots import PNG
from minillm.publish import weights_sha256
from minillm.weight_merging import Method
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own

MODELS = 3
WEIGHTS = (0.5, 0.2, 0.3)
State = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family a folder with ``start`` and ``model-0`` … ``model-2``, which were "trained" from it."""
    folder = tmp_path_factory.mktemp("merge")
    for family in tiny.FAMILIES:
        start = tiny.save_model(folder / family / "start", family, seed=1, tied=family != "llama")
        for number in range(MODELS):
            trained(start, folder / family / f"model-{number}", seed=number)
    return folder


def trained(start: Path, folder: Path, *, seed: int, spread: float = 0.05) -> Path:
    draw = torch.Generator().manual_seed(seed)
    return changed(start, folder, lambda name, weight: weight + spread * torch.randn(weight.shape, generator=draw))


def changed(source: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    shutil.copytree(source, folder)
    rewrite(folder, {name: change(name, weight).to(weight.dtype) for name, weight in stored(source).items()})
    return folder


def rewrite(folder: Path, state: State) -> None:
    save_file({name: weight.contiguous() for name, weight in state.items()}, folder / "model.safetensors")


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: weight for file in sorted(folder.glob("*.safetensors")) for name, weight in load_file(file).items()}


def of(home: Path, family: str = "gpt2", models: int = MODELS) -> tuple[Path, list[Path]]:
    return home / family / "start", [home / family / f"model-{number}" for number in range(models)]


def group_of(name: str) -> str:
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def by_hand(start: State, models: list[State], *, method: Method, eta: float) -> dict[str, Tensor]:
    """The formulas on whole vectors of whole groups, as the paper writes them."""
    found: dict[str, Tensor] = {}
    for group in {group_of(name) for name in start}:
        names = sorted(name for name in start if group_of(name) == group)
        first = torch.cat([start[name].double().flatten() for name in names])
        deltas = [torch.cat([model[name].double().flatten() for name in names]) - first for model in models]
        if method == "lerp":
            total = sum(weight * delta for weight, delta in zip(WEIGHTS, deltas, strict=True))
        elif method == "nlerp":
            mean = sum(weight * delta / delta.norm() for weight, delta in zip(WEIGHTS, deltas, strict=True))
            total = mean / mean.norm() * sum(w * d.norm() for w, d in zip(WEIGHTS, deltas, strict=True))
        else:
            total, so_far = deltas[0], WEIGHTS[0]
            for weight, delta in zip(WEIGHTS[1:], deltas[1:], strict=True):
                so_far += weight
                share = weight / so_far
                omega = torch.acos((total / total.norm()) @ (delta / delta.norm()))
                parts = [torch.sin((1 - share) * omega), torch.sin(share * omega)]
                total = (parts[0] * total + parts[1] * delta) / torch.sin(omega)
        assert isinstance(total, Tensor)
        whole = (first + eta * total).split([start[name].numel() for name in names])
        found |= {name: part.view(start[name].shape) for name, part in zip(names, whole, strict=True)}
    return found


# 1: what is written


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", ["lerp", "slerp", "nlerp"])
def test_the_merged_folder_is_the_formula_group_by_group(
    home: Path, tmp_path: Path, family: str, method: Method
) -> None:
    start, models = of(home, family)
    merge_folders(start, models, into=tmp_path / "it", method=method, weights=WEIGHTS, eta=0.7, say=lambda line: None)
    wanted = by_hand(stored(start), [stored(model) for model in models], method=method, eta=0.7)
    got = stored(tmp_path / "it")
    assert got.keys() == wanted.keys()
    for name, weight in got.items():
        torch.testing.assert_close(weight.double(), wanted[name], rtol=0, atol=2e-7)
    other = by_hand(stored(start), [stored(m) for m in models[::-1]], method=method, eta=0.7)  # the control
    assert any(float((got[name] - other[name]).abs().max()) > 1e-3 for name in got)
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "it", output_loading_info=True)
    assert not any(found.values())


def test_what_one_group_learnt_changes_no_other(home: Path, tmp_path: Path) -> None:
    """Through files what tests/exact shows on vectors: a global angle would fail it."""
    start, models = of(home, "llama", 2)
    first = stored(start)
    block = "model.layers.0."

    def louder(name: str, weight: Tensor) -> Tensor:
        return first[name] + 8 * (weight - first[name]) if name.startswith(block) else weight

    loud = changed(models[0], tmp_path / "loud", louder)
    for folder, both in (("plain", models), ("changed", [loud, models[1]])):
        merge_folders(start, both, into=tmp_path / folder, method="slerp", say=lambda line: None)
    one, other = stored(tmp_path / "plain"), stored(tmp_path / "changed")
    assert {name for name in one if not torch.equal(one[name], other[name])} == {n for n in one if n.startswith(block)}


def test_cut_into_files_and_pieces_anyhow_it_is_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, models = of(home)
    merge_folders(start, models, into=tmp_path / "whole", method="slerp", say=lambda line: None)
    monkeypatch.setattr(merge_sources, "PIECE", 37)
    longest = []
    rows = tensor_files.TensorFile.rows

    def watched(self: Any, name: str, begin: int, end: int) -> Tensor:
        longest.append(rows(self, name, begin, end).numel())
        return rows(self, name, begin, end)

    monkeypatch.setattr(tensor_files.TensorFile, "rows", watched)
    merge_folders(start, models, into=tmp_path / "cut", method="slerp", shard_bytes=9000, say=lambda line: None)
    assert max(longest) <= 64, "never more than a piece, or the longest row, at a time"
    files = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name, weight in stored(tmp_path / "whole").items():
        torch.testing.assert_close(weight, stored(tmp_path / "cut")[name], rtol=0, atol=1e-7)
    opened, found = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(found.values())
    # A start, and models, that stand in several files are read as well.
    merge_folders(tmp_path / "cut", [tmp_path / "cut", models[0]], into=tmp_path / "on", method="lerp", weights=(1, 0))
    assert all(torch.equal(weight, stored(tmp_path / "cut")[n]) for n, weight in stored(tmp_path / "on").items())
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight


def test_shards_hold_no_more_than_they_may_unless_a_tensor_does() -> None:
    kinds = {name: (torch.float32, (size,)) for name, size in (("a", 3), ("b", 2), ("c", 9), ("d", 1), ("e", 1))}
    assert [list(shard) for shard in shards_of(kinds, 20)] == [["a", "b"], ["c"], ["d", "e"]]


def test_tied_weights_are_merged_once_in_whatever_files_they_stand(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "opt", 2)
    twice = []
    for source in (start, *models):
        state = stored(source)
        folder = shutil.copytree(source, tmp_path / f"twice-{source.name}")
        rewrite(folder, {**state, "lm_head.weight": state["model.decoder.embed_tokens.weight"].clone()})
        twice.append(folder)
    merge_folders(start, models, into=tmp_path / "once", method="slerp", say=lambda line: None)
    merge_folders(twice[0], [twice[1], models[1]], into=tmp_path / "also", method="slerp", say=lambda line: None)
    assert "lm_head.weight" not in stored(tmp_path / "also")
    assert (tmp_path / "once" / "model.safetensors").read_bytes() == (
        tmp_path / "also" / "model.safetensors"
    ).read_bytes()
    odd = shutil.copytree(twice[0], tmp_path / "odd")
    rewrite(odd, {**stored(odd), "lm_head.weight": stored(odd)["lm_head.weight"] + 1})
    with pytest.raises(ModelError, match="are tied by config"):
        Merging(odd, models, method="slerp")
    untied = Merging(home / "llama" / "start", of(home, "llama", 2)[1], method="slerp")  # the control: two of their own
    assert {"lm_head", "model.embed_tokens"} <= {
        group["name"] for group in untied._report(eta=1, sha256="", files=()).record()["groups"]
    }


def test_files_without_the_prefix_and_with_old_masks_are_the_same_model(home: Path, tmp_path: Path) -> None:
    """As GPT-2 lies on the hub: names without "transformer.", and causal masks among the weights."""
    start, models = of(home, "gpt2", 2)
    bare = shutil.copytree(start, tmp_path / "bare")
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 4, 4).tril() for layer in range(2)}
    rewrite(bare, {**{name.removeprefix("transformer."): w for name, w in stored(start).items()}, **masks})
    said: list[str] = []
    merge_folders(start, models, into=tmp_path / "one", method="slerp", say=said.append)
    assert not any(line.startswith("note") for line in said)
    merge_folders(bare, models, into=tmp_path / "other", method="slerp", say=said.append)
    assert any("left out 2 tensors" in line for line in said)
    assert weights_sha256(tmp_path / "one") == weights_sha256(tmp_path / "other")


def test_rows_of_the_start_beyond_the_tokenizer_are_cut_as_published_students_are(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2", 2)
    real = len(tiny.WORDS)
    long = tiny.save_model(tmp_path / "long", "gpt2", seed=1, rows=real + 3)
    state = stored(start)
    rewrite(long, {**state, "transformer.wte.weight": torch.cat([state["transformer.wte.weight"], torch.ones(3, 16)])})
    for name, folder in (("cut", long), ("plain", start)):
        merge_folders(folder, models, into=tmp_path / name, method="slerp", say=lambda line: None)
    assert weights_sha256(tmp_path / "cut") == weights_sha256(tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.vocab_size == real
    with pytest.raises(ModelError, match="vocab_size is 31"):  # a longer model than its start is of another one
        merge_folders(start, [trained(long, tmp_path / "longer", seed=1)], into=tmp_path / "no", method="lerp")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_are_merged_as_what_they_add(home: Path, tmp_path: Path, family: str) -> None:
    start, _ = of(home, family)
    adapters, wholes = [], []
    for number in range(2):
        model = AutoModelForCausalLM.from_pretrained(start)
        with torch.random.fork_rng():
            torch.manual_seed(number)
            target = ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]
            adapted = get_peft_model(
                model, LoraConfig(r=2, lora_alpha=6, target_modules=target, fan_in_fan_out=family == "gpt2")
            )
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(weight, std=0.3)
        adapted.save_pretrained(tmp_path / f"adapter-{number}")
        adapters.append(tmp_path / f"adapter-{number}")
        adapted.merge_and_unload().save_pretrained(tmp_path / f"whole-{number}")
        wholes.append(tmp_path / f"whole-{number}")
        shutil.copy(start / "tokenizer.json", wholes[-1])
        shutil.copy(start / "tokenizer_config.json", wholes[-1])
    merge_folders(start, adapters, into=tmp_path / "a", method="slerp", say=lambda line: None)
    merge_folders(start, wholes, into=tmp_path / "w", method="slerp", say=lambda line: None)
    mixed = merge_folders(start, [adapters[0], wholes[1]], into=tmp_path / "m", method="slerp", say=lambda line: None)
    for name, weight in stored(tmp_path / "w").items():
        torch.testing.assert_close(stored(tmp_path / "a")[name], weight, rtol=0, atol=1e-6)
        torch.testing.assert_close(stored(tmp_path / "m")[name], weight, rtol=0, atol=1e-6)
    assert all(record.weights_sha256 for record in mixed.models)
    # The control: factors averaged one by one are another model.
    both = [read_adapter(adapter).pairs for adapter in adapters]
    layer = sorted(both[0])[0]
    (a, b), (c, d) = (pairs[layer] for pairs in both)
    assert float((((b + d) / 2) @ ((a + c) / 2) - (b @ a + d @ c) / 2).abs().max()) > 0.01
    other = tiny.save_model(tmp_path / "other", family, seed=4)
    (adapters[0] / "base.json").write_text(json.dumps({"weights": "another"}), encoding="utf-8")
    with pytest.raises(ModelError, match="was trained on other weights"):
        merge_folders(other, adapters, into=tmp_path / "no", method="slerp")


def test_a_folder_with_both_kinds_of_adapter_is_one_of_lora_everywhere(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "bottleneck.json"):
        (tmp_path / name).write_text("{", encoding="utf-8")
    record = adapter_record(tmp_path)
    with pytest.raises(ModelError, match=rf"{record}.* cannot be read as JSON"):
        kept_adapter(tmp_path)


# 2: end points, precision, what is told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_end_points_come_back_bit_by_bit_and_sums_are_rounded_once(
    home: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    start = shutil.copytree(home / "qwen2" / "start", tmp_path / "base")
    rewrite(start, {name: weight.to(dtype) for name, weight in stored(start).items()})
    one, other = (trained(start, tmp_path / name, seed=seed) for seed, name in enumerate(("one", "other")))

    def merged(name: str, **options: Any) -> dict[str, Tensor]:
        merge_folders(start, [one, other], into=tmp_path / name, say=lambda line: None, **options)
        return stored(tmp_path / name)

    for found, wanted in (
        (merged("start", method="slerp", eta=0.0), start),
        (merged("first", method="slerp", weights=(1, 0)), one),
        (merged("second", method="nlerp", weights=(0, 3)), other),
    ):
        assert {name: w.dtype for name, w in found.items()} == {name: w.dtype for name, w in stored(wanted).items()}
        assert all(torch.equal(weight, stored(wanted)[name]) for name, weight in found.items())
    half = merged("half", method="lerp", eta=0.3)
    first, states = stored(start), [stored(one), stored(other)]
    for name, weight in half.items():
        own = first[name].double()
        exact = own + 0.3 * (0.5 * (states[0][name].double() - own) + 0.5 * (states[1][name].double() - own))
        assert torch.equal(weight, exact.to(dtype))
    if dtype == torch.bfloat16:  # the control: arithmetic in 16 bits is further off
        name = "model.embed_tokens.weight"
        narrow = first[name] + 0.3 * ((states[0][name] - first[name]) * 0.5 + (states[1][name] - first[name]) * 0.5)
        assert not torch.equal(narrow, half[name])


def test_equal_models_are_merged_into_themselves(home: Path, tmp_path: Path) -> None:
    start, (model, *_) = of(home, "llama")
    report = merge_folders(start, [model] * 3, into=tmp_path / "it", method="slerp", say=lambda line: None)
    assert all(torch.equal(weight, stored(model)[name]) for name, weight in stored(tmp_path / "it").items())
    assert {group.edges for group in report.groups} == {("parallel",)}


def test_a_start_in_other_bits_is_read_and_the_models_bits_are_written(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2", 2)
    narrow = shutil.copytree(start, tmp_path / "narrow")
    rewrite(narrow, {name: weight.bfloat16() for name, weight in stored(start).items()})
    merge_folders(narrow, models, into=tmp_path / "it", method="slerp", weights=(0, 1), say=lambda line: None)
    assert all(torch.equal(weight, stored(models[1])[name]) for name, weight in stored(tmp_path / "it").items())


def test_everything_is_told(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2")
    said: list[str] = []
    still = shutil.copytree(start, tmp_path / "still")
    report = merge_folders(
        start, [*models[:2], still], into=tmp_path / "it", method="slerp", weights=(2, 1, 1), eta=0.3, say=said.append,
        card_words="Made in a test.",
    )  # fmt: skip
    record = json.loads((tmp_path / "it" / "merge.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(report.record()))
    assert record["start"] == {"folder": str(start), "weights_sha256": weights_sha256(start)}
    assert [model["weights_sha256"] for model in record["models"]][:2] == [weights_sha256(m) for m in models[:2]]
    assert (record["method"], record["weights"], record["eta"]) == ("slerp", [0.5, 0.25, 0.25], 0.3)
    assert record["weights_sha256"] == weights_sha256(tmp_path / "it")
    names = ["transformer.h.0", "transformer.h.1", "transformer.ln_f", "transformer.wpe", "transformer.wte"]
    assert [group["name"] for group in record["groups"]] == names
    first, states = stored(start), [stored(model) for model in models]
    deltas = [
        (state["transformer.wte.weight"] - first["transformer.wte.weight"]).double().flatten() for state in states
    ]
    wte = record["groups"][-1]
    assert wte["norms"] == pytest.approx([float(deltas[0].norm()), float(deltas[1].norm()), 0.0])
    cosine = float(deltas[0] @ deltas[1] / deltas[0].norm() / deltas[1].norm())
    assert wte["angles"] == [pytest.approx(math.degrees(math.acos(cosine))), None, None]
    assert wte["edges"] == ["zero"] and wte["parameters"] == first["transformer.wte.weight"].numel()
    assert sum(group["parameters"] for group in record["groups"]) == sum(w.numel() for w in first.values())
    assert record["cosines_with_start"][2] == 1.0 and all(0.9 < cosine < 1 + 1e-12 for cosine in report.cosines)
    assert said[-1].startswith("angles of task vectors: median") and said[-1] == record["angles"]
    assert (tmp_path / "it" / "angles.png").read_bytes().startswith(PNG)
    card = (tmp_path / "it" / "README.md").read_text(encoding="utf-8")
    for words in (weights_sha256(start), weights_sha256(models[1]), "slerp", "eta | 0.3", said[-1], "Made in a test."):
        assert words in card, words


def test_a_merge_that_fails_leaves_what_was_there(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2", 2)
    into = tmp_path / "it"
    merge_folders(start, models, into=into, method="slerp", say=lambda line: None)
    before = weights_sha256(into)
    # 40,000 fits fp16, and so do both models; in between, at right angles, there is 1.4 times as much.
    wide = shutil.copytree(start, tmp_path / "wide")
    rewrite(wide, {name: torch.zeros(weight.shape).half() for name, weight in stored(start).items()})
    far = [changed(wide, tmp_path / f"far-{n}", lambda name, weight, n=n: _one(weight, n)) for n in range(2)]  # type: ignore[misc]
    with pytest.raises(ModelError, match="beyond what"):
        Merging(wide, far, method="slerp", weights=None).write(into)
    assert weights_sha256(into) == before and [path.name for path in tmp_path.iterdir() if "staging" in path.name] == []
    # and a good one replaces it
    report = merge_folders(start, models, into=into, method="lerp", fresh=True, say=lambda line: None)
    assert weights_sha256(into) == report.weights_sha256 != before


def _one(weight: Tensor, place: int) -> Tensor:
    found = torch.zeros(weight.shape)
    found.view(-1)[:2] = torch.tensor([60_000.0, 60_000.0 * (-1) ** place]) if weight.numel() > 1 else 0.0
    found.view(-1)[2:] = 0.0
    return found


# 3: refusals


def test_what_does_not_share_the_start_is_refused_and_nothing_is_written(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2", 2)
    other = tiny.save_model(tmp_path / "other", "gpt2", seed=9)
    long = changed(other, tmp_path / "long", lambda name, weight: 50 * weight)
    for stranger in (other, long):
        with pytest.raises(ModelError, match=r"is -?0\.0\d\d, wanted 0.1 or more: it was trained from another start"):
            merge_folders(start, [models[0], stranger], into=tmp_path / "it", method="slerp")
        assert not (tmp_path / "it").exists()
    report = merge_folders(
        start, [models[0], other], into=tmp_path / "it", method="slerp", known_start=True, say=lambda line: None
    )
    assert abs(report.cosines[1]) < 0.1 < report.cosines[0], "what is known is not asked for"


@pytest.mark.parametrize("left", [1.0, 0.3, 0.02])
def test_weight_decay_does_not_make_another_start(home: Path, tmp_path: Path, left: float) -> None:
    """What training adds is at right angles to what decay leaves of the start: its length may be anything."""
    start, models = of(home, "gpt2", 2)
    draw = torch.Generator().manual_seed(3)
    model = changed(  # three times as long as what is left
        start, tmp_path / "decayed",
        lambda name, weight: left * (weight + 3 * weight.std() * torch.randn(weight.shape, generator=draw))
        if weight.dim() > 1 else weight,
    )  # fmt: skip
    report = merge_folders(start, [models[0], model], into=tmp_path / "it", method="slerp", say=lambda line: None)
    assert report.cosines[1] == pytest.approx(10**-0.5, abs=0.05)
    one, two = (
        torch.cat([weight.double().flatten() for weight in stored(folder).values() if weight.dim() > 1])
        for folder in (start, model)
    )
    assert report.cosines[1] == pytest.approx(float(one @ two / one.norm() / two.norm()))


def broken(home: Path, folder: Path, how: str) -> Path:
    """A second model that something is wrong with."""
    _, models = of(home, "gpt2", 2)
    if how == "family":
        return home / "opt" / "model-0"
    copy = shutil.copytree(models[1], folder)
    state = stored(copy)
    if how == "tokenizer":
        tiny.tokenizer([*tiny.WORDS[:-2], "z", "y"], pad=tiny.EOS).save_pretrained(copy)
    elif how == "activation":
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        (copy / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}), encoding="utf-8")
    elif how == "dtype":
        rewrite(copy, {name: weight.bfloat16() for name, weight in state.items()})
    elif how == "missing":
        rewrite(copy, {name: weight for name, weight in state.items() if name != "transformer.wpe.weight"})
    elif how == "shape":
        rewrite(copy, {**state, "transformer.wpe.weight": torch.ones(47, 16)})
    elif how == "nan":
        rewrite(copy, {**state, "transformer.ln_f.bias": torch.full((16,), math.nan)})
    elif how == "opposite":
        first, own = stored(home / "gpt2" / "start"), stored(models[0])
        rewrite(copy, {name: 2 * first[name] - own[name] for name in state})
    return copy


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("family", "model_type is 'opt', and that of .* is 'gpt2'"),
        ("tokenizer", "its tokenizer is not that of"),
        ("activation", "activation_function is 'relu'"),
        ("dtype", "is bfloat16 .*, and that of .* is float32"),
        ("missing", "transformer.wpe.weight is missing"),
        ("shape", r"transformer.wpe.weight is float32 \[47, 16\], and that of .* \[48, 16\]"),
        ("nan", r"odd: transformer.ln_f.bias is not finite \(NaN"),
        ("opposite", "transformer.h.0: two task vectors point in opposite directions"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(home: Path, tmp_path: Path, how: str, match: str) -> None:
    start, models = of(home, "gpt2", 1)
    with pytest.raises(ModelError, match=match):
        merge_folders(start, [*models, broken(home, tmp_path / "odd", how)], into=tmp_path / "it", method="slerp")
    assert not (tmp_path / "it").exists()


def test_whole_numbers_must_be_the_same_and_are_kept(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2", 2)
    counted = []
    for source in (start, *models):
        folder = shutil.copytree(source, tmp_path / f"counted-{source.name}")
        rewrite(folder, {**stored(source), "steps": torch.tensor(7), "seen": torch.tensor([True, False])})
        counted.append(folder)
    merge_folders(counted[0], counted[1:], into=tmp_path / "it", method="slerp", say=lambda line: None)
    found = stored(tmp_path / "it")
    assert torch.equal(found["seen"], torch.tensor([True, False])) and torch.equal(found["steps"], torch.tensor(7))
    rewrite(counted[2], {**stored(counted[2]), "steps": torch.tensor(8)})
    with pytest.raises(ModelError, match="steps: whole numbers that are not the same"):
        merge_folders(counted[0], counted[1:], into=tmp_path / "no", method="slerp", say=lambda line: None)


def test_nothing_else_is_overwritten(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2", 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine", encoding="utf-8")
    for into, match in (
        (tmp_path / "mine", "holds notes, which no merge wrote"),
        (models[0], "one of the folders that are merged"),
    ):
        with pytest.raises(DataError, match=match):
            merge_folders(start, models, into=into, method="slerp", say=lambda line: None)
    assert (tmp_path / "mine" / "notes").read_text(encoding="utf-8") == "mine"
    with pytest.raises(DataError, match="is no folder"):
        merge_folders(start, models, into=tmp_path / "mine" / "notes", method="slerp", say=lambda line: None)


@pytest.mark.parametrize("which", ["start", "model"])
def test_a_folder_around_what_is_merged_is_not_replaced(home: Path, tmp_path: Path, which: str) -> None:
    start, models = of(home, "gpt2", 2)
    into = tmp_path / "it"
    merge_folders(start, models, into=into, method="slerp", say=lambda line: None)
    inner = shutil.copytree(start if which == "start" else models[1], into / "deep" / "inner")
    record = json.loads((into / "merge.json").read_text(encoding="utf-8"))
    record["files"] += [
        path.relative_to(into).as_posix() for path in inner.rglob("*")
    ]  # a record is not asked for this
    (into / "merge.json").write_text(json.dumps(record), encoding="utf-8")
    before = weights_sha256(inner)
    with pytest.raises(DataError, match=r"is around .*inner, one of the folders that are merged; nothing was touched"):
        both = (inner, models) if which == "start" else (start, [models[0], inner])
        merge_folders(*both, into=into, method="slerp", say=lambda line: None, fresh=True)
    assert weights_sha256(inner) == before


def test_a_merge_replaces_what_a_merge_wrote_and_nothing_that_was_added(home: Path, tmp_path: Path) -> None:
    start, models = of(home, "gpt2", 2)
    into = tmp_path / "it"
    report = merge_folders(start, models, into=into, method="slerp", say=lambda line: None)
    assert sorted(report.files) == sorted(path.name for path in into.iterdir())
    merge_folders(start, models, into=into, method="lerp", say=lambda line: None, fresh=True)
    (into / "eval").mkdir()
    (into / "eval" / "results.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds eval/results.json, which no merge wrote; nothing was touched"):
        merge_folders(start, models, into=into, method="slerp", say=lambda line: None, fresh=True)
    assert (into / "eval" / "results.json").is_file()
    assert Merging(start, models, method="lerp").stands(into, eta=1.0), "what was added does not make it another"
    (into / "eval" / "results.json").unlink()
    (into / "merge.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="which no merge wrote"):
        merge_folders(start, models, into=into, method="slerp", say=lambda line: None, fresh=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"eta": 1.2}, "eta: got 1.2"), ({"eta": math.nan}, "eta: got nan"), ({"weights": (1, 2, 3)}, "weights: got")],
)
def test_unfit_numbers_are_refused(home: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    start, models = of(home, "gpt2", 2)
    with pytest.raises(ConfigError, match=match):
        merge_folders(start, models, into=tmp_path / "it", method="slerp", say=lambda line: None, **options)
    with pytest.raises(ConfigError, match="no model to merge"):
        merge_folders(start, [], into=tmp_path / "it", method="slerp")

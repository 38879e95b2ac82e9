"""A model as one root module: what it reads does not depend on the batch. (That its files run no code: tests/attacks.)

Legend: B rows, L positions, V real ids.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from minillm.batches import prompt_batch
from minillm.cards import BuildSpec, Card
from minillm.decode import roll_out
from minillm.errors import ModelError, PositionsExceeded
from minillm.loading import inspect, load
from minillm.models import CausalLM, ModelReader
from minillm.objectives import rollout_inputs
from minillm.probes import probe_head
from minillm.scoring import score
from minillm.types import Decoding, DrawKey, Prompt, PromptBatch, Purpose, Rollout
from tests import tiny

CLOSE = 1e-5
APART = 1e-3
MODELS = [(family, tied) for family in tiny.FAMILIES for tied in (True, False)]
EOS = tiny.WORDS.index(tiny.EOS)
TEXTS = [(5, 9, 4), (7,), (3, EOS, 6, 8, 11, 2, 9), (10, 20, 27, 12, EOS)]
"""Of different lengths, with the EOS (GPT-2's pad) inside and at the end."""
PLAIN = Decoding(max_new_tokens=9)
SETTINGS = [
    pytest.param(PLAIN, 0.0, id="plain"),
    pytest.param(PLAIN, 0.4, id="mixed"),
    pytest.param(Decoding(max_new_tokens=9, temperature=0.7), 0.0, id="temperature"),
    pytest.param(Decoding(max_new_tokens=9, temperature=1.3, top_k=7, top_p=0.9), 0.4, id="truncated-mixed"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny models by (family, tied), each written once; a head with 32 rows for 28 ids where ``rows`` says so."""
    top, made = tmp_path_factory.mktemp("models"), dict[tuple[Any, ...], Path]()

    def folder(family: str, tied: bool = True, *, rows: int | None = None, seed: int = 1) -> Path:
        key = (family, tied, rows, seed)
        if key not in made:
            made[key] = tiny.save_model(top / str(len(made)), family, seed=seed, tied=tied, rows=rows)
        return made[key]

    return folder


def root_of(folder: Path, *, real_ids: int = len(tiny.WORDS)) -> CausalLM:
    root = CausalLM(AutoModelForCausalLM.from_pretrained(folder)).eval()
    root.head.real_ids = real_ids
    return root


def reader_of(root: CausalLM) -> ModelReader:
    return ModelReader(root, device=torch.device("cpu"), lockstep=False)


def batch_of(texts: list[tuple[int, ...]]) -> PromptBatch:
    prompts = [Prompt(uid=f"row-{n}", text="", ids=ids) for n, ids in enumerate(texts)]
    return prompt_batch(prompts, [0] * len(prompts), pad_id=EOS, device="cpu")


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max())


@torch.no_grad()
def next_token_log_probs(folder: Path) -> list[Tensor]:
    """After every prefix of every text, from one plain forward each: no padding, no mask, no cache."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return [
        torch.stack([model(torch.tensor([ids[: t + 1]])).logits[0, -1].log_softmax(-1) for t in range(len(ids))])
        for ids in TEXTS
    ]


def batched_log_probs(root: CausalLM, *, chunks: tuple[int, ...], mask_BL: Tensor | None = None) -> list[Tensor]:
    """The same from one left-padded batch, read in chunks with a cache."""
    batch, reader = batch_of(TEXTS), reader_of(root)
    mask_BL = batch.mask_BP if mask_BL is None else mask_BL
    hidden, cache, start = [], None, 0
    for size in chunks:
        part, cache = reader.extend(batch.ids_BP[:, start : start + size], mask_BL[:, : start + size], cache)
        hidden.append(part)
        start += size
    assert start == batch.ids_BP.shape[1]
    hidden_BLH = torch.cat(hidden, dim=1)
    return [reader.logits(hidden_BLH[n, -len(ids) :]).log_softmax(-1) for n, ids in enumerate(TEXTS)]


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_a_padded_batch_reads_each_row_as_if_it_were_alone(
    family: str, tied: bool, folders: Callable[..., Path]
) -> None:
    """Absolute positions (GPT-2), positions with an offset (OPT), rotary ones (Llama, Qwen2)."""
    folder = folders(family, tied)
    want, root = next_token_log_probs(folder), root_of(folder)
    for chunks in ((7,), (3, 1, 3), (1,) * 7):
        for one, other in zip(batched_log_probs(root, chunks=chunks), want, strict=True):
            assert gap(one, other) < CLOSE, chunks


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_the_mask_the_same_batch_reads_differently(family: str, folders: Callable[..., Path]) -> None:
    """Negative control: what keeps rows apart is the mask."""
    folder = folders(family)
    got = batched_log_probs(root_of(folder), chunks=(7,), mask_BL=torch.ones(len(TEXTS), 7, dtype=torch.bool))
    assert gap(got[0], next_token_log_probs(folder)[0]) > APART


def test_an_opt_with_a_projection_between_its_widths_reads_rightly(tmp_path: Path) -> None:
    """OPT-350m's form: the embedding is narrower than the layers, and norms come last."""
    config = AutoConfig.for_model(
        "opt", vocab_size=28, hidden_size=16, word_embed_proj_dim=8, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=24, max_position_embeddings=48, do_layer_norm_before=False, pad_token_id=0, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    got, want = batched_log_probs(root_of(tmp_path), chunks=(4, 3)), next_token_log_probs(tmp_path)
    assert max(gap(one, other) for one, other in zip(got, want, strict=True)) < CLOSE


def a_rollout(root: CausalLM, teacher: CausalLM, decoding: Decoding, mix: float) -> Rollout:
    return roll_out(
        batch_of(TEXTS * 3),
        student=reader_of(root),
        teacher=reader_of(teacher),
        decoding=decoding,
        key=DrawKey(seed=3, stage="minillm", purpose=Purpose.TOKEN, rollout=0),
        eos_ids=(EOS,),
        pad_id=EOS,
        teacher_mix=mix,
        keep_hidden=True,
    )


def trained_logq(root: CausalLM, rollout: Rollout, decoding: Decoding, *, support: bool = True) -> Tensor:
    """What a training forward says about the sampled tokens, [N] in row order."""
    packed = None if rollout.support_BTC is None or not support else rollout.support_BTC[rollout.mask_BT]
    values: dict[str, Tensor]
    loss, values = root(
        "train",
        **rollout_inputs(rollout, range(len(rollout.stop_B))),
        wanted=("logq",),
        temperature=decoding.temperature,
        support_NC=packed,
        loss=lambda numbers, _: numbers["logq"].sum(),
    )
    assert loss.requires_grad
    return values["logq"]


@pytest.mark.parametrize(("decoding", "mix"), SETTINGS)
@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_before_the_first_update_the_ratio_of_new_to_old_is_one(
    family: str, tied: bool, decoding: Decoding, mix: float, folders: Callable[..., Path]
) -> None:
    """Sampling reads with a cache, scoring from kept states, training in one pass: all say the same log-prob."""
    root, teacher = root_of(folders(family, tied, rows=32)), root_of(folders(family, tied, seed=2))
    rollout = a_rollout(root, teacher, decoding, mix)
    assert (rollout.support_BTC is not None) is (decoding.top_k > 0)
    logq_N = trained_logq(root, rollout, decoding)
    assert gap(logq_N, rollout.logq_BT[rollout.mask_BT]) < CLOSE
    scored = score(
        rollout, student=reader_of(root), teacher_head=teacher.head.weights(), temperature=decoding.temperature
    )
    assert gap(logq_N, scored.logq_BT[rollout.mask_BT]) < CLOSE


@pytest.mark.parametrize("forgotten", ["support", "temperature", "dropout"])
def test_a_ratio_other_than_one_would_be_seen(forgotten: str, folders: Callable[..., Path]) -> None:
    """Negative control: each thing that sampling and training must share."""
    decoding = Decoding(max_new_tokens=9, temperature=1.3, top_k=7)
    root, teacher = root_of(folders("gpt2")), root_of(folders("gpt2", seed=2))
    rollout = a_rollout(root, teacher, decoding, 0.0)
    if forgotten == "dropout":
        torch.manual_seed(0)
        root.train()
    trained = PLAIN if forgotten == "temperature" else decoding
    logq_N = trained_logq(root, rollout, trained, support=forgotten != "support")
    assert gap(logq_N, rollout.logq_BT[rollout.mask_BT]) > APART


TRANSFORMED: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.1, "head_dim": 8, "num_key_value_heads": 1, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "phi": {},
    "gptj": {"rotary_dim": 4},
}
"""Architectures that scale, cap or shift their logits in a way that the head knows."""


def known_model(family: str) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model(
        family, vocab_size=28, pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes, **TRANSFORMED[family]
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


@pytest.mark.parametrize("family", list(TRANSFORMED))
def test_scales_caps_and_biases_of_known_architectures_are_reproduced(family: str) -> None:
    model = known_model(family)
    root = CausalLM(model)
    probe_head(model, root)
    ids_BS = torch.arange(2, 20)[None]
    hidden_BSH, _ = root("extend", ids_BS=ids_BS, mask_BL=torch.ones_like(ids_BS), cache=None)
    assert gap(root.head(hidden_BSH[0]), model(ids_BS).logits[0]) < CLOSE


@pytest.mark.parametrize(("family", "part"), [("gemma2", "softcap"), ("granite", "scale"), ("gptj", "bias")])
def test_a_head_that_forgets_a_part_is_refused(family: str, part: str) -> None:
    """Negative control: the probe sees each of them."""
    model = known_model(family)
    root = CausalLM(model)
    setattr(root.head, part, 1.0 if part == "scale" else None)
    with pytest.raises(ModelError, match="logits differ by"):
        probe_head(model, root)


def test_a_model_that_transforms_its_logits_in_an_unknown_way_is_refused(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders("llama"))
    probe_head(model, CausalLM(model))
    plain = type(model).forward

    def sharpened(self: Any, *arguments: Any, **options: Any) -> Any:
        output = plain(self, *arguments, **options)
        output.logits = output.logits * 1.05
        return output

    monkeypatch.setattr(type(model), "forward", sharpened)
    with pytest.raises(ModelError, match="it cannot be distilled yet"):
        probe_head(model, CausalLM(model))


@pytest.mark.parametrize("garbage", [float("nan"), 1e30])
def test_the_probe_looks_at_real_ids_only(garbage: float, folders: Callable[..., Path]) -> None:
    """Garbage in padded rows neither refuses a good model nor hides a bad one."""
    model = AutoModelForCausalLM.from_pretrained(folders("llama", False, rows=32))
    with torch.no_grad():
        model.get_output_embeddings().weight[28:] = garbage
    root = CausalLM(model)
    root.head.real_ids = 28
    probe_head(model, root)
    root.head.scale = 1.05
    with pytest.raises(ModelError, match="logits differ by"):
        probe_head(model, root)


def card(folder: Path) -> Card:
    return Card(name="it", model=str(folder))


@pytest.mark.parametrize(
    ("remove", "match"),
    [
        ("config.json", "no config.json in it"),
        ("model.safetensors", "no weights; wanted"),
        ("tokenizer.json", "transformers cannot load it"),
    ],
)
def test_a_folder_without_a_part_is_refused_in_two_lines(
    remove: str, match: str, tmp_path: Path, folders: Callable[..., Path]
) -> None:
    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    (folder / remove).unlink()
    with pytest.raises(ModelError, match=match) as caught:
        inspect(card(folder))
    assert len(str(caught.value).splitlines()) == 2


def test_a_hub_name_that_cannot_be_reached_is_told_in_two_lines() -> None:
    with pytest.raises(ModelError, match="nobody/nothing: transformers cannot load it") as caught:
        inspect(Card(name="it", model="nobody/nothing"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_sequence_may_fill_every_position_and_not_one_more(family: str, folders: Callable[..., Path]) -> None:
    folder = folders(family)
    facts = inspect(card(folder))
    facts.require_positions(48, what="student")
    with pytest.raises(PositionsExceeded, match=r"student it has 48 positions.* may be 49 tokens.\n.* by 1 in all"):
        facts.require_positions(49, what="student")
    ids_BS = torch.full((1, 48), 5)
    hidden_BSH, _ = reader_of(root_of(folder)).extend(ids_BS, torch.ones_like(ids_BS), None)
    assert bool(hidden_BSH.isfinite().all())


def test_a_built_model_is_a_function_of_its_seed_and_leaves_the_random_stream_alone() -> None:
    spec = BuildSpec(
        architecture="llama",
        tokenizer="world",
        config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
    )
    built = Card(name="it", build=spec)
    facts = inspect(built)
    before = torch.get_rng_state()
    one, same, other = (load(built, facts, seed=seed).get_input_embeddings().weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.shape[0] == len(facts.tokenizer) == facts.config.vocab_size


@pytest.mark.parametrize(("dtype", "want"), [("bfloat16", torch.bfloat16), ("float64", torch.float64)])
def test_weights_come_in_the_dtype_of_the_card(dtype: Any, want: torch.dtype, folders: Callable[..., Path]) -> None:
    wanted = Card(name="it", model=str(folders("qwen2")), dtype=dtype)
    assert load(wanted, inspect(wanted), seed=0).dtype == want


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_size": "wide"}, "build.config of a llama: .*hidden_size"),
        ({"hiden_size": 8}, "build.config of a llama: no field 'hiden_size'; did you mean 'hidden_size'"),
    ],
)
def test_a_build_that_its_architecture_does_not_know_is_a_model_error(config: dict[str, Any], match: str) -> None:
    spec = BuildSpec(architecture="llama", tokenizer="world", config=config)
    with pytest.raises(ModelError, match=match):
        inspect(Card(name="it", build=spec))


def test_a_build_may_have_more_rows_than_ids_and_never_fewer() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    wide = Card(name="it", build=BuildSpec(architecture="llama", tokenizer="world", vocabulary=300, config=sizes))
    assert load(wide, inspect(wide), seed=0).get_output_embeddings().weight.shape == (300, 8)
    narrow = Card(name="it", build=BuildSpec(architecture="llama", tokenizer="world", vocabulary=20, config=sizes))
    with pytest.raises(ModelError, match=r"build.vocabulary is 20, and tokenizer 'world' has \d+ ids"):
        inspect(narrow)


def test_a_configuration_with_a_value_of_the_wrong_kind_is_a_model_error(
    tmp_path: Path, folders: Callable[..., Path]
) -> None:
    folder = shutil.copytree(folders("llama"), tmp_path / "model")
    old = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**old, "hidden_size": "wide"}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"transformers cannot load it: .*hidden_size"):
        inspect(card(folder))

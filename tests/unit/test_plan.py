"""Promises of the planner:

1. what a training forward is said to keep is what a real one keeps, in every family;
2. caches and loss tiles are as large as those that are made;
3. weights, 32-bit weights and moments follow from the engine: exact shares;
4. the largest batch fits and one row more for each GPU does not; the change that is named makes it fit, and nothing
   of it is spare;
5. what is sent is what its collective moves;
6. a measured step takes what was planned (one case here, twelve and more in scripts/plan_check.sh).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm import cli
from minillm.adaptation import adaptation_of
from minillm.bench.plan import PlanCase, measure_plan
from minillm.bottleneck_config import BottleneckConfig
from minillm.cache import growing_cache
from minillm.cards import load_card
from minillm.errors import ConfigError
from minillm.figures import Figures
from minillm.meta_models import count_parameters, meta_model
from minillm.plan.activations import kept_per_token
from minillm.plan.advice import advise
from minillm.plan.memory import BUCKET, FLAT, LIVE, cache_bytes, loss_tiles, memory_of
from minillm.plan.possible import require_possible
from minillm.plan.sizes import ENGINES, GIB, ModelSizes, Work, sizes_of, sizes_of_config
from minillm.plan.traffic import Rates, traffic_of
from minillm.scoring import HeadWeights, Task, TeacherView, cut_for, tensors_of_a_piece
from minillm.shapes import config_of

SMALL: dict[str, Any] = {
    "layers": 2, "hidden": 64, "heads": 4, "intermediate": 160, "vocabulary": 300, "positions": 128, "tied": True,
}  # fmt: skip
FAMILIES = {
    **{name: {} for name in ("gpt2", "opt", "llama")},
    "qwen2": {"kv_heads": 2}, "qwen3": {"kv_heads": 2, "head_dim": 32}, "gemma2": {"kv_heads": 2, "head_dim": 32},
    "gemma3_text": {"kv_heads": 1, "head_dim": 32},
}  # fmt: skip


def config(architecture: str) -> Any:
    from minillm.cards import Card

    figures = Figures(architecture=architecture, **{**SMALL, **FAMILIES[architecture]})  # type: ignore[arg-type]
    return config_of(Card(name="x", model="x/y", figures=figures))


def work(**changes: Any) -> Work:
    student, teacher = (sizes_of_config(config("llama"), name=name) for name in ("student", "teacher"))
    return Work(**{"student": student, "teacher": teacher, "gpus": 4, "rows": 64, **changes})


def big(**changes: Any) -> Work:
    student, teacher = (
        sizes_of(load_card(name, kind=kind)) for name, kind in (("llama-7b", "students"), ("llama-13b", "teachers"))
    )
    return Work(**{"student": student, "teacher": teacher, "gpus": 8, "micro_batch": 8, **changes})


def really_kept(made: Any, *, tokens: int) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(made)
    backbone = model.base_model.eval()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # As packed lines have it, which are told apart by a mask.
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
        ids = torch.arange(tokens)[None]
        output = backbone(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_a_forward_keeps_is_what_a_real_one_keeps(architecture: str) -> None:
    kept, tokens = kept_per_token(config(architecture), torch.float32), 96
    planned = tokens * (SMALL["layers"] * (kept.layer + tokens * kept.matrices) + kept.outside)
    assert (kept.matrices > 4) == (architecture == "gemma2")  # it caps the logits of attention, which is not fused then
    real = really_kept(config(architecture), tokens=tokens)
    assert planned == pytest.approx(real, rel=0.05)
    assert tokens * kept.layer > 0.2 * real  # negative control: a layer more or less is outside of that


def test_a_cache_is_as_large_as_the_one_that_grows() -> None:
    sizes = sizes_of_config(config("qwen2"), name="x")
    rows, prompt, new = 3, 40, 90
    cache, token = growing_cache(), torch.zeros(rows, 2, 1, 16)
    cache.update(torch.zeros(rows, 2, prompt, 16), torch.zeros(rows, 2, prompt, 16), 0)
    for _ in range(new - 1):
        cache.update(token, token, 0)
    layer: Any = cache.layers[0]
    real = 2 * layer._key_room.numel() * 4 * sizes.layers
    planned = cache_bytes(sizes, rows=rows, prompt=prompt, new=new, item=4)
    copied = layer._key_room.numel() * 4
    assert real <= planned <= real + copied
    assert cache_bytes(sizes, rows=rows, prompt=prompt, new=2 * new, item=4) > planned


@pytest.mark.parametrize("tokens", [5, 10**6])
def test_tiles_are_cut_as_the_loss_cuts_them(tokens: int) -> None:
    head = HeadWeights(weight_VH=torch.zeros(300, 64), bias_V=None)
    task = Task(
        taken_N=torch.zeros(1, dtype=torch.int64), wanted=("logq", "reverse_kl"),
        teacher=TeacherView(head=head, hidden_NH=torch.zeros(1, 64)),
    )  # fmt: skip
    cut, each = cut_for(head, task), tensors_of_a_piece(head, task)
    real = min(cut.tile, tokens) * 300 * 8 + min(cut.piece, tokens) * 300 * 4 * each
    threads = torch.get_num_threads()
    planned = loss_tiles(work(precision="fp32", teacher_precision="fp32", device="cpu"), tokens)
    assert planned == pytest.approx(real, rel=0.01 if threads == 1 else 0.2)


def test_the_student_stands_in_exact_shares() -> None:
    one = big(precision="bf16")
    many, own = one.student.parameters, -(-one.student.parameters // 8)

    def standing(engine: Any, **changes: Any) -> dict[str, int]:
        found = memory_of(big(engine=engine, **changes)).standing
        return {name: size for name, size in found.items() if not name.startswith("teacher")}

    assert standing("zero0", precision="fp32") == {"student weights": 4 * many, "optimiser": 8 * many}
    assert standing("zero1") == {
        "student weights": 2 * many, "32-bit weights": 4 * own, "optimiser": 8 * own, "gradients": 4 * many,
    }  # fmt: skip
    assert standing("zero2") == {"student weights": 2 * many, "32-bit weights": 4 * own, "optimiser": 8 * own}
    assert standing("zero3") == {
        "student weights": 2 * own, "32-bit weights": 4 * own, "optimiser": 8 * own, "gradients": 4 * own,
        "bucket of gradients": 20_000_000,
    }  # fmt: skip
    assert standing("zero2-offload") == {"student weights": 2 * many}
    assert "student weights" not in standing("zero3-offload")
    host = memory_of(big(engine="zero3-offload", placement="offload", teacher_precision="bf16")).host
    assert host["optimiser, 32-bit weights and gradients"] == 8 * 16 * own
    assert host["teacher"] == 8 * 2 * -(-one.teacher.parameters // 8)


def test_placements_of_the_teacher() -> None:
    size = 2 * big().teacher.parameters
    assert memory_of(big(placement="replicated")).standing["teacher resident"] == size
    shared = memory_of(big(placement="zero3"))
    assert shared.standing["teacher resident"] == -(-size // 8)
    gathered = {name: items.get("teacher gathered") for name, items in shared.phases.items()}
    assert gathered["rollout"] == gathered["scoring"] == 2 * (LIVE + BUCKET) < size / 10
    head = 2 * big().teacher.head  # all that learning asks of it
    assert gathered["forward"] == gathered["backward"] == gathered["step"] == head
    assert "teacher resident" not in memory_of(big(placement="offload")).standing


def test_an_adapter_has_moments_of_its_own_weights_only() -> None:
    full, lora = big(), big(lora=16)
    assert lora.trained == 16 * full.student.linear_ends < full.trained / 100
    assert memory_of(lora).standing["optimiser"] < memory_of(full).standing["optimiser"] / 100
    assert memory_of(lora).standing["student weights"] == 2 * (full.student.parameters + lora.trained)


@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "zero3", "zero3-offload"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_anchor_is_a_whole_student_in_32_bits_on_each_gpu_and_a_copy_to_read(engine: str, precision: str) -> None:
    if (engine, precision) == ("zero0", "bf16"):
        precision = "fp32"  # which is refused otherwise
    without, held = (memory_of(big(engine=engine, precision=precision, anchor=anchor)) for anchor in (False, True))
    weights = big().student.parameters
    assert held.standing == {**without.standing, "moving average": 4 * weights}
    more = {name: held.peaks[name] - without.peaks[name] for name in held.phases}
    reads = held.phases["scoring"]["moving average reads"]
    assert reads > (2 * weights if precision == "bf16" else 0) and more.pop("scoring") == 4 * weights + reads
    assert set(more.values()) == {4 * weights}


def test_units_beside_the_mlps_are_counted_as_they_would_be_made() -> None:
    full, beside = big(), big(bottleneck=16)
    assert beside.trained == 16 * full.student.unit < full.trained / 10
    config = config_of(load_card("gpt2", kind="students"))
    wide = adaptation_of(BottleneckConfig(size=16)).merged_config(config)
    grown = count_parameters(meta_model(wide)) - count_parameters(meta_model(config))
    assert grown == 16 * sizes_of_config(config, name="gpt2").unit > 0
    assert memory_of(beside).standing["student weights"] == 2 * (full.student.parameters + beside.trained)
    assert memory_of(beside).standing["optimiser"] < memory_of(full).standing["optimiser"] / 10
    with pytest.raises(ConfigError, match="by one adapter"):
        big(lora=2, bottleneck=2)


def test_units_beside_unknown_mlps_are_refused() -> None:
    unknown = replace(big().student, unit=0)
    require_possible(big(student=unknown, lora=2))
    with pytest.raises(ConfigError, match=r"(?s)bottleneck of size 2: the MLPs of .* gpt2, opt"):
        require_possible(big(student=unknown, bottleneck=2))


def test_recomputing_and_small_forwards_take_less() -> None:
    whole = memory_of(big())
    assert (
        memory_of(big(recompute=True)).phases["forward"]["activations"] < 0.2 * whole.phases["forward"]["activations"]
    )
    assert memory_of(big(micro_batch=4)).phases["forward"]["activations"] < whole.phases["forward"]["activations"]


@pytest.mark.parametrize(
    "changes", [{"gpu": 24}, {"gpu": 40}, {"gpu": 80}, {"gpu": 40, "engine": "zero1"}, {"gpu": 40, "gpus": 1}]
)
def test_advice_holds(changes: dict[str, Any]) -> None:
    size = changes.pop("gpu") * GIB
    asked = big(**changes)
    advice = advise(asked, gpu_bytes=size)
    assert advice.fits == (memory_of(asked).peak <= advice.usable)
    if advice.largest_rows:
        most = asked.but(rows=advice.largest_rows)
        assert memory_of(most).peak <= advice.usable < memory_of(most.but(rows=most.rows + asked.gpus)).peak
    if not advice.fits:
        assert advice.changed is not None and advice.change
        assert memory_of(advice.changed).peak <= advice.usable


def test_the_host_counts_too() -> None:
    asked = big(engine="zero3-offload", placement="offload")
    assert advise(asked, gpu_bytes=80 * GIB).fits
    assert not advise(asked, gpu_bytes=80 * GIB, host_bytes=32 * GIB).fits


def test_what_is_sent_is_what_its_collective_moves() -> None:
    rates = Rates()
    assert traffic_of(big(gpus=1), rates).sent == {}
    size = 2 * big().student.parameters
    two = traffic_of(big(engine="zero2"), rates)
    assert two.sent["all-gather of new weights"] == int(size * 7 / 8)
    assert two.sent["reduce-scatter of gradients"] == 4 * int(size * 7 / 8)  # four micro-batches of eight
    zero = traffic_of(big(engine="zero0", precision="fp32"), rates)
    assert zero.sent == {"all-reduce of gradients": int(2 * 7 / 8 * 2 * size)}
    three = traffic_of(big(engine="zero3"), rates)
    assert three.sent["all-gather of the student to sample"] == int(size * 7 / 8)
    assert three.calls["all-gather of the student to sample"] == 1
    theirs = traffic_of(big(placement="zero3", teacher_mix=0.0), rates)
    assert theirs.sent["all-gather of the teacher"] == int(2 * big().teacher.parameters * 7 / 8)
    slow = traffic_of(big(engine="zero2"), Rates(bandwidth=rates.bandwidth / 10))
    assert slow.step_s > two.step_s


@pytest.mark.parametrize("changes", [{"engine": "zero0"}, {"rows": 4}, {"gpus": 0}])
def test_work_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        big(**changes)


def test_every_engine_has_a_plan() -> None:
    for engine in ENGINES:
        memory = memory_of(big(engine=engine, precision="fp32"))
        assert memory.peak == max(memory.peaks.values()) > 0 and memory.worst in memory.peaks
    assert big().student.parameters > FLAT


ASKED = ("plan", "--teacher", "gpt2-xl", "--student", "gpt2", "--gpus", "2")


def run(*words: str) -> int:
    return cli._guarded(lambda **options: cli.app(list(words), **options))


def test_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    file = tmp_path / "plan.json"
    assert run(*ASKED, "--gpu-memory", "80", "--batch", "32", "--json", str(file)) == 0
    told = capsys.readouterr().out
    assert "fits: " in told and "teacher resident" in told and "largest batch" in told and "█" in told
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["fits"] and max(found["peaks"].values()) < 80 * GIB
    assert found["standing"]["teacher resident"] == 4 * 1_557_611_200
    assert run(*ASKED, "--gpu-memory", "9", "--batch", "32") == 1
    assert "cheapest change that makes it fit: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lengths", "512"), "wanted two numbers"),
        (("--stage", "zero4"), "did you mean"),
        (("--placement", "here"), "replicated, zero3, offload"),
        (("--student", "micro-world"), "no card of that name"),
        (("--teacher", "owner/unknown"), "no figures with an architecture"),
    ],
)
def test_what_is_wrong_is_told(words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, "--gpu-memory", "80", *words) == 2
    assert told in capsys.readouterr().err


def test_a_measured_step_takes_what_was_planned() -> None:
    case = PlanCase(
        teacher="bench-30m", student="teachers/bench-30m", engine="zero1", rows=2, prompt_tokens=8, new_tokens=8
    )
    figures = measure_plan(case, steps=2)
    assert abs(figures.off) < 0.1, (figures.planned, figures.measured)
    half = {name: size // 2 for name, size in figures.planned.items()}  # negative control
    assert max(half.values()) < 0.9 * max(figures.measured.values())


def test_sizes_of_a_model_folder(tmp_path: Path) -> None:
    made = config("llama")
    made.save_pretrained(tmp_path)
    sizes: ModelSizes = sizes_of(load_card(str(tmp_path), kind="students"))
    assert sizes.parameters == sizes_of_config(made, name="x").parameters


def test_a_student_that_is_gathered_by_forward_takes_less_memory_and_sends_more() -> None:
    """By the bytes that are no longer whole, once for each token."""
    once = work(engine="zero3", gpus=4, rows=64)
    each = once.but(gather="forward")
    assert (
        memory_of(each).phases["rollout"]["student gathered"] <= memory_of(once).phases["rollout"]["student gathered"]
    )
    name = "all-gather of the student to sample"
    rates = Rates()
    assert traffic_of(each, rates).sent[name] == pytest.approx(
        (each.new_tokens + 1) * traffic_of(once, rates).sent[name], rel=1e-6
    )
    with pytest.raises(ConfigError, match="only a ZeRO-3 student"):
        work(engine="zero2", gather="forward")

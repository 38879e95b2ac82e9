"""What the log says of a step: operations, seconds by phase and in collectives; and traces that are asked for."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minillm import collectives, distill, phases, work
from minillm.cards import Card
from minillm.loading import inspect, load
from minillm.models import CausalLM
from minillm.speed import PHASES, SPEED, Speedometer
from tests import tiny

BESIDE_WEIGHTS = ("bmm", "attention")
"""Products that are not with weights."""


def by_weights(counter: FlopCounterMode) -> int:
    """torch's own count of the operations of products with weights."""
    return sum(
        count
        for operation, count in counter.get_flop_counts()["Global"].items()
        if not any(part in str(operation) for part in BESIDE_WEIGHTS)
    )


@pytest.fixture(params=tiny.FAMILIES)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> CausalLM:
    card = Card(name="tiny", model=str(tiny.save_model(tmp_path / "model", request.param, seed=1)))
    root = CausalLM(load(card, inspect(card), seed=0).eval())
    root.count_work()
    return root


def counted(call: Any) -> tuple[float, int]:
    """Operations by our count and by torch's."""
    before = work.done()
    with FlopCounterMode(display=False) as counter:
        call()
    return work.done() - before, by_weights(counter)


def test_operations_of_forwards_are_those_that_torch_counts(root: CausalLM) -> None:
    ids_BL = torch.randint(2, 20, (3, 7))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    ours, torchs = counted(lambda: root("read", ids_BL=ids_BL, mask_BL=mask_BL))
    assert ours == torchs > 0
    hidden_NH = root("read", ids_BL=ids_BL, mask_BL=mask_BL)[mask_BL]
    ours, torchs = counted(lambda: root("logits", hidden_NH=hidden_NH))
    assert ours == torchs > 0


def test_operations_with_gradients_are_those_that_torch_counts(root: CausalLM) -> None:
    ids_BL = torch.randint(2, 20, (3, 7))
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    predict_BL = mask_BL & (torch.arange(7) >= 3)

    def learn() -> None:
        def nll(of: Mapping[str, Tensor], place: slice) -> Tensor:
            return -of["logq"].sum()

        loss, _ = root("train", ids_BL=ids_BL, mask_BL=mask_BL, predict_BL=predict_BL, loss=nll, wanted=("logq",))
        loss.backward()

    ours, torchs = counted(learn)
    # Nothing asks for the gradient of what goes into the first layer, and torch's tiles are what they are.
    assert 0.8 * ours < torchs <= ours


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_weights_are_learnt_through_and_not_learnt(frozen: bool) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False))
    layer[0].requires_grad_(not frozen)
    given_NH = torch.randn(5, 8, requires_grad=True)
    weights = work.weights_in(layer, beside=torch.empty(0))
    assert weights == ((128, 128) if frozen else (0, 256))
    with FlopCounterMode(display=False) as counter:
        layer(given_NH).sum().backward()
    assert 5 * weights.operations(backward=True) == by_weights(counter)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_gpu_is_known_by_whole_words(name: str, rate: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert work.peak(torch.device("cuda")) == rate
    assert work.peak(torch.device("cpu")) is None


def test_padding_is_no_work(root: CausalLM) -> None:
    ids_BL = torch.randint(2, 20, (3, 7))
    mask_BL = torch.arange(7)[None, :] >= torch.tensor([0, 2, 4])[:, None]
    whole = counted(lambda: root("read", ids_BL=ids_BL, mask_BL=torch.ones_like(mask_BL)))[0]
    assert counted(lambda: root("read", ids_BL=ids_BL, mask_BL=mask_BL))[0] == pytest.approx(whole * 15 / 21)


class _Clock:
    """Stands in for the clock of ``phases``."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_a_step_is_told_by_its_phases_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(phases, "time", clock)
    meter = Speedometer(torch.device("cpu"))
    phases.enter("rollout")
    meter.begin()
    for phase, seconds in (("scoring", 2.0), ("save", 4.0), ("learning", 1.0), ("validation", 2.0)):
        clock.now += seconds  # of the phase before
        phases.enter(phase)
    found = meter.end({"tokens": 10.0})
    assert found["seconds"] == 2.0 + 4.0 + 2.0, "saves and validations are no part of it"
    assert [found[name] for name in PHASES] == [0.25, 0.5, 0.25]
    assert found["tokens_per_second"] == 1.25
    assert "mfu" not in found and "1 tokens/s" in meter.words()


def test_a_step_without_rollout_has_no_share_of_one() -> None:
    meter = Speedometer(torch.device("cpu"))
    phases.enter("learning")
    meter.begin()
    time.sleep(0.001)
    phases.enter("save")
    assert meter.end({}).keys() == {"seconds", "learning", "communication", "tflops"}


class _Work:
    def wait(self) -> None:
        time.sleep(0.02)


class _Backend:
    """As much of a backend as is watched: a call that makes another, and one that is waited for later."""

    def all_gather_coalesced(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        for output, one in zip(outputs, inputs, strict=True):
            self.all_gather_into_tensor(output_tensor=output, input_tensor=one)

    def all_gather_into_tensor(self, output_tensor: Tensor, input_tensor: Tensor) -> _Work:
        return _Work()

    def reduce_scatter_tensor(self, output_tensor: Tensor, input_tensor: Tensor) -> None:
        time.sleep(0.01)


@contextmanager
def watched(backend: Any) -> Iterator[None]:
    from deepspeed.comm import comm

    before, comm.cdb = comm.cdb, backend
    try:
        collectives.watch()
        collectives.watch()
        yield
    finally:
        comm.cdb = before


def spent(kind: str) -> tuple[int, int, float]:
    one = collectives.spent().get(kind, collectives.Spent())
    return one.calls, one.bytes, one.seconds


def test_a_collective_counts_once_with_its_whole_size_and_the_time_of_waiting() -> None:
    backend = _Backend()
    small, large = torch.zeros(4), torch.zeros(8)
    with watched(backend):
        calls, size, seconds = spent("all_gather")
        backend.all_gather_coalesced([large, large], [small, small])
        assert spent("all_gather")[:2] == (calls + 1, size + 64), "with the calls that it makes, not beside them"
        handle = backend.all_gather_into_tensor(output_tensor=large, input_tensor=small)
        handle.wait()
        assert spent("all_gather")[:2] == (calls + 2, size + 96)
        assert spent("all_gather")[2] >= seconds + 0.02
        calls, size, seconds = spent("reduce_scatter")
        backend.reduce_scatter_tensor(small, large)
        assert spent("reduce_scatter")[:2] == (calls + 1, size + 32) and spent("reduce_scatter")[2] >= seconds + 0.01


def run(folder: Path, **options: Any) -> Path:
    tiny.save_model(folder / "teacher", "llama", seed=1)
    tiny.save_model(folder / "student", "llama", seed=2)
    tiny.save_prompts(folder / "prompts.jsonl")
    config = tiny.minillm_config(
        folder, teacher=folder / "teacher", student=folder / "student", prompts=folder / "prompts.jsonl", steps=3
    )
    return distill(config, **options)


def test_a_run_logs_its_speed_and_records_the_steps_that_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path, profile=1)
    for line in tiny.logged(folder):
        assert {"seconds", "tokens_per_second", "communication", "tflops", *PHASES} == line[SPEED].keys()
        assert sum(line[SPEED][name] for name in PHASES) == pytest.approx(1.0, abs=1e-3)
        assert line[SPEED]["tokens_per_second"] == pytest.approx(line["tokens"] / line[SPEED]["seconds"], rel=1e-2)
    printed = capsys.readouterr().out
    assert "minillm: " in printed and "TFLOP/s a rank" in printed and "1 steps of stage minillm" in printed
    with gzip.open(folder / "profile" / "minillm-rank00000.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [ranges.count(phase) for phase in PHASES] == [1, 1, 1], "one step, and not the first"
    run(tmp_path, fresh=True)
    assert not (folder / "profile").exists()


def test_a_run_of_one_step_has_nothing_to_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_model(tmp_path / "teacher", "llama", seed=1)
    tiny.save_prompts(tmp_path / "prompts.jsonl")
    config = tiny.minillm_config(
        tmp_path,
        teacher=tmp_path / "teacher",
        student=tmp_path / "teacher",
        prompts=tmp_path / "prompts.jsonl",
        steps=1,
    )
    assert list((distill(config, profile=3) / "profile").iterdir()) == []
    assert "there was no second" in capsys.readouterr().out

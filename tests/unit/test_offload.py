"""An offloaded student: what of it lies in host memory, and which offloading is refused, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillm.cards import Card
from minillm.config import OptimiserConfig
from minillm.engine_settings import read_engine_settings, with_torch_optimiser
from minillm.errors import ConfigError, MinillmError, UnsupportedCombination
from minillm.loading import inspect, load
from minillm.ranks import Ranks
from minillm.student_engine import Student
from tests import tiny

CPU = {"device": "cpu"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[MinillmError], str]] = {
    "a disk": ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, {}, UnsupportedCombination, "'nvme'"),
    "weights on a disk": ({"stage": 3, "offload_param": {"device": "nvme"}}, {}, UnsupportedCombination, "'nvme'"),
    "whole weights": ({"stage": 2, "offload_param": CPU}, {}, UnsupportedCombination, "ZeRO stage 2"),
    "stage 0": ({"stage": 0, "offload_optimizer": CPU}, {}, UnsupportedCombination, "ZeRO stage 0"),
    "no stage": ({"offload_optimizer": CPU}, {}, UnsupportedCombination, "ZeRO stage 0"),
    "a compiled Adam": (
        {"stage": 2, "offload_optimizer": CPU}, {"zero_force_ds_cpu_optimizer": True}, UnsupportedCombination,
        "compiles C",
    ),
    "a part": ({"stage": 3, "offload_optimizer": CPU | {"ratio": 0.5}}, {}, UnsupportedCombination, "ratio below 1"),
    "super": ({"stage": 3, "offload_optimizer": CPU | {"super_offload": True}}, {}, UnsupportedCombination, "super"),
    "zenflow": (
        {"stage": 2, "offload_optimizer": CPU, "zenflow": {"topk_ratio": 0.1}}, {}, UnsupportedCombination, "zenflow"
    ),
    "a former name": ({"stage": 2, "cpu_offload": True}, {}, ConfigError, "former name"),
}  # fmt: skip
TAKEN: dict[str, dict[str, Any]] = {
    "nothing": {"stage": 0, "offload_optimizer": {"device": "none"}},
    **{f"moments at {stage}": {"stage": stage, "offload_optimizer": CPU} for stage in (1, 2, 3)},
    "weights": {"stage": 3, "offload_param": CPU},
    "both": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}


def written(folder: Path, section: dict[str, Any], **more: Any) -> str:
    file = folder / "engine.json"
    file.write_text(json.dumps({"zero_optimization": section, **more}), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("case", REFUSED)
def test_offloading_that_no_checkpoint_finds_is_refused(case: str, tmp_path: Path) -> None:
    section, more, fault, words = REFUSED[case]
    with pytest.raises(fault, match=words) as told:
        read_engine_settings(written(tmp_path, section, **more))
    assert type(told.value) is fault


@pytest.mark.parametrize("case", TAKEN)
def test_offloading_to_host_memory_is_taken(case: str, tmp_path: Path) -> None:
    assert read_engine_settings(written(tmp_path, TAKEN[case]))["zero_optimization"] == TAKEN[case]


@pytest.mark.parametrize("pinned", [False, True])
def test_memory_is_page_locked_where_there_is_a_gpu_or_as_the_file_says(pinned: bool) -> None:
    settings = {
        "zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU | {"pin_memory": False}}
    }
    found = with_torch_optimiser(settings, pinned=pinned)
    assert found["zero_force_ds_cpu_optimizer"] is False
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": pinned}
    assert found["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": False}
    plain = {"zero_optimization": {"stage": 3}}
    assert with_torch_optimiser(plain, pinned=pinned) is plain


@pytest.mark.parametrize(
    ("settings", "moments", "weights"),
    [("zero2", False, False), ("zero2-offload", True, False), ("zero3", False, False), ("zero3-offload", True, True)],
)
def test_the_engine_keeps_in_host_memory_what_its_file_says(
    settings: str, moments: bool, weights: bool, tmp_path: Path
) -> None:
    """On a CPU nothing else would show it; the plain stages are the control."""
    card = Card(name="it", model=str(tiny.save_model(tmp_path / "model", "llama", seed=2)))
    it = Student(
        lambda: load(card, inspect(card), seed=0), ranks=Ranks(), settings=settings, precision="fp32",
        optimiser=OptimiserConfig(lr=1e-3), updates=1,
    )  # fmt: skip
    inside = it._engine.optimizer
    assert getattr(inside, "cpu_offload", getattr(inside, "offload_optimizer", None)) is moments
    assert getattr(inside, "offload_param", False) is weights
    it.close()

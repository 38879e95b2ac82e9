"""An adapter of each kind on two ranks, at every ZeRO stage, has the losses, the text and the weights of one process.

A run of every day has each stage and each kind; for the other cells
``bash scripts/test.sh -m slow tests/dist/test_adapters.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillm import distill
from tests import quick, tiny
from tests.dist import adapter_worker
from tests.dist.ranks import start_ranks

CELLS = [
    "gpt2-zero0-lora",
    "gpt2-zero1-bottleneck",
    "llama-zero2-bottleneck",
    "llama-zero3-lora",
    "gpt2-zero3-bottleneck",
]
ALL = [
    *(f"gpt2-zero{stage}-{adapter}" for adapter in adapter_worker.ADAPTERS for stage in range(4)),
    *(f"llama-{stage}-{adapter}" for adapter in adapter_worker.ADAPTERS for stage in ("zero2", "zero3")),
]
SAME = ("loss", "single_loss", "long_loss", "reverse_kl", "tokens", "mean_length", "grad_norm")
TOLERANCE = {"abs": 1e-6, "rel": 1e-5}
WEIGHTS = {
    "lora": ("model.safetensors", "adapter/adapter_model.safetensors"),
    "bottleneck": ("model.safetensors", "adapter/bottleneck.safetensors"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells in one launch of two ranks, and each family in one process: with its adapter, and in whole."""
    folder = tmp_path_factory.mktemp("lora")
    adapter_worker.write_inputs(folder)
    start_ranks("tests.dist.adapter_worker", str(folder), *CELLS)
    with quick.undrawn():
        for family in ("gpt2", "llama"):
            for adapter in adapter_worker.ADAPTERS:
                name = f"alone-{family}-{adapter}"
                distill(adapter_worker.config(folder, name, stage="zero0", family=family, adapter=adapter))
        whole = adapter_worker.config(folder, "whole-llama", stage="zero0", family="llama")
        distill(whole.model_copy(update={"lora": None}))
    return folder


def apart(folder: Path, one: str, other: str) -> set[str]:
    """Names of the figures in which two runs differ at some step."""
    lines = list(zip(tiny.logged(folder / one), tiny.logged(folder / other), strict=True))
    assert len(lines) == adapter_worker.STEPS
    return {name for left, right in lines for name in SAME if left[name] != pytest.approx(right[name], **TOLERANCE)}


@pytest.mark.parametrize("cell", CELLS)
def test_two_ranks_have_the_losses_and_weights_of_one_process(runs: Path, cell: str) -> None:
    check_cell(runs, cell)


@pytest.mark.slow
def test_so_they_have_in_every_other_cell(runs: Path) -> None:
    others = [cell for cell in ALL if cell not in CELLS]
    start_ranks("tests.dist.adapter_worker", str(runs), *others)
    for cell in others:
        check_cell(runs, cell)


def check_cell(runs: Path, cell: str) -> None:
    family, _, adapter = cell.split("-")
    alone = f"alone-{family}-{adapter}"
    assert not apart(runs, alone, cell)
    for name in WEIGHTS[adapter]:
        found, wanted = (load_file(runs / run / "student" / name) for run in (cell, alone))
        assert found.keys() == wanted.keys()
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("other", ["whole-llama", "alone-llama-bottleneck"])
def test_control_training_other_weights_is_seen(runs: Path, other: str) -> None:
    assert {"loss", "grad_norm"} <= apart(runs, "alone-llama-lora", other)

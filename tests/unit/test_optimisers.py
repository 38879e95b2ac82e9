"""Schedules are functions of the update's number, and Muon beside AdamW is the two of them side by side."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minillm.config import OptimiserConfig
from minillm.models import CausalLM
from minillm.muon import Muon
from minillm.optimisers import MuonWithAdamW, build_optimiser, learning_rate_factor, set_learning_rate
from tests import tiny

SCHEDULES = ("constant", "linear", "cosine")


def factors(schedule: str, *, total: int, warmup: int = 0, final: float = 0.0) -> list[float]:
    return [
        learning_rate_factor(update, total=total, schedule=schedule, warmup=warmup, final_fraction=final)
        for update in range(total)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_rises_linearly_to_the_whole_rate(schedule: str) -> None:
    got = factors(schedule, total=20, warmup=4)
    assert got[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert max(got) == 1.0


def test_a_constant_schedule_stays() -> None:
    assert factors("constant", total=7, final=0.3) == [1.0] * 7


def test_a_linear_schedule_falls_evenly_to_its_end() -> None:
    assert factors("linear", total=5, final=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_cosine_schedule_is_half_a_wave() -> None:
    assert factors("cosine", total=5) == pytest.approx([1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0])
    assert factors("cosine", total=5, final=0.5)[2] == pytest.approx(0.75)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(2, 0), (10, 0), (10, 3), (100, 99 - 1)])
def test_the_last_update_has_the_final_share(schedule: str, total: int, warmup: int) -> None:
    assert factors(schedule, total=total, warmup=warmup, final=0.1)[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (5, 5), (6, 5)])
def test_a_stage_of_one_update_or_all_warm_up_divides_by_nothing(schedule: str, total: int, warmup: int) -> None:
    assert factors(schedule, total=total, warmup=warmup)[-1] == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_update_beyond_the_end_keeps_the_final_share(schedule: str) -> None:
    """Never negative; and for a linear schedule never below its end."""
    late = [
        learning_rate_factor(u, total=10, schedule=schedule, warmup=2, final_fraction=0.1) for u in range(10, 40, 7)
    ]
    assert all(factor >= 0.0 for factor in late)
    if schedule == "linear":
        assert late == pytest.approx([0.1] * len(late))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    folder = tiny.save_model(tmp_path_factory.mktemp("model"), "gpt2", seed=0)
    return CausalLM(AutoModelForCausalLM.from_pretrained(folder)).eval()


def names_of(root: nn.Module, parameters: list[Tensor]) -> set[str]:
    places = {id(parameter): name for name, parameter in root.named_parameters()}
    return {places[id(parameter)] for parameter in parameters}


def config(name: str = "muon", **changes: Any) -> OptimiserConfig:
    return OptimiserConfig(name=name, lr=1e-2, **changes)


def give_gradients(module: nn.Module, *, seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=noise)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_is_trained_once_and_only_matrices_decay(name: str, root: CausalLM) -> None:
    optimiser = build_optimiser(root, config(name, weight_decay=0.3))
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert len({id(p) for p in trained}) == len(trained) == len(list(root.parameters()))
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0.0)


def test_muon_takes_the_matrices_inside_the_layers_and_nothing_else(root: CausalLM) -> None:
    """The head is tied here: it counts as an embedding, whatever its name."""
    optimiser = build_optimiser(root, config())
    assert isinstance(optimiser, MuonWithAdamW)
    hidden = names_of(root, optimiser.param_groups[0]["params"])
    want = {n for n, p in root.named_parameters() if p.dim() > 1 and n.startswith("backbone.h.")}
    assert hidden == want and len(want) == 2 * 4
    rest = {name for group in optimiser.param_groups[1:] for name in names_of(root, group["params"])}
    assert {"backbone.wte.weight", "backbone.wpe.weight"} <= rest


def test_an_untied_head_is_no_matter_for_muon(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path, "llama", seed=0, tied=False)
    root = CausalLM(AutoModelForCausalLM.from_pretrained(folder))
    optimiser = build_optimiser(root, config())
    assert "head.weight" not in names_of(root, optimiser.param_groups[0]["params"])
    assert "head.weight" in names_of(root, optimiser.param_groups[1]["params"])


def test_a_frozen_weight_is_not_trained(root: CausalLM) -> None:
    frozen = copy.deepcopy(root)
    frozen.backbone.get_submodule("wpe").requires_grad_(False)
    optimiser = build_optimiser(frozen, config("adamw"))
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    assert len(trained) == len(list(root.parameters())) - 1


def apart(root: CausalLM, settings: OptimiserConfig) -> list[torch.optim.Optimizer]:
    """Muon and AdamW by themselves, over the groups that the two of them have together."""
    groups = build_optimiser(root, settings).param_groups
    muon = Muon(groups[0]["params"], lr=settings.muon_lr or settings.lr, weight_decay=settings.weight_decay)
    plain = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups[1:]]
    adamw = torch.optim.AdamW(plain, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    return [muon, adamw]


def run(root: CausalLM, optimisers: list[torch.optim.Optimizer], rates: list[float]) -> list[Tensor]:
    """The weights after a step at each rate (a share of each group's first rate)."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group.setdefault("base_lr", group["lr"])
    for step, rate in enumerate(rates):
        give_gradients(root, seed=step)
        for optimiser in optimisers:
            set_learning_rate(optimiser, rate)
            optimiser.step()
    return [parameter.detach().clone() for parameter in root.parameters()]


SETTINGS = config(muon_lr=3e-2, weight_decay=0.1)
RATES = [1.0, 0.5, 0.25]


def test_together_they_step_as_each_would_alone(root: CausalLM) -> None:
    one, other = copy.deepcopy(root), copy.deepcopy(root)
    together = run(one, [build_optimiser(one, SETTINGS)], RATES)
    for mine, theirs, start in zip(together, run(other, apart(other, SETTINGS), RATES), root.parameters(), strict=True):
        assert torch.equal(mine, theirs) and not torch.equal(mine, start)


@pytest.mark.parametrize("change", [{"muon_lr": 1e-2}, {"weight_decay": 0.0}, {"betas": (0.8, 0.95)}])
def test_another_setting_is_another_step(change: dict[str, Any], root: CausalLM) -> None:
    """Negative control: the comparison above sees each of these."""
    one, other = copy.deepcopy(root), copy.deepcopy(root)
    together = run(one, [build_optimiser(one, SETTINGS)], RATES)
    changed = OptimiserConfig(**{**SETTINGS.model_dump(), **change})
    alone = run(other, apart(other, changed), RATES)
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(together, alone, strict=True))


def test_a_rate_that_is_set_reaches_both(root: CausalLM) -> None:
    """At rate 0 nothing moves at all, weight decay included; the first group's rate comes back."""
    model = copy.deepcopy(root)
    optimiser = build_optimiser(model, SETTINGS)
    assert [group["base_lr"] for group in optimiser.param_groups] == [3e-2, 1e-2, 1e-2]
    assert set_learning_rate(optimiser, 0.5) == pytest.approx(1.5e-2)
    still = run(model, [optimiser], [0.0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(still, root.parameters(), strict=True))


def test_a_stored_state_continues_as_if_nothing_had_been(root: CausalLM) -> None:
    whole, first, second = (copy.deepcopy(root) for _ in range(3))
    want = run(whole, [build_optimiser(whole, SETTINGS)], RATES)
    begun = build_optimiser(first, SETTINGS)
    run(first, [begun], RATES[:2])
    second.load_state_dict(first.state_dict())
    resumed = build_optimiser(second, SETTINGS)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    give_gradients(second, seed=2)
    set_learning_rate(resumed, RATES[2])  # the groups that came with the state are still those that step
    resumed.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(second.parameters(), want, strict=True))


def test_a_forgotten_state_does_not(root: CausalLM) -> None:
    """Negative control: moments matter."""
    whole, first = copy.deepcopy(root), copy.deepcopy(root)
    want = run(whole, [build_optimiser(whole, SETTINGS)], RATES)
    run(first, [build_optimiser(first, SETTINGS)], RATES[:2])
    give_gradients(first, seed=2)
    fresh = build_optimiser(first, SETTINGS)
    set_learning_rate(fresh, RATES[2])
    fresh.step()
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(first.parameters(), want, strict=True))


def test_gradients_are_cleared_for_both(root: CausalLM) -> None:
    model = copy.deepcopy(root)
    give_gradients(model, seed=0)
    build_optimiser(model, SETTINGS).zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_closure_is_evaluated_once(root: CausalLM) -> None:
    model, calls = copy.deepcopy(root), []
    give_gradients(model, seed=0)
    assert build_optimiser(model, SETTINGS).step(lambda: calls.append(1) or 4.0) == 4.0
    assert calls == [1]

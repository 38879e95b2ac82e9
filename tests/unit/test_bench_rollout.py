"""The rollout benchmark: its slow twin draws the same tokens, lengths are geometric, costs add up, variances are right.

Legend: B rows, T new tokens, R rollouts, D parameters.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm import cli
from minillm.bench.bare import Sizes, draw_key
from minillm.bench.coins import CoinCase, CoinWork, measure_coins, prompts_of, spread_of_vectors
from minillm.bench.rollout import Ending, RolloutCase, RolloutWork, mean_heads, measure_rollout
from minillm.decode import toss
from minillm.errors import ConfigError
from minillm.ranks import Ranks
from minillm.sampling import coin_group
from tests import tiny


def case_of(folder: Path, *, teacher_mix: float = 0.4, groups: int = 1, **sizes: Any) -> RolloutCase:
    names = {
        name: str(tiny.save_model(folder / name, "llama", seed=seed))
        for seed, name in enumerate(("teacher", "student"))
    }
    wanted = {"rows": 5, "prompt_tokens": 4, "new_tokens": 12, "precision": "fp64", **names, **sizes}
    return RolloutCase(sizes=Sizes(**wanted), teacher_mix=teacher_mix, coin_groups=groups, threads=1)


@pytest.mark.parametrize("groups", [1, 3])
def test_mixing_at_every_token_draws_the_same_and_scores_the_same(tmp_path: Path, groups: int) -> None:
    work = RolloutWork(case_of(tmp_path, groups=groups))
    seen = set()
    for _ in range(3):
        lazy, (ids_BT, hidden_BTH) = work.lazy(), work.per_token()
        assert torch.equal(lazy.response_BT, ids_BT)
        assert lazy.teacher_hidden_BTH is not None
        torch.testing.assert_close(lazy.teacher_hidden_BTH, hidden_BTH, rtol=0, atol=1e-10)
        seen.add(tuple(ids_BT.flatten().tolist()))
    assert len(seen) == 3  # each turn is a rollout of its own


def test_a_twin_with_other_coins_would_draw_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = RolloutWork(case_of(tmp_path))
    real = RolloutCase.heads_GT
    monkeypatch.setattr(RolloutCase, "heads_GT", lambda self, n: [[not h for h in row] for row in real(self, n)])
    lazy, (ids_BT, _) = work.lazy(), work.per_token()
    assert not torch.equal(lazy.response_BT, ids_BT)


def test_responses_end_after_a_quarter_of_their_tokens_on_average(tmp_path: Path) -> None:
    """A model that finds all ids equally likely: lengths are geometric, cut at T."""
    work = RolloutWork(case_of(tmp_path, rows=64, new_tokens=24, teacher_mix=0.0))
    for weight in work.student._root.head.parameters():
        weight.data.zero_()
    ending = Ending(work)
    for _ in range(8):
        ending.dropped()
    lengths = [length for turn in ending.lengths for length in turn]
    share = len(ending._eos_ids) / work.vocabulary
    expected = (1 - (1 - share) ** 24) / share
    assert abs(sum(lengths) / len(lengths) - expected) < 4 * expected / math.sqrt(len(lengths))


def test_the_cost_of_rows_left_is_that_of_as_many_rows_step_by_step(tmp_path: Path) -> None:
    ending = Ending(RolloutWork(case_of(tmp_path)))
    ending.lengths = [[3, 1, 2, 3, 1]]
    ending.curves = [{1: [1.0] * 4, 2: [2.0, 2.0, 2.5, 9.0], 4: [5.0] * 4, 5: [7.0] * 4}]
    assert ending.alive_cost(0) == 7.0 + (2.0 + 5.0) / 2 + 2.5  # 5 rows, 3 rows, 2 rows
    ending._lengths_of_many = [[3, 12, 5]]
    ending.curves[0][5] = [7.0] * 12
    assert ending.refilled_cost(0) == pytest.approx(7.0 * 12 * 20 / (5 * 12))  # 20 tokens of 60 places
    ending.costs()
    assert {rows: len(cost_T) for rows, cost_T in ending.curves[1].items()} == {1: 12, 2: 12, 4: 12, 5: 12}


@pytest.mark.parametrize("groups", [1, 4])
def test_heads_are_as_many_as_expected(tmp_path: Path, groups: int) -> None:
    case = case_of(tmp_path, teacher_mix=0.2, groups=groups, new_tokens=128)
    mean, sigmas = mean_heads(case)
    assert abs(mean - groups * 25.6) < 3 and abs(sigmas) < 3


def test_heads_of_another_share_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(tmp_path, teacher_mix=0.2, new_tokens=128)
    other = case_of(tmp_path / "other", teacher_mix=0.22, new_tokens=128)
    real = RolloutCase.heads_GT
    monkeypatch.setattr(RolloutCase, "heads_GT", lambda self, number: real(other, number))
    assert mean_heads(case)[1] > 3


def test_figures_are_whole(tmp_path: Path) -> None:
    found = measure_rollout(case_of(tmp_path), repeats=2)
    assert set(found.seconds) == {"lazy", "per_token", "dropped", "kept", "costs", "many"}
    assert 0 < found.teacher_forwards_over_bound <= 1
    assert len(found.teacher_forwards) == 3
    assert set(found.step_cost) == {1, 2, 4, 5}
    assert json.dumps(dataclasses.asdict(found))


def test_variance_of_vectors_is_that_of_a_textbook() -> None:
    noise = torch.Generator().manual_seed(0)
    rows_RD = torch.randn(50, 7, generator=noise, dtype=torch.float64) * torch.arange(1, 8)
    total, error = spread_of_vectors(rows_RD)
    assert total == pytest.approx(float(rows_RD.var(dim=0).sum()))
    without = [spread_of_vectors(torch.cat([rows_RD[:r], rows_RD[r + 1 :]]))[0] for r in range(50)]
    mean = sum(without) / 50
    assert error == pytest.approx(math.sqrt(49 / 50 * sum((one - mean) ** 2 for one in without)))


def test_error_of_a_variance_covers_its_scatter() -> None:
    noise = torch.Generator().manual_seed(1)
    found = [spread_of_vectors(torch.randn(16, 5, generator=noise, dtype=torch.float64)) for _ in range(400)]
    values = torch.tensor([value for value, _ in found])
    told = torch.tensor([error for _, error in found]).square().mean().sqrt()
    assert 0.85 < float(told / values.std()) < 1.25


def coin_case(**more: Any) -> CoinCase:
    return CoinCase(**{"batches": (8,), "groups": (1,), "new_tokens": 6, "rollouts": 12, **more})


def test_what_rows_share_does_not_shrink_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a gradient, the share of heads that a batch's rows have: all of it is the coins'."""

    def heads(self: CoinWork, objective: Any, step: int) -> torch.Tensor:
        groups = objective._stage.coin_groups
        heads_GT = torch.tensor(
            toss(draw_key(step), teacher_mix=0.4, coin_groups=groups, positions=20), dtype=torch.float64
        )
        uids = [objective._prompts[row].uid for row in objective._order.take(step * 32, 32)]
        return heads_GT[[coin_group(uid, groups) for uid in uids]].mean(dim=0)

    monkeypatch.setattr(CoinWork, "_gradient", heads)
    found = measure_coins(coin_case(batches=(32,), groups=(1, 4), rollouts=100))
    assert found.absolute[32] == pytest.approx(20 * 0.4 * 0.6, rel=0.2)  # that of one row alone, times 32 over 32
    assert found.variance[32]["1"] == pytest.approx(32, rel=0.2)
    assert found.variance[32]["4"] == pytest.approx(32 / 4, rel=0.3)


def test_without_sharing_there_is_nothing_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the same coins for both gives the same variance to the bit."""
    monkeypatch.setattr("minillm.bench.coins._groups_of", lambda case, rows: {"1": 1, "independent": 1})
    found = measure_coins(coin_case())
    assert found.variance[8] == {"1": 1.0, "independent": 1.0}


def test_gradients_are_of_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter has one, and two rollouts differ."""
    ranks = Ranks()
    work = CoinWork(coin_case(), ranks=ranks, prompts=None, ends=())
    seen = []
    gradient = CoinWork._gradient
    monkeypatch.setattr(
        CoinWork, "_gradient", lambda self, objective, step: seen.append(gradient(self, objective, step)) or seen[-1]
    )
    work.variance(8, 1)
    work.close()
    size = sum(p.numel() for p in work._student.root.parameters())
    assert {len(one) for one in seen} == {size} and len(seen) == 12
    assert not torch.equal(seen[0], seen[1])
    assert float((torch.stack(seen).abs().sum(dim=0) > 0).float().mean()) > 0.7  # ids that were not met have none


def test_prompts_of_the_world_are_read_with_the_students_tokenizer() -> None:
    prompts, ends = prompts_of("world:validation", student="micro-world-16x1")
    assert len(prompts) > 50 and ends and all(prompt.ids for prompt in prompts)


def test_the_command_writes_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = case_of(tmp_path).sizes
    words = [
        "bench",
        "rollout",
        "--teacher",
        sizes.teacher,
        "--student",
        sizes.student,
        "--batch",
        "3",
        "--prompt-tokens",
        "4",
    ]
    words += [
        "--new-tokens",
        "8",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--coin-rollouts",
        "3",
        "--json",
        str(tmp_path / "b.json"),
    ]
    small = CoinCase.__dataclass_fields__["batches"].default
    assert small == (16, 64, 256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoinCase.__init__, "__kwdefaults__", {**CoinCase.__init__.__kwdefaults__, "batches": (4,)})
        assert cli._guarded(lambda **options: cli.app(words, **options)) == 0
    found = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))["rollout"]
    assert found["lazy_speedup"] == found["figures"]["lazy_speedup"]["median"]
    assert found["teacher_forwards_over_bound"] <= 1 and found["dropping_over_alive_cost"] > 0
    assert found["many_over_refilled"] > 0
    assert set(found["coin_variance"]) == {"4"}
    assert "sigma" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--alpha", "0"], ["--precision", "int8"]])
def test_what_cannot_be_measured_is_refused_first(words: list[str]) -> None:
    assert cli._guarded(lambda **options: cli.app(["bench", "rollout", *words], **options)) == ConfigError.exit_code

"""Benchmarks measure what they say: the twins compute the same, turns alternate, ratios are of neighbours, and memory
is the peak beyond what stood before."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minillm import cli
from minillm.bench.bare import Bare, Sizes
from minillm.bench.loss import LossCase, LossWork, measure_loss
from minillm.bench.pairs import in_turns, ratio, spread_of
from minillm.bench.peaks import Peaks, measure_peaks
from minillm.bench.record import write_section
from minillm.bench.step import Ours, StepCase, measure_step
from minillm.errors import ConfigError, DataError
from minillm.ranks import Ranks
from tests import tiny
from tests.unit.peak_worker import MIB, peak_of

CPU = torch.device("cpu")
SMALL = LossCase(tokens=11, vocabulary=50, hidden=6, teacher_hidden=8, dtype="float64")


def test_variants_run_in_turns_after_one_that_is_not_counted() -> None:
    calls: list[str] = []
    seconds = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, device=CPU)
    assert "".join(calls) == "ab" * 4
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_turn_by_turn() -> None:
    """A machine that becomes ten times slower half way through changes no ratio."""
    found = ratio([1.0, 10.0, 1.1], [2.0, 20.0, 2.0])
    assert (found.median, found.low, found.high) == (0.5, 0.5, 0.55)
    assert spread_of([3.0, 1.0, 2.0]).median == 2.0


def test_tiles_and_whole_logits_are_the_same_loss_with_the_same_gradients() -> None:
    work = LossWork(SMALL)
    found = []
    for variant in (work.tiles, work.whole_logits):
        loss = variant()
        assert work.hidden_NH.grad is not None and work.head.weight_VH.grad is not None
        found.append((loss, work.hidden_NH.grad.clone(), work.head.weight_VH.grad.clone()))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    assert float(found[0][2].abs().max()) > 1e-3


def test_memory_is_the_peak_beyond_what_stood_before() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        small, large = pool.map(peak_of, [100, 300], chunksize=1)
    assert 99 * MIB <= small < 120 * MIB  # the system counts pages in lots
    assert 299 * MIB <= large < 320 * MIB


def test_figures_of_a_small_case_are_whole() -> None:
    figures = measure_loss(LossCase(tokens=64, vocabulary=40_000, hidden=8, teacher_hidden=8), repeats=2)
    assert set(figures.seconds) == set(figures.extra_bytes) == {"tiles", "whole_logits"}
    # One matrix of logits is 10 MiB; whole logits keep several of them, and so would tiles that were never cut.
    assert figures.extra_bytes["whole_logits"] > 40 * MIB
    assert figures.time_fraction.low <= figures.time_fraction.median <= figures.time_fraction.high


def test_the_command_writes_its_section_and_keeps_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    write_section(file, "other", {"figure": 1})
    words = ["bench", "loss", "--tokens", "8", "--vocabulary", "30000", "--hidden", "4", "--repeats", "1"]
    assert cli._guarded(lambda **options: cli.app([*words, "--json", str(file)], **options)) == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["other"]["figure"] == 1
    assert found["loss"]["cases"][0]["case"]["vocabulary"] == 30000
    assert found["loss"]["time_fraction"] == found["loss"]["cases"][0]["time_fraction"]["median"]
    assert found["loss"]["versions"]["torch"] == torch.__version__
    assert "30,000" in capsys.readouterr().out


def sizes_of(folder: Path, **more: Any) -> Sizes:
    """Two tiny models, few tokens."""
    names = {}
    for seed, name in enumerate(("teacher", "student")):
        names[name] = str(tiny.save_model(folder / name, "llama", seed=seed))
    return Sizes(**{"rows": 3, "prompt_tokens": 4, "new_tokens": 6, **names, **more})


@pytest.mark.parametrize("teacher_mix", [0.0, 0.5])
def test_a_step_and_its_parts_are_timed_and_no_row_ends_early(tmp_path: Path, teacher_mix: float) -> None:
    case = StepCase(sizes=sizes_of(tmp_path), inner_updates=2, threads=1, teacher_mix=teacher_mix)
    found = measure_step(case, repeats=2)
    assert set(found.seconds) == {"step", "decode", "teacher", "update"}
    assert found.tokens_per_s == pytest.approx(3 * 6 / found.seconds["step"].median)
    parts = found.seconds["decode"].high + found.seconds["teacher"].high + 2 * found.seconds["update"].high
    assert found.over_parts.low >= found.seconds["step"].low / parts
    assert found.parameters["student"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(case.sizes.student).parameters()
    )


def test_the_bare_decode_loop_draws_as_many_tokens_as_the_step_does(tmp_path: Path) -> None:
    case = StepCase(sizes=sizes_of(tmp_path), inner_updates=1, threads=1)
    ranks = Ranks()
    ours, bare = Ours(case, ranks=ranks), Bare(case.sizes, device=ranks.device)
    assert bare.decode().shape == (3, 6) and bare.teacher().shape[:2] == (3, 10)
    before = [p.detach().clone() for p in ours.student.root.parameters()]
    assert ours.step()["tokens"] == 3 * 6
    assert ours.student.updates_done == 1
    assert any(not torch.equal(old, new) for old, new in zip(before, ours.student.root.parameters(), strict=True))
    ours.close()


@pytest.mark.parametrize("groups", [1, 3])
def test_the_bare_teacher_reads_as_often_as_the_teacher_of_a_mixed_step(tmp_path: Path, groups: int) -> None:
    sizes = sizes_of(tmp_path, rows=5, new_tokens=9)
    case = StepCase(sizes=sizes, inner_updates=1, threads=1, teacher_mix=0.4, coin_groups=groups)
    ranks = Ranks()
    ours, bare = Ours(case, ranks=ranks), Bare(sizes, device=ranks.device)
    counts = [(ours.step()["teacher_forwards"], bare.mixed_teacher(case.heads_GT(step))) for step in range(4)]
    assert all(mine == theirs for mine, theirs in counts)
    assert len({mine for mine, _ in counts}) > 1  # not because no coin fell, or always the same ones
    ours.close()


@pytest.mark.parametrize("content", ["[1]", "{", '{"schema": 2}'])
def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="name another file"):
        write_section(file, "loss", {})
    assert file.read_text(encoding="utf-8") == content


def test_an_unknown_dtype_is_refused_before_anything_is_measured() -> None:
    assert (
        cli._guarded(lambda **options: cli.app(["bench", "loss", "--dtype", "int8"], **options))
        == ConfigError.exit_code
    )


def test_floors_are_of_the_machine_and_follow_from_counts() -> None:
    peaks = measure_peaks(CPU, torch.float32)
    assert 1e8 < peaks.bytes_per_s < 1e13 and 1e9 < peaks.flops_per_s < 1e15
    made_up = Peaks(flops_per_s=200.0, bytes_per_s=50.0)
    assert made_up.seconds_to_read(100) == 2.0
    assert made_up.seconds_to_multiply(parameters=10, tokens=30) == 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_the_script_for_a_gpu_says_so_where_there_is_none(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "bench_gpu.sh"
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "b.json")], capture_output=True, text=True, check=False,
        env={**os.environ, "MINILLM_PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.strip().endswith("torch sees no GPU here")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["step", "rollout", "scale"])
def test_pairs_that_cannot_be_timed_are_refused_before_they_are_built(command: str, tmp_path: Path) -> None:
    """Other ids, or too few positions (a tiny model has 48)."""
    sizes = sizes_of(tmp_path)
    other = tiny.save_model(tmp_path / "other", "llama", seed=3, rows=40)
    ours = ["bench", command, "--prompt-tokens", "4", "--json", str(tmp_path / "b.json")]
    for words in (
        ["--teacher", str(other), "--student", sizes.student, "--new-tokens", "6"],
        ["--teacher", sizes.teacher, "--student", sizes.student, "--new-tokens", "60"],
    ):
        assert cli._guarded(lambda **options: cli.app([*ours, *words], **options)) == ConfigError.exit_code  # noqa: B023
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("file", ["", "missing/b.json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(file: str, tmp_path: Path) -> None:
    words = ["bench", "loss", "--json", str(tmp_path / file)]
    assert cli._guarded(lambda **options: cli.app(words, **options)) == DataError.exit_code

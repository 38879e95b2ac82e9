"""``minillm bench scale``: processes step together and leave nothing behind, the fit finds a power law, and memory
beyond weights and gradients is flat in the vocabulary once tiles are full."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minillm import cli
from minillm.bench import scale
from minillm.bench.bare import Sizes
from minillm.bench.pairs import Spread
from minillm.bench.scale import exponent, measure_length, measure_scale, memory_here
from minillm.bench.scale_worker import Team, WorkerLost, team
from minillm.bench.step import StepCase
from minillm.errors import ConfigError, PositionsExceeded
from minillm.scoring import WORKING_BYTES
from tests import tiny


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> StepCase:
    folder = tmp_path_factory.mktemp("models")
    teacher, student = (tiny.save_model(folder / name, "llama", seed=seed) for seed, name in enumerate("ts"))
    sizes = Sizes(teacher=str(teacher), student=str(student), rows=3, prompt_tokens=4, new_tokens=6)
    return StepCase(sizes=sizes, inner_updates=2, threads=1)


def alive(pid: int) -> bool:
    """Whether a process of this number is there, a finished one that nobody has waited for included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids(ready: Team) -> list[int]:
    return [worker.pid for worker in ready.workers if worker.pid is not None]


def test_two_joined_ranks_step_and_one_that_dies_ends_the_other(case: StepCase) -> None:
    with (
        pytest.raises(WorkerLost, match=r"process 1 of 2 ended \(signal 9\)"),
        team(case, settings="zero2", joined=True) as ready,
    ):
        started = pids(ready)
        ready.step()
        ready.step()
        assert len(started) == 2 and all(map(alive, started))
        assert all(os.getpgid(pid) == pid for pid in started)  # groups of their own, which can be ended whole
        os.kill(started[1], signal.SIGKILL)
        ready.step()  # the other waits for it in a collective, and would for half an hour
    assert not any(map(alive, started))
    assert multiprocessing.active_children() == []


def test_a_worker_that_cannot_start_says_why(case: StepCase) -> None:
    with (
        pytest.raises(WorkerLost, match=r"exit code 1(?s:.*)no such name in ds_configs"),
        team(case.of(rows=1), settings="zero9", joined=False, size=1),
    ):
        raise AssertionError("it was ready")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_fit_finds_the_power_of_a_law(power: float) -> None:
    sizes = [512, 1024, 2048, 4096]
    assert exponent(sizes, [0.003 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_control_a_fixed_cost_bends_the_fit() -> None:
    """A step of half constant, half proportional time is no power law; what is found lies well below 1."""
    sizes = [512, 1024, 2048, 4096]
    assert 0.5 < exponent(sizes, [1.0 + size / 512 for size in sizes]) < 0.9


def test_the_exponent_is_that_of_the_measured_seconds(case: StepCase) -> None:
    found = measure_length(case, lengths=[24, 6, 6], repeats=1)
    assert list(found.seconds) == [6, 24]
    times = [one.median for one in found.seconds.values()]
    assert found.exponent.median == pytest.approx(exponent([3 * 6, 3 * 24], times))
    # The same times over sizes that lie nearer together.
    assert found.exponent_with_prompts.median == pytest.approx(exponent([10, 28], times))


def test_memory_is_flat_in_the_vocabulary_once_tiles_are_full(case: StepCase) -> None:
    """Control: a quarter of a tile at the smallest vocabulary is a whole one at four times as many ids."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        flat, growing = pool.starmap(memory_here, [(case, [80_000, 40_000], 2.0), (case, [40_000, 160_000], 0.25)])
    assert flat.tokens * 8 * 40_000 > WORKING_BYTES["cpu"]  # more than one tile of both models holds
    assert flat.growth == pytest.approx(1.0, abs=0.1)
    assert flat.gradients[80_000] - flat.gradients[40_000] == 40_000 * 16 * 4
    assert flat.peak[40_000] > WORKING_BYTES["cpu"] / 2
    assert growing.growth > 2


def test_the_command_writes_medians_and_all_figures(
    case: StepCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = {"low": 0.8, "high": 1.0}
    weak = scale.WeakFigures(
        seconds={name: Spread(median=2.0, **ends) for name in ("joined", "apart")},
        efficiency=Spread(median=0.9, **ends),
    )
    monkeypatch.setattr(scale, "measure_weak", lambda case, *, repeats: {"zero2": weak, "zero3": weak})
    memory = scale.MemoryFigures(tokens=9, peak={8: 4, 16: 9}, gradients={8: 2, 16: 4}, growth=2.5)
    monkeypatch.setattr(scale, "measure_memory", lambda case, *, vocabularies: memory)
    file = tmp_path / "bench.json"
    words = [
        "bench",
        "scale",
        "--teacher",
        case.sizes.teacher,
        "--student",
        case.sizes.student,
        "--batch",
        "2",
        "--repeats",
        "1",
    ]
    words += ["--prompt-tokens", "4", "--new-tokens", "6", "--lengths", "4", "--lengths", "8", "--json", str(file)]
    assert cli._guarded(lambda **options: cli.app(words, **options)) == 0
    found = json.loads(file.read_text(encoding="utf-8"))["scale"]
    assert (found["weak_zero2"], found["weak_zero3"], found["memory_growth"]) == (0.9, 0.9, 2.5)
    assert found["length_exponent"] == found["figures"]["length"]["exponent"]["median"]
    assert set(found["figures"]["length"]["seconds"]) == {"4", "8"} and found["threads"] == 1
    assert found["figures"]["weak"]["zero2"]["seconds"]["joined"] == {"median": 2.0, **ends}
    assert "zero3: apart / joined" in capsys.readouterr().out


def test_efficiency_is_apart_over_joined_turn_by_turn(case: StepCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up teams: those of two runs take 20 ms a step, those of joined ranks 40, each turn on its own."""
    told: list[tuple[str, bool, int]] = []

    @dataclasses.dataclass
    class Sleepy:
        seconds: float

        def step(self) -> None:
            time.sleep(self.seconds)

    @contextlib.contextmanager
    def sleepy_team(case: StepCase, *, settings: str, joined: bool, size: int) -> Iterator[Sleepy]:
        told.append((settings, joined, size))
        yield Sleepy(0.04 if joined else 0.02)

    monkeypatch.setattr(scale, "team", sleepy_team)
    found = scale.measure_weak(case, repeats=3)
    assert told == [("zero0", False, 2), ("zero2", True, 2), ("zero3", True, 2)]
    for stage in ("zero2", "zero3"):
        assert found[stage].seconds["joined"].low >= 0.04 and found[stage].efficiency.median < 0.8


def test_one_gpu_leaves_ranks_out(case: StepCase, monkeypatch: pytest.MonkeyPatch) -> None:
    length, memory = object(), object()
    monkeypatch.setattr(scale, "measure_weak", lambda *_, **__: pytest.fail("two ranks on one device"))
    monkeypatch.setattr(scale, "measure_length", lambda *_, **__: length)
    monkeypatch.setattr(scale, "measure_memory", lambda *_, **__: memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = measure_scale(case, lengths=[4, 8], vocabularies=[30, 60], repeats=1)
    assert found.weak == {} and found.length is length


def test_what_cannot_be_measured_is_refused_before_anything_starts(
    case: StepCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "measure_weak", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(ConfigError, match="--lengths: got 8, 8; wanted at least two"):
        measure_scale(case, lengths=[8, 8], vocabularies=[30, 60], repeats=1)
    with pytest.raises(PositionsExceeded, match="48 positions"):
        measure_scale(case, lengths=[8, 64], vocabularies=[30, 60], repeats=1)
    with pytest.raises(ConfigError, match="no card of that name"):
        measure_scale(case.of(student="nobody"), lengths=[4, 8], vocabularies=[9, 30], repeats=1)

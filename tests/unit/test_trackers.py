"""Trackers: the figures of a run also go elsewhere.

1. Each tracker hears every line of the log, named by stage and kind, with steps that never fall.
2. A package that is missing, and a tracker that does not start, are told before a model is loaded.
3. One that fails on the way is told once and switched off; the run goes on and the others too.
4. Rank 0 alone logs, and nothing is imported where none is asked for.
5. A run that goes on counts its steps on from where it stood, whichever stage that was in.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minillm import api, distill
from minillm.config import RunConfig
from minillm.errors import Stopped, TrackerError
from minillm.ranks import Ranks
from minillm.stops import Stops
from minillm.store import RunFolder
from minillm.trackers import Trackers, require_packages, tracked
from tests import tiny

NAMES = ("tensorboard", "wandb", "trackio")


class Recorder:
    """Stands for a tracker of any package: a run of wandb or trackio, or TensorBoard's writer."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.closed = 0
        self.fails_at: int | None = None

    def log(self, figures: dict[str, float], *, step: int) -> None:
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("no route\nto host")
        self.lines.append((step, figures))

    def add_scalar(self, name: str, value: float, *, global_step: int) -> None:
        self.log({name: value}, step=global_step)

    def close(self) -> None:
        self.closed += 1

    finish = close


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Recorder]]:
    """Packages that record; what each of them was asked to start, by name."""
    found: dict[str, list[Recorder]] = {name: [] for name in NAMES}

    def start(name: str) -> Callable[..., Recorder]:
        return lambda **options: found[name].append(Recorder(**options)) or found[name][-1]  # type: ignore[func-returns-value]

    for name in ("wandb", "trackio"):
        package: Any = ModuleType(name)
        package.init = start(name)
        monkeypatch.setitem(sys.modules, name, package)
    board: Any = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = start("tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    for name in ("WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("trackers")
    tiny.save_model(top / "teacher", "llama", seed=1)
    tiny.save_model(top / "student", "llama", seed=2)
    tiny.save_prompts(top / "prompts.jsonl")
    return top


def run_of(place: Path, out: Path, *names: str) -> RunConfig:
    """Two stages of two steps each, with a validation in the second."""
    sft = {"kind": "sft", "steps": 2, "batch": 4, "optimiser": {"lr": 1e-2}}
    distil = {"kind": "minillm", "steps": 2, "prompts": 8, "optimiser": {"lr": 1e-2}, "validate_every": 2}
    prompts = str(place / "prompts.jsonl")
    return tiny.minillm_config(
        out, teacher=place / "teacher", student=place / "student", prompts=place / "prompts.jsonl", name="a/b",
        run_stages=(sft, distil), run_trackers=names,
        run_data={"train": prompts, "validation": prompts, "validation_limit": 4, "max_prompt_tokens": 8},
    )  # fmt: skip


def merged(lines: list[tuple[int, dict[str, float]]]) -> dict[tuple[int, str], float]:
    """Every figure by step and name; TensorBoard gets them one by one."""
    return {(step, name): value for step, figures in lines for name, value in figures.items()}


def wanted(folder: Path) -> dict[tuple[int, str], float]:
    """The same from metrics.jsonl."""
    found: dict[tuple[int, str], float] = {}
    for record in map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        step = record["step"] + (2 if record["stage"] == "minillm" else 0)
        speed = {f"speed/{name}": value for name, value in record.pop("speed", {}).items()}
        for name, value in {**record, **speed}.items():
            if isinstance(value, int | float) and name != "step":
                found[step, f"{record['stage']}/{record['kind']}/{name}"] = value
    return found


def test_every_tracker_hears_every_line_of_the_log(
    place: Path, tmp_path: Path, made: dict[str, list[Recorder]]
) -> None:
    folder = distill(run_of(place, tmp_path, *NAMES))
    expected = wanted(folder)
    places = {"sft/train", "sft/train/speed", "minillm/train", "minillm/train/speed", "minillm/validation"}
    assert {name.rpartition("/")[0] for _, name in expected} == places
    for name in NAMES:
        (tracker,) = made[name]
        steps = [step for step, _ in tracker.lines]
        assert merged(tracker.lines) == expected and steps == sorted(steps) and set(steps) == {1, 2, 3, 4}
        assert tracker.closed == 1
    assert made["tensorboard"][0].options["log_dir"] == str(folder / "tensorboard")
    for name in ("wandb", "trackio"):
        options = made[name][0].options
        assert (options["project"], options["name"]) == ("minillm", "a/b")
        assert options["config"]["decoding"]["max_new_tokens"] == 10
        json.dumps(options["config"])


@pytest.mark.parametrize("after", range(1, 5))
def test_a_run_that_goes_on_counts_its_steps_on(
    after: int, place: Path, tmp_path: Path, made: dict[str, list[Recorder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each step: inside the first stage, where it is over, inside the second, and where that is."""
    settings = run_of(place, tmp_path, "wandb")
    asked = [0]

    def agreed(self: Stops, ranks: Any) -> str:
        asked[0] += 1
        return "SIGTERM" if asked[0] == after else ""

    monkeypatch.setattr(Stops, "agreed", agreed)
    with pytest.raises(Stopped):
        distill(settings)
    folder = distill(settings)
    first, second = made["wandb"]
    assert {step for step, _ in first.lines} == set(range(1, after + 1))
    assert {step for step, _ in second.lines} == set(range(after + 1, 5))
    assert merged(first.lines + second.lines) == wanted(folder)


def test_the_environment_names_the_project_of_wandb(
    tmp_path: Path, made: dict[str, list[Recorder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    with tracked(RunFolder(tmp_path, writes=True), ("wandb",), run="a", settings={}, ranks=Ranks()):
        pass
    assert (made["wandb"][0].options["project"], made["wandb"][0].options["dir"]) == ("ours", "elsewhere")


def test_without_trackers_nothing_is_imported_and_the_log_is_the_same(place: Path, tmp_path: Path) -> None:
    absent = {name for name in ("wandb", "trackio", "torch.utils.tensorboard") if name not in sys.modules}
    folder = distill(run_of(place, tmp_path))
    assert absent and absent.isdisjoint(sys.modules) and wanted(folder)
    assert not (folder / "tensorboard").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_told_before_a_model_is_read(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    monkeypatch.setattr(api, "check_pair", None)
    with pytest.raises(TrackerError, match=rf"pip install 'minillm\[{name}\]'") as caught:
        distill(run_of(place, tmp_path, name))
    assert f"{name} is not installed" in str(caught.value) and caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "wandb":
                raise AttributeError("module 'numpy' has no attribute 'float_'")

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(TrackerError, match=r"cannot be imported \(AttributeError: module 'numpy'"):
        require_packages(["wandb"])


def test_one_that_does_not_start_is_told_before_a_model_is_loaded(
    place: Path, tmp_path: Path, made: dict[str, list[Recorder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("no API key")

    monkeypatch.setattr(sys.modules["trackio"], "init", refuse)
    with (
        monkeypatch.context() as patch,
        pytest.raises(TrackerError, match="trackio does not start: ValueError: no API"),
    ):
        patch.setattr(api, "load_teacher", None)
        distill(run_of(place, tmp_path, *NAMES))
    assert made["wandb"][0].closed == made["tensorboard"][0].closed == 1
    distill(run_of(place, tmp_path, "tensorboard"))  # nothing blocks the next try


def test_one_that_fails_on_the_way_is_told_once_and_switched_off(
    place: Path, tmp_path: Path, made: dict[str, list[Recorder]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plain = sys.modules["wandb"].init

    def fragile(**options: Any) -> Recorder:
        run: Recorder = plain(**options)
        run.fails_at = 2
        return run

    monkeypatch.setattr(sys.modules["wandb"], "init", fragile)
    folder = distill(run_of(place, tmp_path, *NAMES))
    said = capsys.readouterr().err
    assert said.count("tracker wandb failed (ConnectionError: no route) and is switched off; the run goes on") == 1
    assert [step for step, _ in made["wandb"][0].lines] == [1] and made["wandb"][0].closed == 0
    assert merged(made["trackio"][0].lines) == wanted(folder)
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["state"] == "done"


def test_an_end_that_fails_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise OSError("disk full")

    last = Recorder()
    Trackers({"a": SimpleNamespace(close=refuse), "b": last}).close()  # type: ignore[dict-item]
    assert "tracker a failed (OSError: disk full)" in capsys.readouterr().err and last.closed == 1


def test_an_interruption_is_not_swallowed_and_trackers_are_closed(
    tmp_path: Path, made: dict[str, list[Recorder]]
) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        tracked(RunFolder(tmp_path, writes=True), ("wandb",), run="a", settings={}, ranks=Ranks()),
    ):
        raise KeyboardInterrupt
    assert made["wandb"][0].closed == 1


def test_numbers_alone_are_told_and_an_alarm_counts_one() -> None:
    tracker = Recorder()
    trackers = Trackers({"a": SimpleNamespace(log=lambda step, figures: tracker.log(figures, step=step))})  # type: ignore[dict-item]
    place = {"stage": "s", "step": 3, "update": 6}
    trackers.hear({"kind": "train", **place, "loss": math.nan, "kl": math.inf, "lr": 0.5, "words": "x", "none": None})
    trackers.hear({"kind": "alarm", **place, "name": "length", "action": "warn", "words": "too long"})
    assert tracker.lines == [(3, {"s/train/update": 6.0, "s/train/lr": 0.5}), (3, {"s/alarm/length": 1.0})]


@pytest.fixture
def second() -> Iterator[Any]:
    """The second of two ranks, as far as trackers ask."""
    yield SimpleNamespace(first=False, gather_objects=lambda mine: mine)


def test_other_ranks_log_nothing(tmp_path: Path, made: dict[str, list[Recorder]], second: Any) -> None:
    with tracked(RunFolder(tmp_path, writes=False), NAMES, run="a", settings={}, ranks=second):
        pass
    assert made == {name: [] for name in NAMES}


def test_a_start_that_fails_on_rank_0_is_told_on_the_others(tmp_path: Path, second: Any) -> None:
    second.gather_objects = lambda mine: ["trackers: wandb does not start", *mine]
    with (
        pytest.raises(TrackerError, match="wandb does not start"),
        tracked(RunFolder(tmp_path, writes=False), NAMES, run="a", settings={}, ranks=second),
    ):
        pass


def test_starting_over_removes_old_curves(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").touch()
    RunFolder(tmp_path, writes=True).begin("")
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_itself_reads_the_figures(place: Path, tmp_path: Path) -> None:
    folder = distill(run_of(place, tmp_path, "tensorboard"))
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    found = {(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert found == pytest.approx(wanted(folder), rel=1e-5)

"""The loop keeps the best student, stops when nothing improves, and is not disturbed by being watched."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm import distill
from minillm.config import RunConfig
from minillm.errors import DataError, RunExists
from minillm.loop import Keep, run_steps
from minillm.manifests import sha256_of
from minillm.moments import Progressed
from minillm.ranks import Ranks
from minillm.run_log import OF_THE_PROCESS
from minillm.store import RunFolder
from minillm.updates import News, Update, over_updates
from tests import tiny


class FakeStudent:
    """Counts its updates."""

    def __init__(self) -> None:
        self.updates_done = 0
        self.learning_rate = 0.5

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        total = sum(float(loss_of()) for loss_of in losses)
        self.updates_done += 1
        return total, 3.0 if self.updates_done % 2 else 2.0


class FakeObjective:
    """Two updates a step; the figures say in which order things happened."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def collect(self, step: int, student: Any) -> tuple[int, dict[str, float]]:
        self.order.append(f"collect {step}")
        return step, {"tokens": 7.0, "loss": -1.0}

    @contextmanager
    def learning(self, collected: int, student: Any, *, made: int = 0) -> Iterator[Iterator[Update]]:
        yield (self._update(collected, n) for n in range(made, 2))

    def hear(self, measured: Mapping[str, float]) -> None:
        self.order.append("hear")

    def news(self) -> list[News]:
        return []

    def _update(self, collected: int, n: int) -> Update:
        self.order.append(f"losses {collected}.{n}")
        figures = {"loss": float(collected * 10 + n), "clipped_share": 0.9 - 0.5 * n}
        return Update([lambda: torch.tensor(1.0)], lambda: figures, largest=("clipped_share",))


class Run:
    """One run of the loop over fakes, with the values that a validation finds, in order."""

    def __init__(
        self, folder: Path, values: Sequence[float] | None, *, steps: int, every: int, patience: int, highest: bool
    ) -> None:
        self.published: list[tuple[int, dict[str, float]]] = []
        self.objective, self.student = FakeObjective(), FakeStudent()
        self.left = list(values or [])
        self.folder = RunFolder(folder, writes=True)
        self.folder.begin("")
        self.done: Progressed = run_steps(
            self.objective,
            self.student,  # type: ignore[arg-type]
            stage="a",
            steps=steps,
            ranks=Ranks(),
            folder=self.folder,
            headline=("loss", "absent"),
            validate=None if values is None else self._validate,
            validate_every=every,
            keep=Keep(metric="kl", highest=highest),
            patience=patience,
            publish=self._publish,
        )

    def _validate(self, student: Any) -> dict[str, float]:
        return {"kl": self.left.pop(0), "other": 3.0}

    def _publish(self, scores: Mapping[str, float]) -> str:
        self.published.append((self.student.updates_done // 2, dict(scores)))
        return f"weights of update {self.student.updates_done}"


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    def start(values: Sequence[float] | None, *, steps: int = 6, **changes: Any) -> Run:
        return Run(tmp_path / "run", values, **{"every": 1, "patience": 0, "highest": False, "steps": steps, **changes})

    return start


@pytest.mark.parametrize(
    ("highest", "want"), [(False, [(1, 5.0), (2, 4.0), (4, 3.0)]), (True, [(1, 5.0), (3, 6.0), (6, 7.0)])]
)
def test_each_new_best_is_published_with_its_scores(
    highest: bool, want: list[tuple[int, float]], run: Callable[..., Run]
) -> None:
    done = run([5.0, 4.0, 6.0, 3.0, 3.0, 7.0], highest=highest)
    assert done.published == [(step, {"kl": value, "other": 3.0}) for step, value in want]
    assert (done.done.best_step, done.done.best) == want[-1]
    assert done.done.best_figures == {"kl": want[-1][1], "other": 3.0}


def test_without_a_validation_the_last_student_is_published_without_scores(run: Callable[..., Run]) -> None:
    for values, every in ((None, 0), (None, 1), ([], 0)):
        done = run(values, every=every)
        assert done.published == [(6, {})] and done.done.step == 6


def test_a_stage_ends_with_a_validation_wherever_the_interval_falls(run: Callable[..., Run]) -> None:
    done = run([5.0, 4.0, 3.0], steps=5, every=2)
    assert [step for step, _ in done.published] == [2, 4, 5] and not done.left
    assert [step for step, _ in run([5.0, 4.0], steps=4, every=2).published] == [2, 4]


@pytest.mark.parametrize(("patience", "last", "stale"), [(0, 7, 3), (1, 3, 1), (2, 6, 2), (3, 7, 3), (4, 7, 3)])
def test_patience_counts_validations_since_the_best(
    patience: int, last: int, stale: int, run: Callable[..., Run]
) -> None:
    """An equal value is no improvement; a better one starts the count again; 0 never stops."""
    done = run([5.0, 4.0, 4.0, 3.0, 3.5, 3.0, 9.0], steps=7, patience=patience)
    assert (done.done.step, done.done.stale) == (last, stale)
    assert done.done.stopped_early is (0 < patience <= 3)


def test_a_run_that_stops_early_makes_no_further_step(run: Callable[..., Run]) -> None:
    done = run([5.0, 6.0, 7.0], steps=50, patience=2)
    assert (done.done.step, done.done.stopped_early, done.student.updates_done) == (3, True, 6)
    assert done.published == [(1, {"kl": 5.0, "other": 3.0})]


def test_a_measure_that_is_no_number_is_never_the_best(run: Callable[..., Run]) -> None:
    """A NaN at first would otherwise beat everything after it: no comparison with it is ever true."""
    done = run([math.nan, 5.0, math.nan, 4.0], steps=4)
    assert [step for step, _ in done.published] == [2, 4]


def test_if_every_validation_is_no_number_the_last_student_is_published_and_that_is_said(
    run: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    done = run([math.nan] * 3, steps=3)
    assert done.published == [(3, {})] and done.done.best is None
    said = capsys.readouterr().out
    assert said.count("kl is no number here and decides nothing") == 3
    assert "a: no validation found a number for kl; the student of the last step, 3, is handed on" in said
    run([math.nan, 5.0, math.nan], steps=3)
    said = capsys.readouterr().out
    assert said.count("kl is no number here and decides nothing") == 2 and "handed on" not in said
    for values, every in (([5.0, 4.0], 1), (None, 0)):
        run(values, steps=2, every=every)
        said = capsys.readouterr().out
        assert "no number" not in said and "handed on" not in said


def test_a_step_collects_then_learns_and_is_logged_once(run: Callable[..., Run]) -> None:
    done = run([5.0, 4.0], steps=2)
    assert done.objective.order == [
        "collect 0", "losses 0.0", "losses 0.1", "hear", "collect 1", "losses 1.0", "losses 1.1", "hear",
    ]  # fmt: skip
    lines = tiny.logged(done.folder.path)
    assert [(line["stage"], line["step"], line["update"]) for line in lines] == [("a", 1, 2), ("a", 2, 4)]
    assert [line["loss"] for line in lines] == [0.5, 10.5], "the mean of its updates"
    assert all((line["tokens"], line["lr"]) == (7.0, 0.5) for line in lines)
    # What is wrong in one update must not be hidden by the next.
    assert all((line["grad_norm"], line["clipped_share"]) == (3.0, 0.9) for line in lines)
    found = tiny.logged(done.folder.path, "validation")
    assert [(line["step"], line["kl"], line["other"]) for line in found] == [(1, 5.0, 3.0), (2, 4.0, 3.0)]


def test_figures_of_one_update_are_those_of_the_step() -> None:
    """Bit for bit, and numbers that are not finite stay so."""
    one = {"loss": 0.1 + 0.2, "share": 0.7, "drift": math.inf}
    assert over_updates([one], largest={"share"}) == one and over_updates([], largest=()) == {}
    both = over_updates([one, {"loss": math.nan, "share": 0.1, "drift": -math.inf}], largest={"share"})
    assert math.isnan(both["loss"]) and math.isnan(both["drift"]) and both["share"] == 0.7


def test_seconds_only_grow(run: Callable[..., Run]) -> None:
    done = run([5.0] * 6)
    lines = (done.folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds) and done.done.seconds >= seconds[-1] - 1e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 pair: its dropout draws from the global random stream. The student's head has padded rows."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.save_model(folder / "teacher", "gpt2", seed=1)
    tiny.save_model(folder / "student", "gpt2", seed=2, rows=32)
    tiny.save_prompts(folder / "prompts.jsonl")
    tiny.save_prompts(folder / "bare.jsonl", rows=5, responses=False)
    return folder


OPTIMISER = {"lr": 1e-2, "schedule": "constant"}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"kind": "sft", "steps": 3, "batch": 6, "optimiser": OPTIMISER},
    "minillm": {"kind": "minillm", "steps": 3, "prompts": 6, "optimiser": OPTIMISER},
}


def config(inputs: Path, out: Path, kind: str, *, validation: str = "prompts.jsonl", **changes: Any) -> RunConfig:
    return tiny.minillm_config(
        out,
        teacher=inputs / "teacher",
        student=inputs / "student",
        prompts=inputs / "prompts.jsonl",
        run_stages=({**STAGES[kind], **changes},),
        run_data={
            "train": str(inputs / "prompts.jsonl"),
            "validation": str(inputs / validation),
            "max_prompt_tokens": 8,
            "validation_limit": 5,
        },
    )


def train_lines(settings: RunConfig) -> list[dict[str, Any]]:
    lines = tiny.logged(distill(settings))
    return [{key: value for key, value in line.items() if key not in OF_THE_PROCESS} for line in lines]


@pytest.mark.parametrize("kind", ["sft", "minillm"])
def test_the_same_run_twice_has_the_same_figures(kind: str, inputs: Path, tmp_path: Path) -> None:
    """Dropout, too, is a function of the run's seed: not of what this process did before."""
    torch.manual_seed(1)
    one = train_lines(config(inputs, tmp_path / "one", kind))
    torch.manual_seed(2)
    assert train_lines(config(inputs, tmp_path / "two", kind)) == one and len(one) == 3
    other = config(inputs, tmp_path / "three", kind).model_copy(update={"seed": 11})
    assert train_lines(other) != one, "the control: another seed is another run"


@pytest.mark.parametrize("kind", ["sft", "minillm"])
def test_watching_does_not_change_the_training(kind: str, inputs: Path, tmp_path: Path) -> None:
    """Every figure of every step is the same, with a validation and a publication at each step and with none."""
    torch.manual_seed(3)
    alone = train_lines(config(inputs, tmp_path / "alone", kind))
    torch.manual_seed(3)
    watched = config(inputs, tmp_path / "watched", kind, validate_every=1)
    assert train_lines(watched) == alone
    assert len(tiny.logged(tmp_path / "watched" / "run", "validation")) == 3


def test_fine_tuning_keeps_by_sampled_responses_if_asked_to(inputs: Path, tmp_path: Path) -> None:
    """And trains the same: random numbers of the sampling are its own."""
    keep = {"metric": "mean_length", "mode": "min"}
    plain = config(inputs, tmp_path / "loss", "sft", validate_every=1)
    shortest = config(inputs, tmp_path / "shortest", "sft", validate_every=1, keep=keep)
    assert train_lines(shortest) == train_lines(plain)
    found = tiny.logged(tmp_path / "shortest" / "run", "validation")
    assert all({"loss", "rouge_l", "mean_length"} <= line.keys() for line in found) and len(found) == 3
    by_loss = tiny.logged(tmp_path / "loss" / "run", "validation")
    assert [line["loss"] for line in by_loss] == [line["loss"] for line in found]
    assert not any("rouge_l" in line for line in by_loss), "the control: nothing is sampled for the loss"
    status = json.loads((tmp_path / "shortest" / "run" / "run.json").read_text(encoding="utf-8"))
    best = min(found, key=lambda line: line["mean_length"])
    assert status["stages"]["sft"]["best"] == best["mean_length"]
    published = tmp_path / "shortest" / "run" / "student" / "model.safetensors"
    assert status["stages"]["sft"]["published"] == sha256_of(published)


def test_a_metric_that_the_validation_rows_cannot_give_is_refused_before_training(inputs: Path, tmp_path: Path) -> None:
    settings = config(
        inputs, tmp_path, "minillm", validation="bare.jsonl", validate_every=1,
        keep={"metric": "rouge_l", "mode": "max"},
    )  # fmt: skip
    with pytest.raises(DataError, match="rouge_l"):
        distill(settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_is_done_is_not_done_for_other_prompts(tmp_path: Path) -> None:
    """The same command again does nothing; with other prompts, or without its student, it is refused untouched."""
    teacher = tiny.save_model(tmp_path / "teacher", "llama", seed=1)
    student = tiny.save_model(tmp_path / "student", "llama", seed=2)
    prompts = tiny.save_prompts(tmp_path / "prompts.jsonl")
    config = tiny.minillm_config(tmp_path, teacher=teacher, student=student, prompts=prompts, steps=1)
    folder = distill(config)
    before = (folder / "metrics.jsonl").read_bytes()
    assert distill(config) == folder
    tiny.save_prompts(prompts, rows=16)
    with pytest.raises(RunExists, match="made from another train prompts"):
        distill(config)
    tiny.save_prompts(prompts)
    (folder / "student").rename(folder / "moved")
    with pytest.raises(RunExists, match="lost its student folder"):
        distill(config)
    assert (folder / "metrics.jsonl").read_bytes() == before
    json.loads((folder / "run.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)

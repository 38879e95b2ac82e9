"""Figures of a run, beside its metrics.jsonl, in TensorBoard, Weights & Biases or trackio.

A tracker is never part of a run's result: one that fails on the way is told once and switched off. Keys and places of
accounts come from the environment, which these packages read themselves (WANDB_API_KEY, HF_TOKEN, …).
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minillm.errors import TrackerError
from minillm.ranks import Ranks
from minillm.store import RunFolder

PROJECT = "minillm"
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""What each tracker is imported as."""


class Tracker(Protocol):
    """Where figures go. Both calls may fail as they like."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of one step; steps never fall, and one may come twice with other names."""

    def close(self) -> None:
        """Brings everything to where it goes; nothing is logged afterwards."""


class _TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path) -> None:
        module = importlib.import_module(_MODULES["tensorboard"])
        self._writer: Any = module.SummaryWriter(log_dir=str(folder / "tensorboard"), flush_secs=30)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self) -> None:
        self._writer.close()


class _Run:
    """A run of wandb, or of trackio, which has the same calls."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb(run: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    # What is given here would win over the environment.
    project, place = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_DIR", str(folder))
    module = importlib.import_module(_MODULES["wandb"])
    return _Run(module.init(project=project, name=run, dir=place, config=dict(settings)))


def _trackio(run: str, folder: Path, settings: Mapping[str, Any]) -> Tracker:
    return _Run(importlib.import_module(_MODULES["trackio"]).init(project=PROJECT, name=run, config=dict(settings)))


_STARTS: dict[str, Callable[[str, Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": lambda run, folder, settings: _TensorBoard(folder),
    "wandb": _wandb,
    "trackio": _trackio,
}


class Trackers:
    """All trackers of a run: each line of the log goes to each of them, until it fails."""

    def __init__(self, trackers: Mapping[str, Tracker], *, before: int = 0) -> None:
        """``before`` are the steps of stages that were over when the run went on."""
        self._trackers = dict(trackers)
        self._stage, self._before, self._last = "", before, 0

    def hear(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl. Names get stage and kind before them (``sft/train/loss``), and steps go on from
        one stage to the next."""
        stage, step = str(record["stage"]), int(record["step"])
        if stage != self._stage:
            self._stage, self._before, self._last = stage, self._before + self._last, 0
        self._last = max(self._last, step)
        if figures := _figures(record):
            self._each(lambda tracker: tracker.log(self._before + step, figures))

    def close(self) -> None:
        """Ends all that still work."""
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            # Whatever the package, its disk or its network raise: the run is worth more than its curves.
            except Exception as error:
                del self._trackers[name]
                print(
                    f"note: tracker {name} failed ({_in_short(error)}) and is switched off; the run goes on, and "
                    "metrics.jsonl has everything",
                    file=sys.stderr, flush=True,
                )  # fmt: skip


def require_packages(names: Sequence[str]) -> None:
    """Raise ``TrackerError`` where the package of a tracker is missing or cannot be imported."""
    for name in names:
        remedy = f"pip install 'minillm[{name}]', or take {name} out of trackers"
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            raise TrackerError(f"trackers: {name} is not installed ({error})\n  {remedy}") from error
        except Exception as error:  # a package that is there and does not fit what is beside it
            raise TrackerError(f"trackers: {name} cannot be imported ({_in_short(error)})\n  {remedy}") from error


@contextlib.contextmanager
def tracked(
    folder: RunFolder, names: Sequence[str], *, run: str, settings: Mapping[str, Any], ranks: Ranks, before: int = 0
) -> Iterator[None]:
    """Sends every line of the folder's log to these trackers while the block runs; rank 0 alone has any. Steps are
    counted from those ``before`` on, which stages made that were over when the run went on.

    Raises ``TrackerError`` on every rank where one does not start.
    """
    trackers, problems = Trackers({}), list[str]()
    if ranks.first:
        try:
            trackers = Trackers(_start(names, run=run, folder=folder.path, settings=settings), before=before)
        except TrackerError as error:
            problems.append(str(error))
    if names and (told := ranks.gather_objects(problems)):
        raise TrackerError(told[0])
    folder.listen(trackers.hear)
    try:
        yield
    finally:
        trackers.close()


def _start(names: Sequence[str], *, run: str, folder: Path, settings: Mapping[str, Any]) -> dict[str, Tracker]:
    started: dict[str, Tracker] = {}
    for name in names:
        try:
            started[name] = _STARTS[name](run, folder, settings)
        except Exception as error:
            Trackers(started).close()
            raise TrackerError(
                f"trackers: {name} does not start: {_in_short(error)}\n  mend its account, key or place in the "
                f"environment, or take {name} out of trackers"
            ) from error
    return started


def _figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line by their full names; an alarm counts 1."""
    place = f"{record['stage']}/{record['kind']}"
    if record["kind"] == "alarm":
        return {f"{place}/{record['name']}": 1.0}
    return {
        f"{place}/{name}": float(value)
        for name, value in _flat(record)
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The figures of a line, those of a record within it as ``record/figure``."""
    for name, value in record.items():
        yield from (
            ((f"{name}/{key}", inner) for key, inner in value.items()) if isinstance(value, dict) else [(name, value)]
        )


def _in_short(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])

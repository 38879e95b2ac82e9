"""Finished cells that no run made, and the study that they belong to: what tests of a study's figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.study.config import StudyConfig


def study(arms: Sequence[str], *, compare_with: str, seeds: Sequence[int], **more: Any) -> StudyConfig:
    """A study that nothing is read for: its recipe need not exist."""
    values = {"name": "made-up", "recipe": "none.yaml", "results": "none", "seeds": tuple(seeds), **more}
    return StudyConfig(**{"arms": {arm: {} for arm in arms}, "compare_with": compare_with, **values})


def cell(temperatures: Mapping[str, Mapping[str, float]], *, state: str = "done", **training: Any) -> dict[str, Any]:
    """A cell with these figures by temperature."""
    lengths = {"0-5": {"prompts": 2}, "11+": {"prompts": 1}}
    figures = {
        key: {**own, "by_length": {name: {**of, **own} for name, of in lengths.items()}}
        for key, own in temperatures.items()
    }
    course = {"cpu_seconds": 3.0, "updates": 10, "tokens": 900, "alarms": {}, "validations": [], **training}
    return {
        "state": state, "reason": None if state == "done" else "NonFinite: a loss is not finite",
        "training": course, **({"temperatures": figures} if state == "done" else {}),
    }  # fmt: skip


def cells(figures: Mapping[str, Mapping[int, Mapping[str, float]]], *, at: str = "1.0") -> dict[str, dict[int, Any]]:
    """Arm -> seed -> cell, of figures at one temperature."""
    return {arm: {seed: cell({at: own}) for seed, own in of_arm.items()} for arm, of_arm in figures.items()}

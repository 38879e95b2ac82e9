"""A run of this process that breaks off between two updates, and goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minillm import distill, student_engine
from minillm.config import RunConfig
from tests import tiny


class _Cut(Exception):
    pass


def assert_it_goes_on_to_the_same_bits(whole: RunConfig, broken: RunConfig, *, files: Sequence[str]) -> None:
    """``broken``, which saves after every step and is cut off at its fifth update, ends with the files and losses of
    ``whole``, the same run but for its name."""
    unbroken, steps = distill(whole), iter(range(99))
    update = student_engine.Student.update

    def until(self: Any, losses: Any) -> Any:
        if next(steps) == 4:
            raise _Cut
        return update(self, losses)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Cut):
        patch.setattr(student_engine.Student, "update", until)
        distill(broken)
    shutil.rmtree(Path(broken.out) / broken.name / "student", ignore_errors=True)
    again = distill(broken)
    for name in files:
        assert (again / name).read_bytes() == (unbroken / name).read_bytes(), name
    assert [line["loss"] for line in tiny.logged(again)] == [line["loss"] for line in tiny.logged(unbroken)]

"""What a merge found and did: the record that stands beside the merged weights, and its figures in words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.merge_figures import BIN_DEGREES, histogram
from minillm.weight_merging import Method


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What was found and done in one layer group."""

    name: str
    parameters: int
    start_norm: float
    norms: tuple[float, ...]
    """By model: of its task vector."""
    angles: tuple[float | None, ...]
    """In degrees, of models 0 and 1, 0 and 2, …, 1 and 2, …; None where a task vector is zero."""
    shares: tuple[float, ...]
    """By model: what its task vector was multiplied with, before eta."""
    edges: tuple[str, ...]
    """What made it LERP there: "zero" task vectors, "parallel" ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A folder that was merged."""

    folder: str
    weights_sha256: str
    """As ``publish.weights_sha256`` has it of a published student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """A merge that was made: ``merge.json`` has the same."""

    start: Source
    models: tuple[Source, ...]
    method: Method
    weights: tuple[float, ...]
    """They sum to 1."""
    eta: float
    cosines: tuple[float, ...]
    """By model: of its matrices and those of the start."""
    groups: tuple[Group, ...]
    weights_sha256: str
    """Of what was written."""
    files: tuple[str, ...]
    """Of what was written: another merge into the same folder replaces these, and nothing else."""

    @property
    def angles(self) -> tuple[float, ...]:
        """All of all groups and pairs, in degrees."""
        return angles_of(self.groups)

    def record(self) -> dict[str, Any]:
        """What ``merge.json`` holds."""
        return {
            "start": _plain(self.start), "models": [_plain(model) for model in self.models], "method": self.method,
            "weights": list(self.weights), "eta": self.eta, "cosines_with_start": list(self.cosines),
            "angles": angle_words(self.angles), "weights_sha256": self.weights_sha256,
            "files": list(self.files), "groups": [_plain(group) for group in self.groups],
        }  # fmt: skip


def angles_of(groups: Sequence[Group]) -> tuple[float, ...]:
    """All of all groups and pairs, in degrees; of groups that stood still there are none."""
    return tuple(angle for group in groups for angle in group.angles if angle is not None)


def angle_words(degrees: Sequence[float]) -> str:
    """Angles in a line: their median and range, and how many stand in each part of the half circle."""
    if not degrees:
        return "no angles between task vectors"
    counts = enumerate(histogram(degrees))
    bins = ", ".join(f"{at * BIN_DEGREES}-{(at + 1) * BIN_DEGREES}° {count}" for at, count in counts if count)
    middle, least, most = statistics.median(degrees), min(degrees), max(degrees)
    return f"angles of task vectors: median {middle:.0f}°, {least:.0f}° to {most:.0f}°; {bins}"


def eta_words(eta: float) -> str:
    """An eta as folders are called by it: as short as may be, and never as another one."""
    short = f"{eta:g}"
    return short if float(short) == eta else repr(float(eta))


def _plain(record: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in ((field, getattr(record, field)) for field in record.__dataclass_fields__)}  # fmt: skip

"""Draws docs/methods/teacher-size.md's picture from the records of scripts/teacher_sizes.sh:

python docs/images/draw_teacher_size.py docs/results/teacher-sizes docs/results/teacher-sizes/early
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#c8b196", "#d08a5f", "#2f6f9f", "#5b8c5a", "#6b4f8a")
"""By size, smallest first."""
BASE = "64x3-long"
"""Draw by draw: what single draws have in common, their text, says nothing of teachers."""
CHOICE = "expected+position_mean+norm"
"""The quickstart's, for the lower row; the upper has the paper's sampled returns."""
STUDENTS = ("student at the end of fine-tuning", "student early in fine-tuning")
FEW = {2, 3, 5, 20, 30, 50, 70}
MARKS = {"long": "o", "short": "^", "other temperature": "D"}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Records by teacher."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(record["teacher"]["name"], []).append(record)
    return found


def kind(teacher: dict[str, Any]) -> str:
    """How it was made."""
    if teacher["temperature"] != 1.0:
        return "other temperature"
    return "short" if teacher["name"].endswith("short") else "long"


def main(*sources: str) -> None:
    """Variance above, SNR of the whole gradient below; against size and reverse KL, for one student after the other."""
    figure = Figure(figsize=(7.3 * len(sources), 6.6), dpi=100, layout="constrained")
    parts = np.atleast_1d(figure.subfigures(1, len(sources), wspace=0.03))
    for part, source, name in zip(parts, sources, STUDENTS, strict=False):
        part.suptitle(name, fontsize=11)
        draw(part.subplots(2, 2, sharey="row"), read(Path(source)))
    figure.savefig(Path(__file__).with_name("teacher-size.png"))


def draw(axes: Any, teachers: dict[str, list[dict[str, Any]]]) -> None:
    """Single draws small and pale, their means large."""
    sizes = sorted({records[0]["teacher"]["parameters"] for records in teachers.values()})
    base = {record["asked"]["sizes"]["seed"]: record["absolute"]["variance"] for record in teachers[BASE]}
    for records in teachers.values():
        teacher = records[0]["teacher"]
        colour = COLOURS[sizes.index(teacher["parameters"])]
        kl = [record["drawn"]["reverse_kl"] for record in records]
        variance = [record["absolute"]["variance"] / base[record["asked"]["sizes"]["seed"]] for record in records]
        snr = [1e3 * record["choices"][CHOICE]["whole_snr"] for record in records]
        for row, values in enumerate((variance, snr)):
            for column, at in enumerate(([float(teacher["parameters"])] * len(kl), kl)):
                look = {"color": colour, "marker": MARKS[kind(teacher)], "linestyle": "none"}
                axes[row, column].plot(at, values, markersize=4, alpha=0.3, **look)
                axes[row, column].plot(np.mean(at), np.mean(values), markersize=8, **look)
    label(axes, teachers, sizes)


def label(axes: Any, teachers: dict[str, list[dict[str, Any]]], sizes: list[int]) -> None:
    """Names, scales and what the marks mean."""
    shapes = {records[0]["teacher"]["parameters"]: name.split("-")[0] for name, records in teachers.items()}
    for colour, size in zip(COLOURS, sizes, strict=False):
        axes[0, 0].plot([], [], "s", color=colour, label=f"{shapes[size]}, {size:,}")
    for name, mark in MARKS.items():
        axes[0, 1].plot([], [], mark, color="#555555", label=name)
    for row, what in enumerate(("variance, over that of 64x3 long", "1000 SNR, whole gradient")):
        axes[row, 0].set_ylabel(what)
        for column, name in enumerate(("parameters of the teacher", "reverse KL, nats a response")):
            axes[row, column].set_xscale("log")
            axes[row, column].set_xlabel(name)
            axes[row, column].spines[["top", "right"]].set_visible(False)
        axes[row, 1].xaxis.set_major_formatter("{x:g}")
        axes[row, 1].xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in FEW else "")
    for at in axes[1]:
        at.axhline(0.0, color="#bbbbbb", linewidth=0.8)
    for at in axes[0]:
        at.set_yscale("log")
        at.yaxis.set_major_formatter("{x:g}")
        at.yaxis.set_minor_formatter(lambda value, _: f"{value:.1g}" if round(value, 9) in (0.2, 0.5, 2.0, 5.0) else "")
        at.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Draws docs/methods/teacher-size.md's picture: python docs/images/draw_teacher_size.py docs/results/teacher-sizes"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

COLOURS = ("#c8b196", "#d08a5f", "#2f6f9f", "#5b8c5a", "#6b4f8a")
"""By size, smallest first."""
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


def main(source: str) -> None:
    """Variance in the upper row, SNR of the whole gradient in the lower; against size on the left, reverse KL right."""
    teachers = read(Path(source))
    sizes = sorted({records[0]["teacher"]["parameters"] for records in teachers.values()})
    figure = Figure(figsize=(10.4, 7.4), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for records in teachers.values():
        teacher = records[0]["teacher"]
        colour = COLOURS[sizes.index(teacher["parameters"])]
        kl = [record["drawn"]["reverse_kl"] for record in records]
        variance = [record["absolute"]["variance"] for record in records]
        snr = [1e3 * record["choices"]["sampled"]["whole_snr"] for record in records]
        for row, values in enumerate((variance, snr)):
            for column, at in enumerate(([float(teacher["parameters"])] * len(kl), kl)):
                look = {"color": colour, "marker": MARKS[kind(teacher)], "linestyle": "none"}
                axes[row, column].plot(at, values, markersize=4, alpha=0.35, **look)
                axes[row, column].plot(np.mean(at), np.mean(values), markersize=8, **look)
    label(axes, teachers, sizes)
    figure.savefig(Path(__file__).with_name("teacher-size.png"))


def label(axes: Any, teachers: dict[str, list[dict[str, Any]]], sizes: list[int]) -> None:
    """Names, scales and what the marks mean."""
    shapes = {records[0]["teacher"]["parameters"]: name.split("-")[0] for name, records in teachers.items()}
    for colour, size in zip(COLOURS, sizes, strict=False):
        axes[0, 0].plot([], [], "s", color=colour, label=f"{shapes[size]}, {size:,}")
    for name, mark in MARKS.items():
        axes[0, 1].plot([], [], mark, color="#555555", label=name)
    for row, what in enumerate(
        ("variance of the long-horizon gradient", "1000 SNR of the whole gradient, one response")
    ):
        axes[row, 0].set_ylabel(what)
        for column, name in enumerate(("parameters of the teacher", "reverse KL, nats a response")):
            axes[row, column].set(xlabel=name, xscale="log")
            axes[row, column].spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yscale("log")
    for at in axes[0]:
        at.legend(frameon=False, fontsize=8.5)


if __name__ == "__main__":
    main(sys.argv[1])

"""Draws the README's picture from the quickstart's results: python docs/images/draw.py runs/quickstart/results.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MODELS = {
    "teacher": ("teacher", "#8a8f98"),
    "sft": ("student", "#c8b196"),
    "sft_control": ("student, more\nfine-tuning", "#d08a5f"),
    "minillm": ("student,\nMiniLLM", "#2f6f9f"),
}


def main(source: str) -> None:
    """Two bar charts with their intervals, and validity over temperatures."""
    results = json.loads(Path(source).read_text(encoding="utf-8"))
    figure = Figure(figsize=(12.1, 3.7), dpi=100)
    bars, divergence, lines = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    draw_bars(bars, results["models"], "validity", title="valid answers (temperature 1)")
    draw_bars(divergence, results["models"], "reverse_kl", title="reverse KL to the teacher, nats")
    for model, (name, colour) in MODELS.items():
        points = sorted(
            (float(temperature), found["models"][model]["validity"]["mean"])
            for temperature, found in results["temperatures"].items()
        )
        lines.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=2, label=name.replace("\n", " "))
    lines.set_title("valid answers by sampling temperature", loc="left", fontsize=11)
    lines.set_xlabel("temperature")
    lines.legend(frameon=False, fontsize=8.5, loc="lower left")
    for axes in (bars, divergence, lines):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("quickstart.png"))


def draw_bars(axes: Any, models: dict[str, Any], measure: str, *, title: str) -> None:
    """One bar a model, with its mean above and its interval across."""
    for place, (model, (_, colour)) in enumerate(MODELS.items()):
        mean, (low, high) = models[model][measure]["mean"], models[model][measure]["ci95"]
        axes.bar(place, mean, 0.7, color=colour)
        axes.errorbar(place, mean, [[max(mean - low, 0.0)], [max(high - mean, 0.0)]], color="#333333", capsize=4)
        axes.text(place, high, f"{abs(mean):.2f}", ha="center", va="bottom", fontsize=9.5)
    axes.set_xticks(range(len(MODELS)), [name for name, _ in MODELS.values()], fontsize=9)
    axes.set_ylim(0, max(models[model][measure]["ci95"][1] for model in MODELS) * 1.12)
    axes.set_title(title, loc="left", fontsize=11)


if __name__ == "__main__":
    main(sys.argv[1])

"""A diagnosis for people: a table, a plot, advice in words; and for programs: JSON."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from minillm.diagnose.measure import Figures
from minillm.diagnose.names import REFERENCE, name_of
from minillm.diagnose.run import Diagnosis

SCHEMA = 1
HEAVY = 0.5
"""Where a twentieth of the prompts holds more of the variance than this, more prompts are wanted."""


def best(diagnosis: Diagnosis) -> tuple[str, Figures]:
    """The choice of least variance within prompts among those that keep the expectation."""
    keeping = {name: of for name, of in diagnosis.whole.choices.items() if of.keeps_expectation}
    name = min(keeping, key=lambda each: keeping[each].variance)
    return name, keeping[name]


def least_error(diagnosis: Diagnosis) -> tuple[str, Figures]:
    """The choice of least mean squared error of the whole gradient, each at its best weight."""
    choices = diagnosis.whole.choices
    name = min(choices, key=lambda each: choices[each].error)
    return name, choices[name]


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Plain values; ``variance.NAME`` and ``snr.NAME``, ``best``, and everything else that was found."""
    whole, drawn = diagnosis.whole, diagnosis.drawn
    name, figures = best(diagnosis)
    wise, of = least_error(diagnosis)
    return {
        "schema": SCHEMA,
        "variance": {each: found.variance for each, found in whole.choices.items()},
        "snr": {each: found.snr for each, found in whole.choices.items()},
        "best": {"name": name, "variance": figures.variance, "interval": figures.interval},
        "least_error": {
            "name": wise, "weight": of.weight, "error": of.error, "signal_told_from_0": _told(diagnosis, wise),
        },
        "choices": {each: dataclasses.asdict(found) for each, found in whole.choices.items()},
        "single": {
            "length": whole.single_length, "variance": whole.single_variance, "error_alone": whole.error_single_alone,
            "long_over_single": whole.long_over_single,
        },
        "absolute": dataclasses.asdict(whole.absolute),
        "drawn": {
            "tokens": drawn.tokens, "samples": drawn.samples, "effective_share": drawn.effective_share,
            "outside_clip": drawn.outside_clip, "reverse_kl": drawn.reverse_kl,
            "heaviest_twentieth": whole.heaviest_share,
        },
        "budget": diagnosis.budget.responses, "left_out": list(diagnosis.left_out),
        "sizes": dataclasses.asdict(diagnosis.sizes),
        "stage": diagnosis.stage.model_dump(mode="json"), "decoding": dataclasses.asdict(diagnosis.decoding),
        "made_from": diagnosis.made_from,
    }  # fmt: skip


def rows(diagnosis: Diagnosis) -> list[list[str]]:
    """The table, one choice a row, least variance first; as wide as a terminal of 80 columns."""
    yours = name_of(diagnosis.stage)
    return [
        [
            ("" if of.keeps_expectation else "* ") + ("> " if name == yours else "") + name,
            f"{of.variance:.2f} ({of.interval[0]:.2f}–{of.interval[1]:.2f})",
            f"{1e3 * of.snr:.1f}",
            "–" if of.bias_squared is None else f"{of.bias_squared:.2f}",
            f"{of.error:.2f}",
        ]
        for name, of in _ordered(diagnosis)
    ]


COLUMNS = ("", "variance (95 %)", "1000 SNR", "bias²", "error")
FOOTNOTE = """\
variance: of the long-horizon gradient given the prompt, over the paper's
  sampled returns; 95 % by resampling prompts
1000 SNR: a thousand times the squared length of its expectation over the variance of one response's
bias²: squared length of what its expectation differs by, over the paper's
  (below 0 as often as above where nothing differs)
error: least mean squared error of the whole gradient at your number of
  responses, by the best weight of the term, over its squared length
*: does not keep the expectation    >: the configuration's own choice"""


def advice(diagnosis: Diagnosis) -> list[str]:
    """What the figures say, a sentence each."""
    whole, drawn, budget = diagnosis.whole, diagnosis.drawn, diagnosis.budget.responses
    name, figures = best(diagnosis)
    low, high = figures.interval
    kept = f"{figures.variance:.2f} ({low:.2f}–{high:.2f})"
    first = f"{name} has {kept} of the variance of the paper's returns and keeps their expectation."
    if name == REFERENCE:
        first = "No other choice that keeps the paper's expectation has less variance."
    elif high >= 1.0:
        first = f"No choice that keeps the expectation has visibly less variance than the paper's ({name}: {kept})."
    lines = [first, _of_sizes(whole.long_over_single)]
    reference = whole.choices[REFERENCE]
    if reference.snr > 2 * reference.snr_error:
        noise = math.sqrt(1.0 / (reference.snr * budget))
        lines.append(
            f"With {budget:g} responses an update the standard error of the paper's long-horizon gradient is "
            f"{noise:.1f} times its length."
        )
    else:
        lines.append("The expected long-horizon gradient cannot be told from 0 with this many prompts.")
    wise, of = least_error(diagnosis)
    sure = "" if _told(diagnosis, wise) else " With so faint a signal that is a guess: other prompts may name another."
    lines.append(
        f"Least squared error at {budget:g} responses an update: {wise} with long_weight about {of.weight:.2g} "
        f"({of.error:.2f}; at weight 1 {of.error_at_one:.2f}, the single-step term alone "
        f"{whole.error_single_alone:.2f}).{sure}"
    )
    if diagnosis.stage.teacher_mix > 0:
        lines.append(
            f"Teacher mixing: weights leave the worth of {drawn.effective_share:.0%} of the tokens; a clip on weight "
            f"times ratio would touch {drawn.outside_clip:.0%} of them before any update."
        )
    if whole.heaviest_share > HEAVY:
        lines.append(
            f"A twentieth of the prompts holds {whole.heaviest_share:.0%} of the variance: heavy tails; draw more with "
            "--prompts before believing small differences."
        )
    return lines


def draw_plot(diagnosis: Diagnosis, path: Path) -> None:
    """Variances with their intervals as bars, into a file of any kind that matplotlib knows by its ending."""
    from matplotlib.figure import Figure

    ordered = _ordered(diagnosis)
    figure = Figure(figsize=(7.5, 0.8 + 0.28 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    for place, (_, of) in enumerate(ordered):
        reach = [[max(of.variance - of.interval[0], 0.0)], [max(of.interval[1] - of.variance, 0.0)]]
        axes.barh(place, of.variance, color="#3b6ea5" if of.keeps_expectation else "#b9c6d3")
        axes.errorbar(of.variance, place, xerr=reach, fmt="none", ecolor="#222222", elinewidth=1.0, capsize=2.5)
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#888888", linewidth=0.8)
    axes.set_xlabel("variance given the prompt, over the paper's sampled returns\n(pale: another expectation)")
    figure.savefig(path, dpi=150)


def _told(diagnosis: Diagnosis, name: str) -> bool:
    """Whether the expected long-horizon gradient of a choice is more than two standard errors from 0."""
    of = diagnosis.whole.choices[name]
    return of.snr > 2 * of.snr_error


def _of_sizes(ratio: float | None) -> str:
    if ratio is None:
        return "How long the long-horizon gradient is beside the single-step one cannot be told."
    return f"The expected long-horizon gradient is {ratio:.2g} times as long as the single-step one."


def _ordered(diagnosis: Diagnosis) -> list[tuple[str, Figures]]:
    return sorted(diagnosis.whole.choices.items(), key=lambda pair: pair[1].variance)

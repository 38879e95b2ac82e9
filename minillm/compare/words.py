"""What a comparison says, in plain words; every sentence looks at its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.compare.summary import main_measures
from minillm.measures import MEASURES
from minillm.report_text import figure, interval, reading

SURE = 0.05
MOST_PROMPTS = 1_000_000
"""More prompts than this are not worth naming."""
HARDLY_MET = 0.05
"""Where the ranges of diversity do not meet in more than this share of the resamples, the interval is no good."""


def describe(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(heading, sentences): one part a pair, and what holds for all of them."""
    parts = [
        (
            f"{pair['other']} against {pair['base']}",
            [
                *(verdict(pair, name, several=len(found["names"]) > 2) for name in main_measures(pair["changes"])),
                *equal_diversity(pair),
            ],
        )
        for pair in found["comparisons"]
    ]
    return [*parts, ("How to read this", reading_help(found))]


def verdict(pair: Mapping[str, Any], name: str, *, several: bool) -> str:
    """Whether the other model is better in one measure, by how much, or how many prompts it would take to know.

    With ``several`` comparisons shown, Holm's correction has the last word.
    """
    change, label = pair["changes"][name], MEASURES[name].label
    if change["mean"] is None:
        return f"{label}: not defined here."
    size = figure(change["mean"], name, signed=True)
    if change["ci95"] is None:
        return f"{label}: {size}; too few prompts ({change['prompts']}) for an interval, so nothing is known of chance."
    size += f" ({interval(change, name, signed=True)})"
    if not change["error"] and not change["mean"]:
        return f"{label}: no difference at all, in any resample."
    if reading(change) == "includes zero":
        return f"{label}: the data cannot tell: {size}; the interval holds 0. {power(change, name)}"
    good = (change["mean"] > 0) == (MEASURES[name].better == "higher")
    who, than = (pair["other"], pair["base"]) if good else (pair["base"], pair["other"])
    if not good:  # told from the better one's side
        size = figure(-change["mean"], name, signed=True)
        size += f" ({interval({'ci95': [-end for end in reversed(change['ci95'])]}, name, signed=True)})"
    levels = " against ".join(figure(change[side], name) for side in (("other", "base") if good else ("base", "other")))
    levels += f" of {than}"
    corrected = change.get("holm")
    if several and corrected is not None and corrected > SURE:
        return (
            f"{label}: {who} looks better: {size}, but among all the comparisons shown chance gives such a difference "
            f"too easily (corrected {probability(corrected)}); {levels}. {wins(pair, name, of=who)}"
        )
    sure = f" Corrected for all the comparisons shown: {probability(corrected)}." if several and corrected else ""
    return f"{label}: {who} is better: {size}; {levels}.{sure} {wins(pair, name, of=who)}"


def power(change: Mapping[str, Any], name: str) -> str:
    """How many prompts a difference of this size would need, and what size these prompts could tell."""
    could = f"the {change['prompts']} here would tell one of {figure(change['detectable'], name)}"
    needs = change["needs"]
    if needs is None or needs > MOST_PROMPTS:
        return f"With this spread {could}; to tell one so near 0 would need more than a million prompts."
    rough = float(f"{needs:.2g}")
    return f"With this spread about {rough:,.0f} prompts would be needed to tell a difference of this size; {could}."


def wins(pair: Mapping[str, Any], name: str, *, of: str) -> str:
    """Prompts won and lost by one of the two, and the sign test."""
    found = pair["wins"].get(name)
    if found is None or not found["prompts"]:
        return ""
    ahead, behind = ("wins", "losses") if of == pair["other"] else ("losses", "wins")
    return (
        f"Prompt by prompt {of} is ahead on {found[ahead]}, behind on {found[behind]} and level on "
        f"{found['ties']} (sign test: {probability(found['p'])})."
    )


def equal_diversity(pair: Mapping[str, Any]) -> list[str]:
    """Whether the one that is better at a temperature is still better at the variety that both reach."""
    told = []
    for name, found in pair["equal_diversity"].items():
        label, over = MEASURES[name].label, MEASURES[found["over"]].label
        ranges = [found["base_range"], found["other_range"]]
        if None in ranges:
            who = " and ".join(pair[side] for side, ends in zip(("base", "other"), ranges, strict=True) if ends is None)
            told.append(
                f"At equal diversity: {who} has one temperature only, so a better model cannot be told from a sharper "
                "one; evaluate at several (evaluation.temperatures)."
            )
            return told
        spans = [f"{figure(ends[0], found['over'])} to {figure(ends[1], found['over'])}" for ends in ranges]
        if found["mean"] is None:
            told.append(
                f"At equal diversity: no comparison, since {pair['base']} has {over} {spans[0]} and {pair['other']} "
                f"{spans[1]}, which do not overlap; evaluate at more temperatures."
            )
            return told
        shared = f"{figure(found['range'][0], found['over'])} to {figure(found['range'][1], found['over'])}"
        size = figure(found["mean"], name, signed=True)
        if found["ci95"] is not None:
            size += f" ({interval(found, name, signed=True)})"
        if reading(found) == "excludes zero":
            good = (found["mean"] > 0) == (MEASURES[name].better == "higher")
            says = f"{pair['other'] if good else pair['base']} is better there, too"
            if _turned(pair, name, found):
                says = (
                    f"{pair['other'] if good else pair['base']} is better there, which it is not at equal temperature"
                )
        else:
            says = "what is left there cannot be told from 0"
        told.append(f"At equal diversity ({over} {shared}, which both reach by temperature) {label} is {size}: {says}.")
        if found["apart"] and found["apart"] > HARDLY_MET:
            told.append(
                f"In {found['apart']:.0%} of the resamples the two did not overlap; those are left out, so trust this "
                "interval less."
            )
    return told


def reading_help(found: Mapping[str, Any]) -> list[str]:
    """What a difference is, what the intervals cover, what was corrected, and the notes."""
    options = found["options"]
    told = [
        f"Differences are the second model less the first, paired over the same {found['prompts']} prompts.",
        "Intervals are 95 % bootstrap intervals over prompts, drawn jointly for both models"
        + (", and over sampling seeds." if options["also_seeds"] else ", each with its responses under all seeds.")
        + " They do not cover another training seed: each model was trained once.",
    ]
    if len(found["names"]) > 2:
        told.append(
            f"“Corrected” is Holm's correction over the {found['corrected']} comparisons that get a verdict "
            "(of every pair shown). Other measures, other temperatures, kinds of prompts, wins and losses, and equal "
            "diversity are not corrected."
        )
        if found["corrected"] * found["least_p"] > SURE:
            told.append(
                f"With {options['resamples']} resamples no probability is below {found['least_p']:.2g}, too coarse for "
                "so many comparisons: give more --resamples."
            )
    else:
        told.append("Nothing is corrected for the number of measures, temperatures and kinds of prompts.")
    tie = options["tolerance"]
    told.append(
        "A prompt's figure is its mean over the sampling seeds; a tie is a difference of at most "
        + ("half of the last digit shown." if tie is None else f"{tie:g}.")
    )
    return [*told, *found["notes"]]


def probability(value: float) -> str:
    """``p = 0.012``, or that it is less than a thousandth."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _turned(pair: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> bool:
    """Whether the difference at equal temperature says the opposite, or nothing."""
    change = pair["changes"].get(name)
    return change is None or reading(change) != "excludes zero" or (change["mean"] > 0) != (found["mean"] > 0)

"""What a study says: which arm is best in each main measure, which ones the data cannot tell from it, and what is left
of the differences from the arm that all are compared with once their number is counted.

The best is chosen by its mean, and then held against each other arm by the differences of the same seeds: *best less
arm*. Where that interval includes zero, the seeds do not tell the two apart.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.compare.pairs import holm
from minillm.measures import MEASURES
from minillm.report_text import figure, interval
from minillm.study.paired import excludes_zero, paired, stars
from minillm.study.table import Cells

STATES = ("behind", "within", "unknown", "ahead")
"""How an arm stands to the best: its interval excludes zero, includes it, there is none (fewer than two shared seeds),
or it is the better one on the seeds that both have, which an arm with fewer seeds may be."""


def correct(found: dict[str, Any], *, temperature: str, measures: Sequence[str]) -> None:
    """Adds ``p_holm`` to the differences of all arms in the main measures at this temperature, and ``corrected``: how
    many there are, of what.

    One family: a table of nine arms and three measures is 27 chances to be wrong. Differences at other temperatures
    and by length have no such figure.
    """
    family: list[dict[str, Any]] = [
        change
        for arm, of in found["arms"].items()
        for name in measures
        if arm != found["compare_with"]
        and (change := of["temperatures"].get(temperature, {}).get(name, {}).get("difference")) is not None
        and change["p"] is not None
    ]
    for change, corrected in zip(family, holm([change["p"] for change in family]), strict=True):
        change["p_holm"] = corrected
    found["corrected"] = {"temperature": temperature, "measures": list(measures), "differences": len(family)}


def standings(cells: Cells, *, temperature: str, measures: Sequence[str]) -> dict[str, Any]:
    """For each measure with a better side: the best arm by its mean, and each other one as ``best - arm``, paired.

    Only an arm that has as many seeds as any can be the best; the others are in ``fewer_seeds``. Measures that
    fewer than two arms have are left out.
    """
    found: dict[str, Any] = {}
    for name in measures:
        values = {arm: _by_seed(of_arm, name, temperature) for arm, of_arm in cells.items()}
        values = {arm: own for arm, own in values.items() if own}
        if MEASURES[name].better is None or len(values) < 2:
            continue
        most = max(map(len, values.values()))
        means = {arm: statistics.fmean(own.values()) for arm, own in values.items() if len(own) == most}
        best = (max if MEASURES[name].better == "higher" else min)(means, key=lambda arm: means[arm])
        found[name] = {
            "arm": best,
            "mean": means[best],
            "seeds": most,
            "fewer_seeds": [arm for arm in values if arm not in means],
            "less": {arm: _held_against(values[best], own, name) for arm, own in values.items() if arm != best},
        }
    return found


def sentences(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(heading, sentences): the standings and the corrected differences of each measure, and how far to trust them."""
    told = [
        (MEASURES[name].label, [*_best(name, best), *_against(found, name)]) for name, best in found["best"].items()
    ]
    return [*told, ("How to read this", _help(found))] if told else []


def _by_seed(of_arm: Mapping[int, Mapping[str, Any]], name: str, temperature: str) -> dict[int, float]:
    done = {seed: cell["temperatures"].get(temperature, {}) for seed, cell in of_arm.items() if cell["state"] == "done"}
    return {seed: at[name] for seed, at in done.items() if name in at}


def _held_against(best: Mapping[int, float], own: Mapping[int, float], name: str) -> dict[str, Any]:
    change = paired([best[seed] - own[seed] for seed in best if seed in own])
    if change["ci95"] is None:
        state = "unknown"
    elif not excludes_zero(change):
        state = "within"
    else:
        state = "behind" if (change["mean"] > 0) == (MEASURES[name].better == "higher") else "ahead"
    return {**change, "state": state}


def _best(name: str, best: Mapping[str, Any]) -> list[str]:
    arms: dict[str, list[str]] = {state: [] for state in STATES}
    for arm, change in best["less"].items():
        size = figure(change["mean"], name, signed=True)
        ends = "" if change["ci95"] is None else f" ({interval(change, name, signed=True)})"
        arms[change["state"]].append(f"{arm} {size}{ends}")
    told = {state: ", ".join(own) for state, own in arms.items() if own}
    first, seeds = f"{best['arm']} has the best mean, {figure(best['mean'], name)}", best["seeds"]
    said = [f"{first}; {best['arm']} less the others, by seed:" if told.keys() - {"unknown"} else f"{first}."]
    if "behind" in told:
        said.append(f"told from it: {told['behind']}.")
    elif "within" in told:
        said.append("told from it: none.")
    if "within" in told:
        said.append(f"within its interval, so the data cannot tell: {told['within']}.")
    if "ahead" in told:
        said.append(f"better than it on the seeds that both have: {told['ahead']}.")
    if "unknown" in told:
        said.append(f"no interval, with fewer than two seeds in common: {told['unknown']}.")
    if best["fewer_seeds"]:
        said.append(f"not taken for the best, with fewer seeds than {seeds}: {', '.join(best['fewer_seeds'])}.")
    return said


def _against(found: Mapping[str, Any], name: str) -> list[str]:
    """Which arms differ from the one that all are compared with, and after what."""
    at, higher = found["corrected"]["temperature"], MEASURES[name].better == "higher"
    kinds: dict[tuple[str, str], list[str]] = {}
    for arm, of in found["arms"].items():
        change = of["temperatures"].get(at, {}).get(name, {}).get("difference")
        if arm == found["compare_with"] or change is None or change["ci95"] is None:
            continue
        better = (change["mean"] > 0) == higher
        kinds.setdefault((stars(change), ("better" if better else "worse") if stars(change) else ""), []).append(arm)
    if not kinds:
        return []
    words = {
        ("**", "better"): "better, also after correction",
        ("**", "worse"): "worse, also after correction",
        ("*", "better"): "better by its own interval, not after correction",
        ("*", "worse"): "worse by its own interval, not after correction",
        ("", ""): "the data cannot tell",
    }
    said = [f"{text}: {', '.join(kinds[kind])}" for kind, text in words.items() if kind in kinds]
    return [f"against {found['compare_with']}: {'; '.join(said)}."]


def _help(found: Mapping[str, Any]) -> list[str]:
    family = found["corrected"]
    labels = ", ".join(MEASURES[name].label for name in family["measures"])
    said = ["The best is chosen by its result, which flatters it; the differences from it are not corrected."]
    if family["differences"]:
        said.append(
            f"Corrected (**): by Holm's procedure over {family['differences']} differences, those of all arms from "
            f"{found['compare_with']} in {labels} at temperature {family['temperature']}. Among all that stand there "
            "is an error in at most 5 % of cases. Other temperatures are not corrected."
        )
    return said

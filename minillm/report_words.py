"""The plain words beside the table: what the numbers show and what they do not, computed from the numbers.

Nothing here is written in advance about a result. A sentence that depends on a number looks at that number, and at
whether its interval includes zero; a measure that is missing is said to be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.measures import ALWAYS, MAIN_TEMPERATURE, MEASURES, QUALITIES, infinite_words, shown
from minillm.report_text import DASH, MINUS, figure, interval, reading

HARDLY = 0.02
"""A change of ROUGE-L (or of a share) smaller than this is called small."""
SAME_SECONDS = 0.2
"""Two stages took the same time when they differ by at most this share of the longer one."""


def describe(combined: Mapping[str, Any]) -> list[str]:
    """Paragraphs of plain words for the combined results; for none, one that says that nothing was evaluated."""
    models = combined.get("models", {})
    if not models:
        return [
            "No evaluated model is in this report: it shows the course of training only. Figures on held-out prompts, "
            "with intervals, need `minillm evaluate`."
        ]
    paragraphs = [
        paragraph
        for key, pair in combined.get("pairs", {}).items()
        for paragraph in _one_comparison(combined, pair, key)
    ]
    notes = combined.get("notes", [])
    return [
        *(paragraphs or [_no_comparison(list(models))]),
        *_temperature_of_the_table(combined),
        *notes,
        *_limits(combined),
    ]


def _one_comparison(combined: Mapping[str, Any], pair: list[str], key: str) -> list[str]:
    """What one difference shows; what ROUGE-L and sharpening have to do with it; what each of the two cost."""
    headline = ("validity", "coverage", "reverse_kl")
    groups = (
        [_elsewhere(combined, pair, key)],
        [_change(combined, pair, key, name) for name in headline if name in combined["differences"][key]],
        [_rouge(combined, pair, key), _variety(combined, pair, key)],
        [_sharpening(combined, pair, key), _equal_temperatures(combined, pair, key)],
        [_seconds(combined, pair)],
    )
    paragraphs = (" ".join(sentence for sentence in group if sentence) for group in groups)
    return [paragraph for paragraph in paragraphs if paragraph]


def _change(combined: Mapping[str, Any], pair: list[str], key: str, name: str) -> str:
    """One difference at the main temperature: the two figures, the interval, whether it shows anything."""
    left, right = pair
    change = combined["differences"][key][name]
    if change["mean"] is None:
        return f"{MEASURES[name].label} is not defined for {left} and {right}."
    values = [combined["models"][model][name]["mean"] for model in pair]
    unit = " nats per response" if name == "reverse_kl" else ""
    text = (
        f"At temperature {combined['temperature']} the {MEASURES[name].label} of {left} is {figure(values[0], name)}"
        f"{unit} and that of {right} {figure(values[1], name)}: {figure(change['mean'], name, signed=True)}"
    )
    if change["ci95"] is None:
        return f"{text}, without an interval, so nothing can be said about chance."
    text += f", 95 % interval {interval(change, name, signed=True)}"
    if reading(change) == "includes zero":
        return f"{text}, which includes zero: these prompts do not tell the two apart."
    good = (change["mean"] > 0) == (MEASURES[name].better == "higher")
    verdict = "better" if good else "worse"
    if name == "reverse_kl":
        verdict = "closer to its teacher" if good else "further from its teacher"
    return f"{text}, which excludes zero: {left} is {verdict}{_of_the_way(combined, pair, name)}."


def _of_the_way(combined: Mapping[str, Any], pair: list[str], name: str) -> str:
    """How much of the distance to the model called teacher the first of the pair has covered; "" where senseless."""
    teacher = combined["models"].get("teacher", {}).get(name, {}).get("mean")
    left, right = (combined["models"][model][name]["mean"] for model in pair)
    if teacher is None or name == "reverse_kl" or "teacher" in pair or teacher <= right or left <= right:
        return ""
    share = (left - right) / (teacher - right)
    return f", and has gone {share:.0%} of the way from {pair[1]} to the teacher's {figure(teacher, name)}"


def _rouge(combined: Mapping[str, Any], pair: list[str], key: str) -> str:
    change = combined["differences"][key].get("rouge_l")
    if change is None or change["mean"] is None:
        return ""
    by = f"{figure(change['mean'], 'rouge_l', signed=True)} (95 % interval {interval(change, 'rouge_l', signed=True)})"
    if change["ci95"] is None:
        by = f"{figure(change['mean'], 'rouge_l', signed=True)}, without an interval"
    if abs(change["mean"]) < HARDLY:
        return f"ROUGE-L hardly moves: {by}. A response with one wrong word still shares the others."
    return f"ROUGE-L moves by {by}."


def _elsewhere(combined: Mapping[str, Any], pair: list[str], key: str) -> str:
    """Where a difference is to be found that is not in the first table; "" where it is there."""
    at = [t for t, found in combined["temperatures"].items() if key in found["differences"]]
    if combined["differences"][key] or not at:
        return ""
    return (
        f"{pair[0]} {MINUS} {pair[1]}: not both were evaluated at temperature {combined['temperature']}; the "
        f"difference is in the table of temperatures, at {', '.join(at)}."
    )


def _sharpening(combined: Mapping[str, Any], pair: list[str], key: str) -> str:
    """How much of a sure gain the second model gets without training, by sampling at the lower temperature that lifts
    it most."""
    left, right = pair
    both = combined["models"][left].keys() & combined["models"][right].keys()
    name = next((name for name in QUALITIES if name in both), "rouge_l")
    start = combined["models"][right].get(name, {}).get("mean")
    reached = combined["models"][left].get(name, {}).get("mean")
    if start is None or reached is None:
        return ""
    colder = [
        (key, found["models"][right])
        for key, found in combined["temperatures"].items()
        if float(key) < float(combined["temperature"]) and right in found["models"] and name in found["models"][right]
    ]
    if not colder:
        return (
            f"No lower temperature of {right} was evaluated, so this report cannot tell a better model from one "
            "that is merely sharper."
        )
    if reached <= start or reading(combined["differences"][key].get(name)) != "excludes zero":
        return ""
    label = MEASURES[name].label
    lifted = [(key, found) for key, found in colder if found[name]["mean"] is not None and found[name]["mean"] > start]
    if not lifted:
        return f"Sampling {right} at lower temperatures does not lift its {label}: sharpening gives none of the gain."
    # The warmest of equals: it costs the least variety.
    at, found = max(lifted, key=lambda item: (item[1][name]["mean"], float(item[0])))
    share = (found[name]["mean"] - start) / (reached - start)
    much = "all of the gain" if share >= 1 else f"{share:.0%} of the gain"
    text = (
        f"Part of such a gain is sharpening: {right}, not trained any further, has {label} "
        f"{figure(found[name]['mean'], name)} when sampled at {at} instead of {combined['temperature']}, "
        f"which is {much} of {left}"
    )
    variety = [found.get("distinct_4", {}).get("mean"), combined["models"][left].get("distinct_4", {}).get("mean")]
    if None in variety:
        return text + "."
    return text + (
        f" (distinct-4 {figure(variety[0], 'distinct_4')} there, {figure(variety[1], 'distinct_4')} for {left} at "
        f"{combined['temperature']}). Therefore several temperatures are shown."
    )


def _equal_temperatures(combined: Mapping[str, Any], pair: list[str], key: str) -> str:
    """The same difference at each temperature, and where its interval includes zero."""
    changes = {t: found["differences"].get(key, {}) for t, found in combined["temperatures"].items()}
    name = next((name for name in QUALITIES if any(name in change for change in changes.values())), "rouge_l")
    kept = {t: c[name] for t, c in changes.items() if name in c and c[name]["mean"] is not None}
    if len(kept) <= 1:
        return ""
    each = ", ".join(f"{figure(change['mean'], name, signed=True)} at {t}" for t, change in kept.items())
    text = f"At equal temperatures {pair[0]} {MINUS} {pair[1]} in {MEASURES[name].label} is {each}; the interval"
    by_reading: dict[str, list[str]] = {}
    for t, change in kept.items():
        by_reading.setdefault(reading(change), []).append(t)
    if "no interval" in by_reading:
        return text.removesuffix("; the interval") + "."
    if len(by_reading) == 1:
        return f"{text} {next(iter(by_reading))} at each of them."
    without, touching = (", ".join(by_reading[kind]) for kind in ("excludes zero", "includes zero"))
    return f"{text} excludes zero at {without} and includes it at {touching}."


def _variety(combined: Mapping[str, Any], pair: list[str], key: str) -> str:
    change = combined["differences"][key].get("distinct_4")
    if change is None or change["mean"] is None or change["ci95"] is None:
        return ""
    if reading(change) == "includes zero":
        return f"The variety of the responses (distinct-4) is not measurably different at {combined['temperature']}."
    less = "less" if change["mean"] < 0 else "more"
    by = figure(change["mean"], "distinct_4", signed=True)
    return f"The responses of {pair[0]} are {less} varied (distinct-4 {by})."


def _seconds(combined: Mapping[str, Any], pair: list[str]) -> str:
    spent = combined.get("seconds") or {}
    if any(name not in spent for name in pair):
        return ""
    left, right = (float(spent[name]) for name in pair)
    longer = max(left, right)
    if longer <= 0:
        return ""
    near = abs(left - right) / longer
    verdict = "the same time within 20 %" if near <= SAME_SECONDS else f"not the same time: {near:.0%} apart"
    return f"{pair[0]} took {left:.1f} s and {pair[1]} {right:.1f} s, {verdict}."


def _no_comparison(models: list[str]) -> str:
    if len(models) == 1:
        return (
            f"One model, {models[0]}, was evaluated and there is none to compare it with: the figures describe it and "
            "show no effect of any training."
        )
    return (
        f"{len(models)} models were evaluated and no difference was asked for: overlapping or separate intervals "
        "in the table are not a paired comparison."
    )


def _temperature_of_the_table(combined: Mapping[str, Any]) -> list[str]:
    """Who is not in the first table, or whose temperature it is not: nobody goes missing without a word."""
    at, every = combined["temperature"], combined["temperatures"]
    without = [name for name, measures in combined["models"].items() if not measures]
    if without:
        return [
            f"No temperature is common to all models. The first table is at {at}, where {', '.join(without)} "
            f"{'was' if len(without) == 1 else 'were'} not evaluated; the table of temperatures has all of them."
        ]
    hotter = [key for key in every if float(key) > float(at) and len(every[key]["models"]) < len(combined["models"])]
    if not hotter or float(at) == MAIN_TEMPERATURE:
        return []
    return [
        f"The first table is at {at}, the hottest temperature that all models have; only some have {', '.join(hotter)}."
    ]


def _limits(combined: Mapping[str, Any]) -> list[str]:
    """What the intervals cover, and which measures are missing and why."""
    shown = [*combined["models"].values()]
    bounded = any(e.get("ci95") is not None for measures in shown for e in measures.values())
    texts = []
    if bounded:
        texts.append(
            "Intervals are 95 % bootstrap intervals over prompts, with the sampling seeds of a prompt kept together. "
            "They tell how the figures would move with other prompts of this kind, not with another training seed: "
            "each model here was trained once. They are not corrected for the number of measures and temperatures."
        )
    else:
        texts.append(
            "There are no intervals: they need two prompts or more, and a number of bootstrap resamples above 0."
        )
    texts.extend(_missing(combined["models"]))
    for model, about in combined.get("evaluations", {}).items():
        if infinite := about.get("infinite"):
            texts.append(f"{model}: {infinite_words(infinite)}.")
    partly = [
        f"{model} {MEASURES[name].label} on {estimate['prompts']}"
        for model, measures in combined["models"].items()
        for name, estimate in measures.items()
        if name in (*ALWAYS, "coverage", "gold_nll") and "prompts" in estimate
    ]
    if partly:
        texts.append(f"Not every prompt carries every measure; prompts counted: {', '.join(partly)}.")
    return texts


def _missing(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    why = {
        "validity": "needs the checker of the micro-world",
        "coverage": "needs dialogue acts and data.checker: slots",
        "rouge_l": "needs reference responses",
        "reverse_kl": "needs a teacher",
        "distinct_4": "needs responses of four words or more",
    }
    said = []
    for name in shown(models)[0]:
        there = {model: measures for model, measures in models.items() if measures}
        without = [model for model, measures in there.items() if measures.get(name, {}).get("mean") is None]
        if without:
            who = "" if len(without) == len(there) else f" for {', '.join(without)}"
            reason = f" ({why[name]})" if name in why else ""
            said.append(f"{MEASURES[name].label}{who}{reason}")
    return [f"{DASH} in the first table means not computed: {'; '.join(said)}."] if said else []

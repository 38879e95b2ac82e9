"""Samples on a page: the same prompts answered by each model, and filters that need no script.

The filters are radio buttons in front of the cards, which the style sheet looks at: which model's answers, at which
temperature, and cards with a valid or with an invalid answer. A card is of one prompt at one temperature and says in
its classes what it has: ``t0`` the first temperature, ``g2`` and ``b2`` a valid and an invalid answer of the third
model, ``ga`` and ``ba`` of any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minillm import plots
from minillm.measures import MEASURES, temperature_key
from minillm.report_text import DASH, finite, safe

Row = Mapping[str, Any]
Asked = dict[str, dict[str, dict[str, Row]]]
"""The row of each prompt, by temperature and model."""
SAMPLES_SHOWN = 12
LONG = 900
"""Characters of a text that gets a box of its own, which scrolls."""
JUDGED = {"g": "valid", "b": "not valid"}


def samples_shown(samples: Mapping[str, Sequence[Row]], colour: Mapping[str, int], *, main: str) -> tuple[str, str]:
    """Cards with their filters, ``main`` the temperature to begin with, and the style of the filters.

    The prompts are evenly spaced over the file and not chosen by result, and of each temperature the answers are those
    under the first sampling seed. Two empty texts where there is no sample.
    """
    asked = _asked(samples, main=main)
    uids = list(dict.fromkeys(uid for of in asked.values() for rows in of.values() for uid in rows))
    if not uids:
        return "", ""
    shown = [uids[n * len(uids) // SAMPLES_SHOWN] for n in range(SAMPLES_SHOWN)] if len(uids) > SAMPLES_SHOWN else uids
    names, cards, held = list(samples), [], []
    for number, (temperature, of) in enumerate(asked.items()):
        for uid in shown:
            rows = [of.get(name, {}).get(uid) for name in names]
            if any(row is not None for row in rows):
                held.append({f"t{number}", *_kinds(rows)})
                cards.append(_card(f"{uid}, temperature {temperature}", rows, held[-1], colour, names=names))
    note = (
        f"<p class='note'>{len(shown)} of {len(uids)} prompts, evenly spaced over the file and not chosen by result; "
        "the first sampling seed at each temperature. The browser's own search finds words in the cards that are "
        "shown.</p>"
    )
    judged = any(kinds & {"ga", "ba"} for kinds in held)
    return (
        f'{note}<div class="filters">{_filters(names, list(asked), judged=judged)}{"".join(cards)}</div>',
        _style(len(names), len(asked), held, judged=judged),
    )


def _asked(samples: Mapping[str, Sequence[Row]], *, main: str) -> Asked:
    """The rows under the first seed of each model and temperature; ``main`` first, then from hot to cold."""
    found: Asked = {}
    for name, rows in samples.items():
        first: dict[str, Any] = {}
        for row in rows:
            key = temperature_key(row["temperature"])
            if first.setdefault(key, row["seed"]) == row["seed"]:
                found.setdefault(key, {}).setdefault(name, {})[str(row["uid"])] = row
    return {key: found[key] for key in sorted(found, key=lambda key: (key != main, -float(key)))}


def _kinds(rows: Sequence[Row | None]) -> set[str]:
    """``g2``, ``b2``, ``ga``, ``ba``: who has a valid answer and who an invalid one."""
    kinds = set()
    for number, row in enumerate(rows):
        if row is not None and "validity" in row["measures"]:
            kind = "g" if row["measures"]["validity"] else "b"
            kinds |= {f"{kind}{number}", f"{kind}a"}
    return kinds


def _card(
    heading: str, rows: Sequence[Row | None], kinds: set[str], colour: Mapping[str, int], *, names: Sequence[str]
) -> str:
    asked = next(row for row in rows if row is not None)
    answers = "".join(
        answer(name, row, colour, kind=f" of m{number}")
        for number, (name, row) in enumerate(zip(names, rows, strict=True))
    )
    references = [str(text) for text in asked.get("references") or []]
    more = f" <small>and {len(references) - 1} more</small>" if len(references) > 1 else ""
    wanted = f'<div class="said"><b>reference{more}</b>{text_block(references[0])}</div>' if references else ""
    return (
        f'<article class="{" ".join(sorted(kinds))}"><h3>{safe(heading)}</h3>'
        f'<div class="prompt">{text_block(asked["prompt"])}</div><div class="answers">{wanted}{answers}</div></article>'
    )


def choice(group: str, kind: str, label: str, *, checked: bool = False) -> str:
    """A button of a filter: one of its group is pressed, and the style sheet looks at ``show-`` and the kind."""
    ident = f"{group}-{kind}"
    return (
        f'<input type="radio" name="{group}" id="{ident}" class="show-{kind}"{" checked" if checked else ""}>'
        f'<label for="{ident}">{safe(label)}</label>'
    )


def _filters(names: Sequence[str], temperatures: Sequence[str], *, judged: bool) -> str:
    """The buttons, only where there is something to choose."""
    groups = []
    if len(names) > 1:
        models = [choice("model", f"m{number}", name) for number, name in enumerate(names)]
        groups.append("<span>answers of</span>" + choice("model", "ma", "all models", checked=True) + "".join(models))
    if len(temperatures) > 1:
        keys = (choice("t", f"t{number}", key, checked=number == 0) for number, key in enumerate(temperatures))
        groups.append("<span>temperature</span>" + "".join(keys))
    if judged:
        kinds = (choice("judged", kind, f"with one that is {word}") for kind, word in JUDGED.items())
        groups.append("<span>prompts</span>" + choice("judged", "any", "all", checked=True) + "".join(kinds))
    return "<br>".join(groups) + '<p class="none">None of these prompts.</p>' if groups else ""


def _style(models: int, temperatures: int, held: Sequence[set[str]], *, judged: bool) -> str:
    """What each button hides, and when to say that nothing is left: where the pressed three have no card."""
    hidden, empty = [], []
    if models > 1:
        hidden += [f".show-m{n}:checked ~ article .of:not(.m{n})" for n in range(models)]
    at = {f"t{n}": f".show-t{n}:checked ~ " if temperatures > 1 else "" for n in range(temperatures)}
    if temperatures > 1:
        hidden += [f"{pressed}article:not(.{kind})" for kind, pressed in at.items()]
    if judged:
        whose = [*map(str, range(models)), "a"] if models > 1 else ["a"]
        for kind in JUDGED:
            for who in whose:
                pressed = (f".show-m{who}:checked ~ " if models > 1 else "", f".show-{kind}:checked ~ ")
                hidden.append(f"{pressed[0]}{pressed[1]}article:not(.{kind}{who})")
                for place, hot in at.items():
                    if not any({place, f"{kind}{who}"} <= kinds for kinds in held):
                        # In the order of the buttons: a sibling is looked for only behind.
                        empty.append(f"{pressed[0]}{hot}{pressed[1]}.none")
    rules = [(hidden, "none"), (empty, "block")]
    return "".join(f"{', '.join(who)} {{ display: {how}; }}\n" for who, how in rules if who)


def answer(name: str, row: Row | None, colour: Mapping[str, int], *, kind: str = "") -> str:
    """What a model said to a prompt, with the measures of the response; a row of samples.jsonl, or None."""
    head = f'<b><i class="k{colour.get(name, 0) % plots.COLOURS}"></i>{safe(name)}</b>'
    if row is None:
        return f'<div class="said{kind}">{head}<p>{DASH} (not asked)</p></div>'
    own = row.get("measures", {})
    told = []
    if "validity" in own:
        good = bool(own["validity"])
        word = "valid" if good else f"not valid: {own.get('reason') or 'no reason given'}"
        told.append(f'<span class="{"good" if good else "bad"}">{safe(word)}</span>')
    if own.get("values"):
        good = own["carried"] == own["values"]
        word = f"{own['carried']} of {own['values']} values" + ("" if good else f", not {own.get('missing') or 'all'}")
        told.append(f'<span class="{"good" if good else "bad"}">{safe(word)}</span>')
    for key in ("rouge_l", "reverse_kl"):
        if finite(own.get(key)):
            told.append(f"<span>{safe(MEASURES[key].label)} {own[key]:.2f}</span>".replace("-0.00", "0.00"))
    if row.get("stop") == "length":
        told.append("<span>cut at the length limit</span>")
    return (
        f'<div class="said{kind}">{head}{text_block(row["response"])}<small class="told">{"".join(told)}</small></div>'
    )


def text_block(text: Any) -> str:
    """A stranger's text as a paragraph; a long one in a box that scrolls, by keyboard too."""
    cleaned = safe(text)
    box = ' class="long" tabindex="0"' if len(cleaned) > LONG or cleaned.count("\n") > LONG // 60 else ""
    # bdi: right-to-left text cannot pull the text around it along.
    return f"<p{box}><bdi>{cleaned}</bdi></p>" if cleaned.strip() else '<p class="empty">(empty)</p>'

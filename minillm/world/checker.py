"""Whether a response answers its prompt, and if not, what is wrong first.

Exact: it accepts what the grammar can write and nothing else. The prompt's text alone says what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from minillm.world.facts import (
    ATTRIBUTES,
    CLASS_OF,
    CLASSES,
    COLD_DISH,
    COLD_VERBS,
    HEATED,
    HEATED_VERBS,
    MOOD_OF,
    MOVES,
    NAMES,
    PLACES,
    WORLD,
    possessive,
    pronoun,
)
from minillm.world.phrases import (
    ANIMAL_ACTS,
    ANSWERS,
    CLAUSES,
    CONNECTIVES,
    DESCRIBE_JOIN,
    DISH_CLOSINGS,
    FEELINGS,
    NUMBERS,
    OPENERS,
    PERSON_ACTS,
    PERSON_SLOTS,
    PICK_BREAK,
    PICK_JOIN,
    RECIPES,
    ROUTE_JOIN,
    ROUTE_STEP,
    ROUTE_VERBS,
    STOP,
    STORY_CLOSINGS,
    STORY_FINDING,
    STORY_OPENING,
    TIMES,
    read,
    split,
)
from minillm.world.prompts import Compare, Describe, Fact, Pick, Recipe, Route, Spec, Story, parse_prompt

BOS, SEP = "<bos>", "<sep>"

REASONS: Mapping[str, str] = {
    "empty": "no words at all",
    "form": "not a sentence pattern of the family",
    "attribute": "says something true or false about another attribute than the one asked for",
    "person": "names another person than the one asked for",
    "pronoun": "she for he, her for his, or a name where a pronoun belongs",
    "fact": "the value is not this person's",
    "count": "too few or too many things named",
    "member": "not a member of the class asked for",
    "dup": "the same thing twice",
    "sentences": "too few or too many sentences",
    "mention": "the attribute that had to be mentioned is missing",
    "animal": "another animal than the story's",
    "object": "another object than the story's",
    "place": "another place than the story's, or none of the map",
    "s2": "the feeling does not fit the object",
    "s3": "what the animal does does not fit the object's mood",
    "s4": "what the person does does not fit the object's mood",
    "ingredient": "an ingredient that was not asked for",
    "verb": "not a verb of this ingredient's class",
    "heat": "something is heated in a salad",
    "closing": "the closing belongs to another dish",
    "step": "the place does not lie next in that direction",
    "goal": "the way ends somewhere else",
    "detour": "the way arrives, but not in the fewest steps",
}
"""Every reason code and what it means. A code is the first fault found, not the only one."""


class Verdict(NamedTuple):
    """Whether a response is right, and else a code of ``REASONS`` ("" when valid)."""

    valid: bool
    reason: str


def check(prompt: str, response: str) -> Verdict:
    """Whether the response answers the prompt. Raises ``DataError`` for a prompt that is not of this world.

    The prompt may stand between its markers (``<bos> ... <sep>``) or without them; a marker in the response is wrong.
    """
    words = response.split()
    spec = parse_prompt(prompt.strip().removeprefix(BOS).removesuffix(SEP).strip())
    reason = _fault(spec, words) if words else "empty"
    return Verdict(valid=not reason, reason=reason)


def _fault(spec: Spec, words: Sequence[str]) -> str:
    match spec:
        case Fact():
            reason = _fact(spec, words)
        case Pick():
            reason = _pick(spec, words)
        case Compare():
            reason = _compare(spec, words)
        case Describe():
            reason = _describe(spec, words)
        case Story():
            reason = _story(spec, words)
        case Recipe():
            reason = _recipe(spec, words)
        case Route():
            reason = _route(spec, words)
    return reason


def _first_fault(*faults: tuple[bool, str]) -> str:
    return next((reason for wrong, reason in faults if wrong), "")


def _said(
    patterns: Mapping[str, Sequence[str]], words: Sequence[str], *, asked: str = ""
) -> tuple[str, dict[str, str]]:
    # The attribute of which the words speak, that asked for tried first, and their slots; ("", {}) where none fits.
    order = sorted(ATTRIBUTES, key=lambda attribute: attribute != asked)
    for attribute in order:
        for pattern in patterns[attribute]:
            slots = read(pattern, words)
            # "a cat" and "a baker" differ by the value alone: what was not asked is told by the kind of the value.
            if slots is not None and (attribute == asked or slots["value"] in WORLD.value[attribute].values()):
                return attribute, slots
    return "", {}


def _fact(spec: Fact, words: Sequence[str]) -> str:
    attribute, slots = _said(ANSWERS, words, asked=spec.attribute)
    name = slots.get("name", spec.name)
    return _first_fault(
        (not attribute, "form"),
        (attribute != spec.attribute, "attribute"),
        (name != spec.name, "person"),
        (slots.get("she", pronoun(name)) != pronoun(name), "pronoun"),
        (slots.get("her", possessive(name)) != possessive(name), "pronoun"),
        (not _is_true(name, attribute, slots), "fact"),
    )


def _is_true(name: str, attribute: str, slots: Mapping[str, str]) -> bool:
    return bool(attribute) and WORLD.value[attribute][name] == slots["value"]


def _pick(spec: Pick, words: Sequence[str]) -> str:
    opener = next((text.split() for text in OPENERS if text.split() == list(words[: len(text.split())])), None)
    if opener is None:
        return "form"
    groups = [split(group, PICK_JOIN) for group in split(words[len(opener) :], PICK_BREAK)]
    classes = ((spec.first_class, spec.first_count), (spec.second_class, spec.second_count))
    if len(groups) != len(classes) or any(len(item) != 1 for group in groups for item in group):
        return "form"
    named = [[item[0] for item in group] for group in groups]
    pairs = list(zip(named, classes, strict=True))
    return _first_fault(
        (any(len(members) != NUMBERS[count] for members, (_, count) in pairs), "count"),
        (any(not set(members) <= set(CLASSES[name]) for members, (name, _) in pairs), "member"),
        (any(len(set(members)) != len(members) for members in named), "dup"),
    )


def _compare(spec: Compare, words: Sequence[str]) -> str:
    breaks = [i for i, word in enumerate(words) if word in CONNECTIVES]
    if len(breaks) != 1:
        return "form"
    halves = [words[: breaks[0]], words[breaks[0] + 1 :]]
    if any(not half or half[0] not in NAMES for half in halves):
        return "form"
    people = [half[0] for half in halves]
    said = [_said(CLAUSES, half[1:], asked=spec.attribute) for half in halves]
    return _first_fault(
        (any(not attribute for attribute, _ in said), "form"),
        (any(attribute != spec.attribute for attribute, _ in said), "attribute"),
        (any(name not in (spec.first, spec.second) for name in people), "person"),
        (people[0] == people[1], "dup"),
        (not all(_is_true(name, *told) for name, told in zip(people, said, strict=True)), "fact"),
    )


def _sentences(words: Sequence[str]) -> list[list[str]] | None:
    # The sentences without their stops; None where the last is not closed or one is empty.
    *sentences, rest = split(words, STOP)
    return None if rest or not sentences or not all(sentences) else sentences


def _describe(spec: Describe, words: Sequence[str]) -> str:
    sentences = _sentences(words)
    if sentences is None:
        return "form"
    clauses = [split(sentence, DESCRIBE_JOIN) for sentence in sentences]
    told = [
        _clause(spec.name, clause, first=not (i or j), bare=j > 0)
        for i, sentence in enumerate(clauses)
        for j, clause in enumerate(sentence)
    ]
    least, most = (2, 2) if spec.sentences == 1 else (1, 2)
    attributes = [attribute for _, attribute, _ in told]
    return _first_fault(
        *((True, fault) for fault, _, _ in told if fault == "form"),
        (len(sentences) != spec.sentences, "sentences"),
        *((True, fault) for fault, _, _ in told if fault),
        (any(not least <= len(sentence) <= most for sentence in clauses), "count"),
        (len(set(attributes)) != len(attributes), "dup"),
        (not all(_is_true(spec.name, attribute, slots) for _, attribute, slots in told), "fact"),
        (bool(spec.mention) and spec.mention not in attributes, "mention"),
    )


def _clause(name: str, words: Sequence[str], *, first: bool, bare: bool) -> tuple[str, str, dict[str, str]]:
    # The fault of one clause, the attribute of which it speaks and its slots. ``bare``: the subject may be left out.
    people = PERSON_SLOTS["name"] | PERSON_SLOTS["she"]
    subject = words[0] if words and words[0] in people else ""
    attribute, slots = _said(CLAUSES, words[1:] if subject else words)
    fault = _first_fault(
        (not attribute or not (subject or bare), "form"),
        (first and subject in NAMES and subject != name, "person"),
        (first and subject not in NAMES, "pronoun"),
        (not first and bool(subject) and subject != pronoun(name), "pronoun"),
    )
    return fault, attribute, slots


def _mood(acts: Mapping[str, Sequence[str]], words: Sequence[str]) -> str:
    text = " ".join(words)
    return next((mood for mood, texts in acts.items() if text in texts), "")


def _story(spec: Story, words: Sequence[str]) -> str:
    sentences = _sentences(words)
    if sentences is None:
        return "form"
    if len(sentences) < 4:
        return "sentences"
    opening, finding, animal_act, person_act, *closing = sentences
    time = next((len(text.split()) for text in TIMES if text.split() == opening[: len(text.split())]), 0)
    opened, found = read(STORY_OPENING, opening[time:]), read(STORY_FINDING, finding)
    moods = (
        _mood(FEELINGS, finding[-1:]),
        _mood(ANIMAL_ACTS, animal_act[2:]),
        _mood(PERSON_ACTS, person_act[1:]),
    )
    ends = [slots for text in STORY_CLOSINGS for sentence in closing if (slots := read(text, sentence)) is not None]
    formless = not time or opened is None or found is None or not all(moods) or len(ends) != len(closing)
    if formless or animal_act[0] != "the" or person_act[0] not in PERSON_SLOTS["she"]:
        return "form"
    assert opened is not None
    assert found is not None
    subjects = [found["she"], person_act[0], *(end["she"] for end in ends)]
    mood = MOOD_OF[spec.object]
    return _first_fault(
        (len(closing) > 1, "sentences"),
        (opened["name"] != spec.name, "person"),
        ((opened["animal"], animal_act[1]) != (spec.animal, spec.animal), "animal"),
        (opened["place"] not in ((spec.place,) if spec.place else PLACES), "place"),
        (found["object"] != spec.object, "object"),
        (any(subject != pronoun(spec.name) for subject in subjects), "pronoun"),
        (moods[0] != mood, "s2"),
        (moods[1] != mood, "s3"),
        (moods[2] != mood, "s4"),
        (any(end["value"] != WORLD.value["town"][spec.name] for end in ends), "fact"),
    )


def _recipe(spec: Recipe, words: Sequence[str]) -> str:
    closing_of = {text: dish for dish, texts in DISH_CLOSINGS.items() for text in texts}
    for pattern in RECIPES:
        steps = read(pattern, words[: len(pattern.split())])
        dish = closing_of.get(" ".join(words[len(pattern.split()) :]))
        if steps is not None and dish is not None:
            break
    else:
        return "form"
    foods = (steps["food1"], steps["food2"])
    pairs = list(zip((steps["verb1"], steps["verb2"]), (CLASS_OF.get(food, "") for food in foods), strict=True))
    return _first_fault(
        (not set(foods) <= {spec.first, spec.second}, "ingredient"),
        (foods[0] == foods[1], "dup"),
        (any(verb not in (*COLD_VERBS.get(kind, ()), *HEATED_VERBS.get(kind, ())) for verb, kind in pairs), "verb"),
        (spec.dish == COLD_DISH and any(verb in HEATED for verb, _ in pairs), "heat"),
        (dish != spec.dish, "closing"),
    )


def _route(spec: Route, words: Sequence[str]) -> str:
    if words[0] not in ROUTE_VERBS:
        return "form"
    here, lost, steps = spec.start, False, split(words[1:], ROUTE_JOIN)
    for step in steps:
        slots = read(ROUTE_STEP, step)
        if slots is None or slots["direction"] not in MOVES or slots["place"] not in PLACES:
            return "form"
        lost = lost or WORLD.neighbour(here, slots["direction"]) != slots["place"]
        here = slots["place"]
    return _first_fault(
        (lost, "step"),
        (here != spec.goal, "goal"),
        (len(steps) != WORLD.distance(spec.start, spec.goal), "detour"),
    )

"""How a prompt may be answered: right answers, drawn at random.

Every wording of every slot is equally likely, so a model that has learnt the grammar has a known spread to match.
"""

from __future__ import annotations

from minillm.world.facts import (
    ATTRIBUTES,
    CLASS_OF,
    CLASSES,
    COLD_DISH,
    COLD_VERBS,
    HEATED_VERBS,
    MOOD_OF,
    PLACES,
    WORLD,
    Draw,
    choose,
    possessive,
    pronoun,
    sample,
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
    fill,
)
from minillm.world.prompts import Compare, Describe, Fact, Pick, Recipe, Route, Spec, Story


def _clause(attribute: str, name: str, draw: Draw) -> str:
    return fill(choose(CLAUSES[attribute], draw), value=WORLD.value[attribute][name])


def _fact(spec: Fact, draw: Draw) -> str:
    answer = choose(ANSWERS[spec.attribute], draw)
    value = WORLD.value[spec.attribute][spec.name]
    return fill(answer, name=spec.name, she=pronoun(spec.name), her=possessive(spec.name), value=value)


def _pick(spec: Pick, draw: Draw) -> str:
    def members(name: str, count: str) -> str:
        return f" {PICK_JOIN} ".join(sample(CLASSES[name], NUMBERS[count], draw))

    opener = choose(OPENERS, draw)
    first = members(spec.first_class, spec.first_count)
    return f"{opener} {first} {PICK_BREAK} {members(spec.second_class, spec.second_count)}"


def _compare(spec: Compare, draw: Draw) -> str:
    left, right = sample((spec.first, spec.second), 2, draw)
    connective = choose(CONNECTIVES, draw)
    return f"{left} {_clause(spec.attribute, left, draw)} {connective} {right} {_clause(spec.attribute, right, draw)}"


def _describe(spec: Describe, draw: Draw) -> str:
    # One sentence says two things, for else it would be a mere fact; of two sentences each says one or two.
    sizes = [2] if spec.sentences == 1 else [1 + draw.below(2) for _ in range(spec.sentences)]
    must = [spec.mention] if spec.mention else []
    others = [attribute for attribute in ATTRIBUTES if attribute != spec.mention]
    told = must + sample(others, sum(sizes) - len(must), draw)
    told = sample(told, len(told), draw)
    words: list[str] = []
    for i, size in enumerate(sizes):
        words += [pronoun(spec.name) if i else spec.name, _clause(told.pop(), spec.name, draw)]
        for _ in range(size - 1):
            again = [pronoun(spec.name)] if draw.below(2) else []
            words += [DESCRIBE_JOIN, *again, _clause(told.pop(), spec.name, draw)]
        words.append(STOP)
    return " ".join(words)


def _story(spec: Story, draw: Draw) -> str:
    she, mood = pronoun(spec.name), MOOD_OF[spec.object]
    time, place = choose(TIMES, draw), spec.place or choose(PLACES, draw)
    sentences = [
        f"{time} {fill(STORY_OPENING, name=spec.name, animal=spec.animal, place=place)}",
        fill(STORY_FINDING, she=she, object=spec.object, mood=choose(FEELINGS[mood], draw)),
        f"the {spec.animal} {choose(ANIMAL_ACTS[mood], draw)}",
        f"{she} {choose(PERSON_ACTS[mood], draw)}",
    ]
    closing = choose(("", *STORY_CLOSINGS), draw)
    if closing:
        sentences.append(fill(closing, she=she, value=WORLD.value["town"][spec.name]))
    return " ".join(f"{sentence} {STOP}" for sentence in sentences)


def _recipe(spec: Recipe, draw: Draw) -> str:
    foods = sample((spec.first, spec.second), 2, draw)
    verbs = []
    for food in foods:
        kind = CLASS_OF[food]
        legal = COLD_VERBS[kind] if spec.dish == COLD_DISH else COLD_VERBS[kind] + HEATED_VERBS[kind]
        verbs.append(choose(legal, draw))
    steps = fill(choose(RECIPES, draw), verb1=verbs[0], food1=foods[0], verb2=verbs[1], food2=foods[1])
    return f"{steps} {choose(DISH_CLOSINGS[spec.dish], draw)}"


def _route(spec: Route, draw: Draw) -> str:
    verb = choose(ROUTE_VERBS, draw)
    path = choose(WORLD.shortest_paths(spec.start, spec.goal), draw)
    steps = [fill(ROUTE_STEP, direction=direction, place=place) for direction, place in path]
    return f"{verb} " + f" {ROUTE_JOIN} ".join(steps)


def generate_response(spec: Spec, draw: Draw) -> str:
    """One of the right answers to the prompt, each wording of each slot equally likely."""
    match spec:
        case Fact():
            text = _fact(spec, draw)
        case Pick():
            text = _pick(spec, draw)
        case Compare():
            text = _compare(spec, draw)
        case Describe():
            text = _describe(spec, draw)
        case Story():
            text = _story(spec, draw)
        case Recipe():
            text = _recipe(spec, draw)
        case Route():
            text = _route(spec, draw)
    return text

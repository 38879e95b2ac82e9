"""What may be asked, and in which split.

A prompt is a small record (``Fact``, ``Pick``, ...). ``draw_prompt`` makes one, ``prompt_text`` writes it and
``parse_prompt`` reads it back, so that a checker needs nothing but the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from minillm.errors import DataError
from minillm.world.facts import (
    ANIMALS,
    ATTRIBUTES,
    CLASSES,
    INGREDIENTS,
    NAMES,
    OBJECTS,
    PLACES,
    WORLD,
    Draw,
    choose,
)
from minillm.world.phrases import (
    COMPARE_PROMPT,
    COUNTS,
    DESCRIBE_PROMPTS,
    DISHES,
    MENTION,
    PICK_PROMPT,
    PLURALS,
    QUESTIONS,
    RECIPE_PROMPT,
    ROUTE_PROMPTS,
    STORY_PLACE,
    STORY_PROMPT,
    fill,
    read,
)

SPLIT_SHARES: Mapping[str, float] = {"train": 0.85, "validation": 0.05, "test": 0.10}
SPLIT_SALT = "world-395"
"""Chosen among the first 400 so that families with few prompts, too, get about their share of every split."""
FAMILY_PERCENT: Mapping[str, int] = {
    "fact": 13,
    "pick": 12,
    "compare": 15,
    "describe": 18,
    "story": 20,
    "recipe": 12,
    "route": 10,
}


@dataclass(frozen=True, slots=True)
class Fact:
    """A question for one fact: "where does anna live"."""

    family: ClassVar[str] = "fact"
    name: str
    attribute: str
    phrasing: int

    def key(self) -> tuple[str, ...]:
        """What is held out together: the fact in one phrasing."""
        return (self.name, self.attribute, str(self.phrasing))


@dataclass(frozen=True, slots=True)
class Pick:
    """A request for members of two classes: "name one of the fruits and two of the animals"."""

    family: ClassVar[str] = "pick"
    first_count: str
    first_class: str
    second_count: str
    second_class: str

    def key(self) -> tuple[str, ...]:
        """What is held out together: the counts and classes."""
        return (self.first_count, self.first_class, self.second_count, self.second_class)


@dataclass(frozen=True, slots=True)
class Compare:
    """The same attribute of two people: "compare the pets of anna and ben"."""

    family: ClassVar[str] = "compare"
    attribute: str
    first: str
    second: str

    def key(self) -> tuple[str, ...]:
        """What is held out together: the pair of people, in whichever order, with what is asked of them.

        Holding out a pair with all it could be asked leaves 56 pairs to learn from, and models of this size then
        learn pairs by heart instead of reading them off the prompt (docs/LOG.md).
        """
        return (*sorted((self.first, self.second)), self.attribute)


@dataclass(frozen=True, slots=True)
class Describe:
    """A person in a few words: "describe anna in two sentences and mention the job"."""

    family: ClassVar[str] = "describe"
    name: str
    sentences: int
    mention: str
    """The attribute that must appear, or "" for none."""

    def key(self) -> tuple[str, ...]:
        """What is held out together: the whole request."""
        return (self.name, str(self.sentences), self.mention)


@dataclass(frozen=True, slots=True)
class Story:
    """A short story: "tell a story about anna with a cat and a kite at the mill"."""

    family: ClassVar[str] = "story"
    name: str
    animal: str
    object: str
    place: str
    """Where it must happen, or "" for anywhere."""

    def key(self) -> tuple[str, ...]:
        """What is held out together: person, animal and object, wherever it happens."""
        return (self.name, self.animal, self.object)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A dish from two ingredients: "how do i make a soup with rice and trout"."""

    family: ClassVar[str] = "recipe"
    dish: str
    first: str
    second: str

    def key(self) -> tuple[str, ...]:
        """What is held out together: the dish with its pair of ingredients, in both orders."""
        return (*sorted((self.first, self.second)), self.dish)


@dataclass(frozen=True, slots=True)
class Route:
    """A way on the map: "how do i get from the mill to the lake"."""

    family: ClassVar[str] = "route"
    start: str
    goal: str
    phrasing: int

    def key(self) -> tuple[str, ...]:
        """What is held out together: the way in one phrasing (ways themselves are too few to be held out)."""
        return (self.start, self.goal, str(self.phrasing))


Spec = Fact | Pick | Compare | Describe | Story | Recipe | Route


@cache
def _split_of_key(family: str, key: tuple[str, ...]) -> str:
    digest = hashlib.sha256("|".join((SPLIT_SALT, family, *key)).encode()).digest()
    point, edge = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for split, share in SPLIT_SHARES.items():
        edge += share
        if point < edge:
            return split
    return "test"  # only where the shares' float sum falls short of the point by a rounding


def split_of(spec: Spec) -> str:
    """The one split in which this prompt may appear, from a hash of what is held out together."""
    return _split_of_key(spec.family, spec.key())


def draw_family(draw: Draw) -> str:
    """A family in proportion to its share."""
    left = draw.below(sum(FAMILY_PERCENT.values()))
    for family, percent in FAMILY_PERCENT.items():
        if left < percent:
            return family
        left -= percent
    raise AssertionError("the shares do not cover the draw")


def _another(options: tuple[str, ...], taken: str, draw: Draw) -> str:
    return choose([option for option in options if option != taken], draw)


def _draw_pick(draw: Draw) -> Spec:
    (first_count, second_count), first = choose(COUNTS, draw), choose(tuple(CLASSES), draw)
    return Pick(first_count, first, second_count, _another(tuple(CLASSES), first, draw))


def _draw_compare(draw: Draw) -> Spec:
    # People who differ: "anna has a cat but ben has a cat" is no comparison.
    attribute, first = choose(ATTRIBUTES, draw), choose(NAMES, draw)
    value = WORLD.value[attribute]
    return Compare(attribute, first, choose([name for name in NAMES if value[name] != value[first]], draw))


def _draw_story(draw: Draw) -> Spec:
    name, animal, thing = choose(NAMES, draw), choose(ANIMALS, draw), choose(OBJECTS, draw)
    return Story(name, animal, thing, choose(PLACES, draw) if draw.below(2) else "")


def _draw_recipe(draw: Draw) -> Spec:
    dish, first = choose(DISHES, draw), choose(INGREDIENTS, draw)
    return Recipe(dish, first, _another(INGREDIENTS, first, draw))


def _draw_route(draw: Draw) -> Spec:
    start = choose(PLACES, draw)
    return Route(start, _another(PLACES, start, draw), draw.below(len(ROUTE_PROMPTS)))


_PROMPTS: Mapping[str, Callable[[Draw], Spec]] = {
    "fact": lambda draw: Fact(choose(NAMES, draw), choose(ATTRIBUTES, draw), draw.below(2)),
    "pick": _draw_pick,
    "compare": _draw_compare,
    "describe": lambda draw: Describe(
        choose(NAMES, draw), choose(tuple(DESCRIBE_PROMPTS), draw), choose(("", *ATTRIBUTES), draw)
    ),
    "story": _draw_story,
    "recipe": _draw_recipe,
    "route": _draw_route,
}


def draw_prompt(family: str, draw: Draw) -> Spec:
    """A random prompt of the family, of whichever split."""
    return _PROMPTS[family](draw)


def prompt_text(spec: Spec) -> str:
    """The prompt in words, without markers."""
    match spec:
        case Fact():
            text = fill(QUESTIONS[spec.attribute][spec.phrasing], name=spec.name)
        case Pick():
            slots = ("first_count", "first_class", "second_count", "second_class")
            text = fill(PICK_PROMPT, **dict(zip(slots, spec.key(), strict=True)))
        case Compare():
            text = fill(COMPARE_PROMPT, attributes=PLURALS[spec.attribute], first=spec.first, second=spec.second)
        case Describe():
            mention = f" {MENTION}" if spec.mention else ""
            text = fill(DESCRIBE_PROMPTS[spec.sentences] + mention, name=spec.name, attribute=spec.mention)
        case Story():
            where = f" {STORY_PLACE}" if spec.place else ""
            text = fill(STORY_PROMPT + where, name=spec.name, animal=spec.animal, object=spec.object, place=spec.place)
        case Recipe():
            text = fill(RECIPE_PROMPT, dish=spec.dish, first=spec.first, second=spec.second)
        case Route():
            text = fill(ROUTE_PROMPTS[spec.phrasing], start=spec.start, goal=spec.goal)
    return text


@cache
def _prompt_patterns() -> tuple[tuple[str, Callable[[dict[str, str]], Spec]], ...]:
    # Each pattern of a prompt, with what makes a record of the words in its slots; KeyError where a word is unknown.
    attribute_of = {plural: attribute for attribute, plural in PLURALS.items()}
    patterns: list[tuple[str, Callable[[dict[str, str]], Spec]]] = []

    def add(pattern: str, make: type[Any], **fixed: Any) -> None:
        patterns.append((pattern, lambda slots: make(**slots, **fixed)))

    for attribute, questions in QUESTIONS.items():
        for phrasing, question in enumerate(questions):
            add(question, Fact, attribute=attribute, phrasing=phrasing)
    add(PICK_PROMPT, Pick)
    patterns.append((COMPARE_PROMPT, lambda s: Compare(attribute_of[s["attributes"]], s["first"], s["second"])))
    for sentences, pattern in DESCRIBE_PROMPTS.items():
        add(pattern, Describe, sentences=sentences, mention="")
        for attribute in ATTRIBUTES:
            add(f"{pattern} {fill(MENTION, attribute=attribute)}", Describe, sentences=sentences, mention=attribute)
    add(STORY_PROMPT, Story, place="")
    add(f"{STORY_PROMPT} {STORY_PLACE}", Story)
    add(RECIPE_PROMPT, Recipe)
    for phrasing, pattern in enumerate(ROUTE_PROMPTS):
        add(pattern, Route, phrasing=phrasing)
    return tuple(patterns)


def _is_of_this_world(spec: Spec) -> bool:
    match spec:
        case Pick():
            pair = (spec.first_class, spec.second_class)
            known = (spec.first_count, spec.second_count) in COUNTS and _two_of(pair, CLASSES)
        case Compare():
            known = _two_of((spec.first, spec.second), NAMES)
        case Story():
            known = spec.animal in ANIMALS and spec.object in OBJECTS and spec.place in ("", *PLACES)
        case Recipe():
            known = spec.dish in DISHES and _two_of((spec.first, spec.second), INGREDIENTS)
        case Route():
            known = _two_of((spec.start, spec.goal), PLACES)
        case Fact() | Describe():
            known = True  # their only slot is a name, which the pattern itself restricts
    return known


def _two_of(pair: tuple[str, str], options: Collection[str]) -> bool:
    return pair[0] != pair[1] and all(item in options for item in pair)


@cache
def parse_prompt(text: str) -> Spec:
    """The record of a prompt without markers. Raises ``DataError`` where the text is no prompt of this world."""
    words = text.split()
    for pattern, make in _prompt_patterns():
        slots = read(pattern, words)
        if slots is None:
            continue
        try:
            spec = make(slots)
        except KeyError:
            continue
        if _is_of_this_world(spec):
            return spec
    raise DataError(
        f"got {text!r}, which is no prompt of the embedded world, so no answer to it can be checked; "
        "wanted a prompt as minillm.world.rows writes it"
    )

"""The wording: every sentence pattern of the world, shared by the grammar that writes and the checker that reads.

A pattern is a string of words with ``{slots}``. Slots for people (``{name}``, ``{she}``, ``{her}``) read only such
words; any other slot reads any one word, so that a wrong value is told apart from a wrong sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from minillm.world.facts import (
    CLASSES,
    COLD_VERBS,
    HEATED_VERBS,
    INGREDIENTS,
    JOBS,
    MOVES,
    NAMES,
    OBJECTS,
    PLACES,
)

STOP = "."
"""Closes each sentence of the families that may write several (describe, story)."""

PERSON_SLOTS: Mapping[str, frozenset[str]] = {
    "name": frozenset(NAMES),
    "she": frozenset(("she", "he")),
    "her": frozenset(("her", "his")),
}

QUESTIONS: Mapping[str, tuple[str, str]] = {
    "town": ("where does {name} live", "tell me the town of {name}"),
    "job": ("what work does {name} do", "tell me the job of {name}"),
    "food": ("which food does {name} like", "tell me the favourite food of {name}"),
    "pet": ("which animal does {name} keep", "tell me the pet of {name}"),
}
ANSWERS: Mapping[str, tuple[str, ...]] = {
    "town": (
        "{value}",
        "{name} lives in {value}",
        "{she} lives in {value}",
        "{name} is from {value}",
        "{her} town is {value}",
    ),
    "job": (
        "a {value}",
        "{name} is a {value}",
        "{she} is a {value}",
        "{name} works as a {value}",
        "{she} works as a {value}",
    ),
    "food": (
        "{value}",
        "{name} likes {value}",
        "{she} likes {value}",
        "{she} loves {value}",
        "{her} favourite food is {value}",
    ),
    "pet": (
        "a {value}",
        "{name} has a {value}",
        "{she} has a {value}",
        "{she} keeps a {value}",
        "{her} pet is a {value}",
    ),
}
CLAUSES: Mapping[str, tuple[str, str]] = {
    "town": ("lives in {value}", "is from {value}"),
    "job": ("works as a {value}", "is a {value}"),
    "food": ("likes {value}", "loves {value}"),
    "pet": ("has a {value}", "keeps a {value}"),
}
"""What may be said of a person after the subject."""

NUMBERS: Mapping[str, int] = {"one": 1, "two": 2}
COUNTS = (("one", "two"), ("two", "one"), ("two", "two"))
"""How many of the first and of the second class a prompt may ask for."""
PICK_PROMPT = "name {first_count} of the {first_class} and {second_count} of the {second_class}"
OPENERS = ("take", "i choose", "let us have")
PICK_BREAK = "plus"
PICK_JOIN = "and"

PLURALS: Mapping[str, str] = {"town": "towns", "job": "jobs", "food": "foods", "pet": "pets"}
COMPARE_PROMPT = "compare the {attributes} of {first} and {second}"
CONNECTIVES = ("and", "while", "but")

SENTENCES: Mapping[int, str] = {1: "one sentence", 2: "two sentences"}
DESCRIBE_PROMPTS: Mapping[int, str] = {n: f"describe {{name}} in {words}" for n, words in SENTENCES.items()}
MENTION = "and mention the {attribute}"
DESCRIBE_JOIN = "and"

STORY_PROMPT = "tell a story about {name} with a {animal} and a {object}"
STORY_PLACE = "at the {place}"
TIMES = ("one morning", "one evening", "last summer", "last winter")
STORY_OPENING = "{name} took a {animal} to the {place}"
STORY_FINDING = "{she} found a {object} and felt {mood}"
FEELINGS: Mapping[str, tuple[str, str, str]] = {
    "happy": ("happy", "glad", "merry"),
    "sad": ("sad", "gloomy", "lonely"),
    "scared": ("scared", "nervous", "worried"),
    "angry": ("angry", "furious", "cross"),
}
ANIMAL_ACTS: Mapping[str, tuple[str, str, str]] = {
    "happy": ("danced", "jumped", "played"),
    "sad": ("lay down", "whimpered", "sulked"),
    "scared": ("hid", "froze", "shook"),
    "angry": ("stamped", "snarled", "hissed"),
}
PERSON_ACTS: Mapping[str, tuple[str, str, str]] = {
    "happy": ("laughed", "smiled", "sang"),
    "sad": ("wept", "cried", "sighed"),
    "scared": ("trembled", "screamed", "ran off"),
    "angry": ("shouted", "cursed", "stormed off"),
}
STORY_CLOSINGS = (
    "later {she} went home to {value}",
    "at last {she} was home in {value}",
    "soon {she} slept at home in {value}",
)

RECIPE_PROMPT = "how do i make a {dish} with {first} and {second}"
RECIPES = (
    "{verb1} the {food1} then {verb2} the {food2} and",
    "{verb1} the {food1} then {verb2} the {food2} then",
    "{verb1} the {food1} and {verb2} the {food2} then",
)
"""A closing of the dish follows."""
DISH_CLOSINGS: Mapping[str, tuple[str, str]] = {
    "pie": ("add pastry", "bake it until golden"),
    "salad": ("toss well", "serve it well chilled"),
    "soup": ("add water", "serve it in bowls"),
    "stew": ("simmer slowly", "leave it to simmer"),
}
DISHES = tuple(DISH_CLOSINGS)

ROUTE_PROMPTS = (
    "how do i get from the {start} to the {goal}",
    "show me the way from the {start} to the {goal}",
    "lead me to the {goal} from the {start}",
    "what is the way from the {start} to the {goal}",
)
ROUTE_VERBS = ("go", "walk")
ROUTE_JOIN = "then"
ROUTE_STEP = "{direction} to the {place}"


@cache
def _parts(pattern: str) -> tuple[tuple[str, str], ...]:
    # ("", word) for a fixed word, (slot, "") for a slot.
    return tuple((word[1:-1], "") if word[0] == "{" else ("", word) for word in pattern.split())


def fill(pattern: str, **values: str) -> str:
    """The pattern with its slots replaced."""
    return pattern.format_map(values)


def read(pattern: str, words: Sequence[str]) -> dict[str, str] | None:
    """Slot to word where ``words`` follow the pattern from the first to the last; None where they do not."""
    parts = _parts(pattern)
    if len(parts) != len(words):
        return None
    slots: dict[str, str] = {}
    for (slot, fixed), word in zip(parts, words, strict=True):
        if not slot:
            if fixed != word:
                return None
        elif word not in PERSON_SLOTS.get(slot, (word,)):
            return None
        else:
            slots[slot] = word
    return slots


def split(words: Sequence[str], separator: str) -> list[list[str]]:
    """The runs of words between separators; an empty run wherever two separators, or a separator and an end, meet."""
    runs: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            runs.append([])
        else:
            runs[-1].append(word)
    return runs


def _texts() -> Iterator[str]:
    yield from (STOP, PICK_PROMPT, PICK_BREAK, PICK_JOIN, COMPARE_PROMPT, MENTION, DESCRIBE_JOIN)
    yield from (STORY_PROMPT, STORY_PLACE, STORY_OPENING, STORY_FINDING, RECIPE_PROMPT, ROUTE_JOIN, ROUTE_STEP)
    yield from (*OPENERS, *CONNECTIVES, *TIMES, *STORY_CLOSINGS, *RECIPES, *ROUTE_PROMPTS, *ROUTE_VERBS)
    for group in (QUESTIONS, ANSWERS, CLAUSES, FEELINGS, ANIMAL_ACTS, PERSON_ACTS, DISH_CLOSINGS):
        for texts in group.values():
            yield from texts
    for members in (*CLASSES.values(), *COLD_VERBS.values(), *HEATED_VERBS.values()):
        yield from members
    for slot in PERSON_SLOTS.values():
        yield from slot
    yield from (*NUMBERS, *PLURALS, *PLURALS.values(), *DESCRIBE_PROMPTS.values(), *CLASSES, *DISHES)
    yield from (*JOBS, *INGREDIENTS, *PLACES, *OBJECTS, *MOVES)


def vocabulary() -> tuple[str, ...]:
    """Every word that a prompt or a response can hold, sorted."""
    return tuple(sorted({word for text in _texts() for word in text.split() if word[0] != "{"}))

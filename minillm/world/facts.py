"""The world itself: who lives where, what lies beside what, what may be done to which food.

One fixed seed draws the 48 facts about people and the map; they never change, because a model is trained on them.
The rest (classes of food, verbs, moods of objects) is laid down by hand, so that it reads as sense.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")

WORLD_SEED = 7

WOMEN = ("anna", "clara", "emma", "julia", "maria", "nora")
MEN = ("ben", "david", "felix", "hugo", "leo", "tom")
NAMES = (*WOMEN, *MEN)
TOWNS = ("cairo", "lima", "oslo", "paris", "rome", "tokyo")
JOBS = ("baker", "doctor", "farmer", "painter", "sailor", "teacher")
# No noun that follows an article begins with a vowel: "a" is then always right.
ANIMALS = ("cat", "dog", "duck", "fox", "goat", "horse", "mouse", "parrot", "rabbit", "turtle")
PLACES = ("bridge", "castle", "harbour", "lake", "market", "mill", "school", "station", "tower")

FOOD_CLASSES: Mapping[str, tuple[str, ...]] = {
    "vegetables": ("cabbage", "celery", "pumpkin", "spinach"),
    "grains": ("barley", "millet", "rice"),
    "fish": ("salmon", "trout", "tuna"),
    "fruits": ("lemon", "mango", "melon", "papaya"),
}
INGREDIENTS = tuple(food for foods in FOOD_CLASSES.values() for food in foods)
CLASS_OF: Mapping[str, str] = {food: name for name, foods in FOOD_CLASSES.items() for food in foods}
CLASSES: Mapping[str, tuple[str, ...]] = {**FOOD_CLASSES, "animals": ANIMALS, "towns": TOWNS}
"""The six classes from which a prompt asks for members."""

COLD_VERBS: Mapping[str, tuple[str, ...]] = {
    "vegetables": ("chop", "grate"),
    "grains": ("rinse", "soak"),
    "fish": ("flake", "salt"),
    "fruits": ("peel", "mash"),
}
HEATED_VERBS: Mapping[str, tuple[str, ...]] = {
    "vegetables": ("roast", "steam"),
    "grains": ("boil",),
    "fish": ("grill",),
    "fruits": ("bake", "stew"),
}
HEATED = frozenset(verb for verbs in HEATED_VERBS.values() for verb in verbs)
COLD_DISH = "salad"
"""The dish in which nothing may be heated."""

MOOD_OF: Mapping[str, str] = {
    "kite": "happy",
    "medal": "happy",
    "letter": "sad",
    "violin": "sad",
    "mask": "scared",
    "skull": "scared",
    "drum": "angry",
    "whistle": "angry",
}
OBJECTS = tuple(MOOD_OF)

ATTRIBUTES = ("town", "job", "food", "pet")
MOVES: Mapping[str, tuple[int, int]] = {"north": (-1, 0), "south": (1, 0), "east": (0, 1), "west": (0, -1)}
"""Direction to (rows down, columns right)."""
MAP_SIDE = 3


class Draw(Protocol):
    """Where chance comes from. Everything random in the world goes through this one method."""

    def below(self, n: int) -> int:
        """A whole number in [0, n), each equally likely."""
        ...


class SeededDraw:
    """Numbers that depend on the given parts alone: not on the process, its hash seed or the Python version."""

    def __init__(self, *parts: str | int) -> None:
        # A str seed goes through SHA-512, and random() is the one method whose sequence Python promises to keep.
        self._random = random.Random("/".join(str(part) for part in parts)).random

    def below(self, n: int) -> int:
        """A whole number in [0, n), each equally likely."""
        return int(self._random() * n)


def choose(options: Sequence[Item], draw: Draw) -> Item:
    """One of the options, each equally likely."""
    return options[draw.below(len(options))]


def sample(items: Sequence[Item], count: int, draw: Draw) -> list[Item]:
    """``count`` of the items in random order, every ordered choice equally likely (Fisher and Yates, stopped early)."""
    left = list(items)
    return [left.pop(draw.below(len(left))) for _ in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is true. ``value["pet"]["anna"]`` is Anna's pet; ``cell["mill"]`` is the mill's (row, column)."""

    value: Mapping[str, Mapping[str, str]]
    cell: Mapping[str, tuple[int, int]]
    place: Mapping[tuple[int, int], str]

    def neighbour(self, place: str, direction: str) -> str | None:
        """The place next to ``place`` in that direction, or None beyond the edge of the map."""
        row, column = self.cell[place]
        down, right = MOVES[direction]
        return self.place.get((row + down, column + right))

    def distance(self, start: str, goal: str) -> int:
        """Steps on a shortest way; 0 for a place and itself."""
        (row, column), (goal_row, goal_column) = self.cell[start], self.cell[goal]
        return abs(row - goal_row) + abs(column - goal_column)

    def shortest_paths(self, start: str, goal: str) -> list[tuple[tuple[str, str], ...]]:
        """Every shortest way as (direction, place reached) steps, in a fixed order; one empty way if already there."""
        if start == goal:
            return [()]
        paths: list[tuple[tuple[str, str], ...]] = []
        for direction in MOVES:
            reached = self.neighbour(start, direction)
            if reached is not None and self.distance(reached, goal) < self.distance(start, goal):
                paths += [((direction, reached), *rest) for rest in self.shortest_paths(reached, goal)]
        return paths


def draw_world(seed: int) -> World:
    """A world from a seed. Towns and jobs are shared by two people each, pets by at most two, foods by nobody."""
    draw = SeededDraw("world", seed)

    def dealt(values: Sequence[str]) -> dict[str, str]:
        deck = sample(values, len(values), draw) + sample(values, len(values), draw)
        return dict(zip(NAMES, sample(deck[: len(NAMES)], len(NAMES), draw), strict=True))

    value = {"town": dealt(TOWNS), "job": dealt(JOBS), "food": dealt(INGREDIENTS), "pet": dealt(ANIMALS)}
    places = sample(PLACES, len(PLACES), draw)
    cell = {place: divmod(i, MAP_SIDE) for i, place in enumerate(places)}
    return World(value=value, cell=cell, place={at: place for place, at in cell.items()})


WORLD = draw_world(WORLD_SEED)


def pronoun(name: str) -> str:
    """The subject, "she" or "he", by the name."""
    return "she" if name in WOMEN else "he"


def possessive(name: str) -> str:
    """The owner, "her" or "his", by the name."""
    return "her" if name in WOMEN else "his"

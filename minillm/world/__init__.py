"""An embedded micro-world: questions whose answers can be checked exactly, small enough to learn in minutes.

Twelve people, their towns, jobs, foods and pets, a map of nine places, fourteen ingredients and eight objects; seven
families of prompts with one to thousands of right answers each. ``rows`` makes the data, ``check`` judges a response.
"""

from __future__ import annotations

from minillm.errors import DataError, did_you_mean
from minillm.world.checker import BOS, REASONS, SEP, Verdict, check
from minillm.world.facts import SeededDraw
from minillm.world.grammar import generate_response
from minillm.world.prompts import SPLIT_SHARES, Spec, draw_family, draw_prompt, parse_prompt, prompt_text, split_of
from minillm.world.tokenizer import build_tokenizer

__all__ = [
    "DEFAULT_COUNTS",
    "MAX_PROMPT_TOKENS",
    "MAX_RESPONSE_TOKENS",
    "PROMPT_FORMAT",
    "REASONS",
    "SeededDraw",
    "Verdict",
    "build_tokenizer",
    "check",
    "generate_response",
    "parse_prompt",
    "rows",
]

PROMPT_FORMAT = f"{BOS} {{prompt}} {SEP}"
MAX_PROMPT_TOKENS = 24
"""Markers included."""
MAX_RESPONSE_TOKENS = 48
"""The closing EOS included."""
DEFAULT_COUNTS = {"train": 60_000, "validation": 300, "test": 400}
REFERENCES = 8
TRIES = 64
"""Draws spent on finding distinct references; a prompt with two right answers has found both long before."""

WorldRow = dict[str, str | list[str]]


def rows(split: str, *, count: int | None = None, seed: int = 1) -> list[WorldRow]:
    """Rows of a split with the keys ``id``, ``prompt`` (in ``PROMPT_FORMAT``), ``responses`` and ``family``.

    Training rows have one response each, the others up to eight distinct ones. Families come in their training shares
    in every split, and prompts may repeat; no prompt of one split appears in another (see ``split_of``). A longer
    ``count`` goes on where a shorter one ends. Raises ``DataError`` for an unknown split or a count below 1.
    """
    if split not in SPLIT_SHARES:
        known = ", ".join(SPLIT_SHARES)
        hint = did_you_mean(split, SPLIT_SHARES)
        raise DataError(f"got split {split!r} of the embedded world, wanted one of {known}{hint}")
    count = DEFAULT_COUNTS[split] if count is None else count
    if count < 1:
        raise DataError(f"got count {count} for world:{split}, wanted at least 1 row")
    draw = SeededDraw("rows", split, seed)
    return [_row(split, i, draw) for i in range(count)]


def _row(split: str, number: int, draw: SeededDraw) -> WorldRow:
    family = draw_family(draw)
    spec = draw_prompt(family, draw)
    while split_of(spec) != split:
        spec = draw_prompt(family, draw)
    return {
        "id": f"{split}-{number:05d}",
        "prompt": PROMPT_FORMAT.format(prompt=prompt_text(spec)),
        "responses": _responses(spec, REFERENCES if split != "train" else 1, draw),
        "family": family,
    }


def _responses(spec: Spec, wanted: int, draw: SeededDraw) -> list[str]:
    found: dict[str, None] = {}  # a dict, for its order
    for _ in range(TRIES):
        found[generate_response(spec, draw)] = None
        if len(found) == wanted:
            break
    return list(found)

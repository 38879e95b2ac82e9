"""The grammar and the checker agree exactly: what one can write, and nothing else, the other accepts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from minillm.errors import DataError
from minillm.world import PROMPT_FORMAT, check, generate_response, parse_prompt
from minillm.world.facts import SeededDraw, choose
from minillm.world.phrases import vocabulary
from minillm.world.prompts import FAMILY_PERCENT, Spec, draw_prompt, prompt_text

# A few prompts of each family, with the number of right answers counted by hand from the tables.
FREEDOM = {
    "where does anna live": 5,
    "name one of the grains and two of the towns": 3 * 3 * (6 * 5),
    "name two of the animals and two of the fish": 3 * (10 * 9) * (3 * 2),
    "compare the pets of anna and ben": 2 * 3 * 2 * 2,
    "describe anna in one sentence": (4 * 3) * 4 * 2,
    "describe tom in one sentence and mention the job": (2 * 3) * 4 * 2,
    "describe anna in two sentences": (4 * 3) * 4 + 2 * (4 * 3 * 2) * 8 * 2 + (4 * 3 * 2) * 16 * 4,
    "tell a story about anna with a cat and a kite at the mill": 4 * 27 * 4,
    "tell a story about leo with a fox and a drum": 9 * 4 * 27 * 4,
    "how do i make a salad with rice and trout": 2 * 3 * (2 * 2) * 2,
    "how do i make a soup with rice and lemon": 2 * 3 * (3 * 4) * 2,
    "show me the way from the market to the harbour": 6 * 2,
    "lead me to the school from the market": 2,
}


class EveryDraw:
    """Walks through every sequence of choices a function can make, one sequence for each ``start``."""

    def __init__(self) -> None:
        self.digits: list[int] = []
        self.bases: list[int] = []
        self.at = 0

    def below(self, n: int) -> int:
        if self.at == len(self.digits):
            self.digits.append(0)
            self.bases.append(n)
        self.at += 1
        return self.digits[self.at - 1]

    def advance(self) -> bool:
        self.at = 0
        while self.digits:
            base = self.bases.pop()
            digit = self.digits.pop() + 1
            if digit < base:
                self.digits.append(digit)
                self.bases.append(base)
                return True
        return False


def every(make: Callable[[EveryDraw], object]) -> Iterator[object]:
    draw = EveryDraw()
    yield make(draw)
    while draw.advance():
        yield make(draw)


@cache
def every_response(prompt: str) -> frozenset[str]:
    spec = parse_prompt(prompt)
    return frozenset(str(text) for text in every(lambda draw: generate_response(spec, draw)))


@cache
def every_prompt(family: str) -> tuple[Spec, ...]:
    return tuple(dict.fromkeys(every(lambda draw: draw_prompt(family, draw))))  # type: ignore[arg-type]


def mutated(text: str, draw: SeededDraw) -> str:
    words, at = text.split(), draw.below(len(text.split()))
    match draw.below(4):
        case 0:
            words[at] = choose(vocabulary(), draw)
        case 1:
            words.insert(at, choose((*vocabulary(), *words), draw))
        case 2:
            del words[at]
        case _:
            other = draw.below(len(words))
            words[at], words[other] = words[other], words[at]
    return " ".join(words)


def test_thirty_thousand_responses_are_all_accepted() -> None:
    draw, rejected = SeededDraw("round trip"), Counter[str]()
    families = tuple(FAMILY_PERCENT)
    for i in range(30_000):
        spec = draw_prompt(families[i % len(families)], draw)
        verdict = check(prompt_text(spec), generate_response(spec, draw))
        rejected[verdict.reason] += not verdict.valid
    assert rejected.total() == 0, rejected


@pytest.mark.parametrize(("prompt", "answers"), FREEDOM.items())
def test_the_number_of_right_answers_is_the_one_counted_by_hand(prompt: str, answers: int) -> None:
    assert len(every_response(prompt)) == answers


@pytest.mark.parametrize("prompt", FREEDOM)
def test_every_right_answer_is_accepted(prompt: str) -> None:
    assert {check(prompt, response).reason for response in every_response(prompt)} == {""}


@pytest.mark.parametrize("prompt", FREEDOM)
def test_a_mutation_is_accepted_only_where_the_grammar_can_write_it(prompt: str) -> None:
    right, draw = every_response(prompt), SeededDraw("mutations", prompt)
    some = sorted(right)
    for _ in range(1500):
        response = mutated(choose(some, draw), draw)
        assert check(prompt, response).valid == (response in right), response


@pytest.mark.parametrize("prompt", FREEDOM)
def test_an_answer_to_another_prompt_is_accepted_only_where_the_grammar_can_write_it(prompt: str) -> None:
    right = every_response(prompt)
    for other in FREEDOM:
        for response in sorted(every_response(other))[::7]:
            assert check(prompt, response).valid == (response in right), response


def test_a_wrong_answer_hidden_in_the_enumeration_would_be_seen() -> None:
    """Negative control of the exactness tests: a set with one answer too few or too many disagrees with the checker."""
    prompt = "where does anna live"
    right = every_response(prompt)
    missing, extra = right - {"lima"}, right | {"rome"}
    assert check(prompt, "lima").valid != ("lima" in missing)
    assert check(prompt, "rome").valid != ("rome" in extra)


@pytest.mark.parametrize("family", FAMILY_PERCENT)
def test_a_prompt_says_all_there_is_to_know_about_itself(family: str) -> None:
    prompts = every_prompt(family)
    texts = [prompt_text(spec) for spec in prompts]
    assert [parse_prompt(text) for text in texts] == list(prompts)
    assert len(set(texts)) == len(prompts)


def test_the_number_of_prompts_is_the_one_counted_by_hand() -> None:
    counts = {family: len(every_prompt(family)) for family in FAMILY_PERCENT}
    # compare: of 12 x 11 ordered pairs the equal ones (6 shared towns, 6 shared jobs, 2 shared pets) are not asked.
    assert counts == {
        "fact": 12 * 4 * 2,
        "pick": 6 * 5 * 3,
        "compare": 4 * 12 * 11 - 2 * (6 + 6 + 2),
        "describe": 12 * 2 * 5,
        "story": 12 * 10 * 8 * (1 + 9),
        "recipe": 4 * 14 * 13,
        "route": 9 * 8 * 4,
    }


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "where does zoe live",
        "compare the hats of anna and ben",
        "compare the pets of anna and anna",
        "name two of the fish and two of the fish",
        "name one of the fish and one of the fruits",
        "tell a story about anna with a cat and a kite at the moon",
        "how do i make a soup with rice and rice",
        "lead me to the mill from the mill",
    ],
)
def test_a_prompt_of_no_world_raises_and_is_not_called_wrong(prompt: str) -> None:
    with pytest.raises(DataError, match="no prompt of the embedded world"):
        check(prompt, "lima")


def test_markers_around_the_prompt_change_nothing() -> None:
    for prompt in FREEDOM:
        response = min(every_response(prompt))
        assert check(PROMPT_FORMAT.format(prompt=prompt), response) == check(prompt, response) == (True, "")
        assert check(PROMPT_FORMAT.format(prompt=prompt), "mill") == check(prompt, "mill")

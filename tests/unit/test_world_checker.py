"""Each fault has its reason code, and each code is earned by one rule that can be seen to act."""

from __future__ import annotations

import pytest

from minillm.world import REASONS, check, checker

FACT = "where does anna live"
PICK = "name one of the fruits and two of the fish"
COMPARE = "compare the towns of anna and ben"
ONE = "describe anna in one sentence"
TWO = "describe anna in two sentences"
MENTION = "describe anna in two sentences and mention the job"
STORY = "tell a story about anna with a cat and a kite at the mill"
TALE = (
    "one morning anna took a cat to the mill . she found a kite and felt glad . the cat played . she sang . "
    "later she went home to lima ."
)
SOUP = "how do i make a soup with rice and trout"
SALAD = "how do i make a salad with rice and trout"
ROUTE = "lead me to the tower from the market"

RIGHT = [
    (FACT, "lima"),
    (PICK, "take mango plus tuna and trout"),
    (COMPARE, "anna is from lima but ben lives in rome"),
    (ONE, "anna lives in lima and is a baker ."),
    (TWO, "anna lives in lima . she keeps a turtle ."),
    (MENTION, "anna lives in lima . she keeps a turtle and she is a baker ."),
    (STORY, TALE),
    (SOUP, "boil the rice and grill the trout then add water"),
    (SALAD, "soak the rice and salt the trout then toss well"),
    (ROUTE, "go south to the station then east to the mill then east to the tower"),
]

# Each has the one fault named and no other, so without that rule it would pass.
FAULTS = [
    (FACT, "she has a turtle", "attribute"),
    (FACT, "ben lives in rome", "person"),
    (FACT, "he lives in lima", "pronoun"),
    (FACT, "his town is lima", "pronoun"),
    (FACT, "she lives in rome", "fact"),
    (FACT, "rome", "fact"),
    (PICK, "take mango and lemon plus tuna and trout", "count"),
    (PICK, "take mango plus tuna", "count"),
    (PICK, "take rice plus tuna and trout", "member"),
    (PICK, "take mango plus tuna and mango", "member"),
    (PICK, "take mango plus tuna and tuna", "dup"),
    (COMPARE, "anna is a baker but ben is a doctor", "attribute"),
    (COMPARE, "anna is from lima but david lives in cairo", "person"),
    (COMPARE, "anna is from lima but anna lives in lima", "dup"),
    (COMPARE, "anna is from lima but ben lives in lima", "fact"),
    (ONE, "anna lives in lima .", "count"),
    (ONE, "anna lives in lima and is a baker and has a turtle .", "count"),
    (ONE, "anna lives in lima and is from lima .", "dup"),
    (TWO, "anna lives in lima . she is from lima .", "dup"),
    (TWO, "anna lives in lima . she keeps a mouse .", "fact"),
    (TWO, "ben lives in lima . she keeps a turtle .", "person"),
    (TWO, "she lives in lima . she keeps a turtle .", "pronoun"),
    (TWO, "anna lives in lima . he keeps a turtle .", "pronoun"),
    (TWO, "anna lives in lima and he keeps a turtle . she is a baker .", "pronoun"),
    (TWO, "anna lives in lima . anna keeps a turtle .", "pronoun"),
    (TWO, "anna lives in lima . she keeps a turtle . she is a baker .", "sentences"),
    (TWO, "anna lives in lima .", "sentences"),
    (MENTION, "anna lives in lima . she keeps a turtle .", "mention"),
    (STORY, f"{TALE} soon she slept at home in lima .", "sentences"),
    (STORY, TALE.replace("anna", "nora"), "person"),
    (STORY, TALE.replace("took a cat", "took a dog"), "animal"),
    (STORY, TALE.replace("the cat", "the dog"), "animal"),
    (STORY, TALE.replace("mill", "lake"), "place"),
    (STORY, TALE.replace("kite", "medal"), "object"),
    (STORY, TALE.replace("she sang", "he sang"), "pronoun"),
    (STORY, TALE.replace("she found", "he found"), "pronoun"),
    (STORY, TALE.replace("she went", "he went"), "pronoun"),
    (STORY, TALE.replace("glad", "gloomy"), "s2"),
    (STORY, TALE.replace("played", "lay down"), "s3"),
    (STORY, TALE.replace("sang", "stormed off"), "s4"),
    (STORY, TALE.replace("lima", "oslo"), "fact"),
    (SOUP, "boil the rice and grill the tuna then add water", "ingredient"),
    (SOUP, "boil the rice and soak the rice then add water", "dup"),
    (SOUP, "boil the rice and chop the trout then add water", "verb"),
    (SOUP, "boil the rice and grill the trout then toss well", "closing"),
    (SALAD, "boil the rice and salt the trout then toss well", "heat"),
    (SALAD, "soak the rice and grill the trout then toss well", "heat"),
    (ROUTE, "go north to the station then east to the mill then east to the tower", "step"),
    (ROUTE, "go south to the station then south to the lake then east to the bridge", "goal"),
    (
        ROUTE,
        "go south to the station then east to the mill then east to the tower then north to the castle then south to "
        "the tower",
        "detour",
    ),
]

# What cannot be read at all; no rule to remove.
UNREADABLE = [
    (FACT, "", "empty"),
    (FACT, "   ", "empty"),
    (FACT, "anna lives at lima", "form"),
    (FACT, "lima <eos>", "form"),
    (PICK, "mango plus tuna and trout", "form"),
    (PICK, "take mango plus tuna trout", "form"),
    (PICK, "take mango and tuna and trout", "form"),
    (COMPARE, "anna is from lima", "form"),
    (COMPARE, "she is from lima but ben lives in rome", "form"),
    (ONE, "anna lives in lima and is a baker", "form"),
    (ONE, "anna lives in lima and .", "form"),
    (TWO, "anna lives in lima . . she keeps a turtle .", "form"),
    (TWO, "anna lives in lima . keeps a turtle .", "form"),
    (STORY, TALE.replace("one morning ", ""), "form"),
    (STORY, TALE.replace("the cat", "a cat"), "form"),
    (STORY, TALE.replace("later she went home to lima .", "the cat played ."), "form"),
    (STORY, "one morning anna took a cat to the mill .", "sentences"),
    (SOUP, "boil the rice and grill the trout", "form"),
    (ROUTE, "south to the station", "form"),
    (ROUTE, "go south to the station then east to the", "form"),
    (ROUTE, "go", "form"),
]


def test_the_unspoilt_responses_are_right() -> None:
    assert [check(*case) for case in RIGHT] == [(True, "")] * len(RIGHT)


@pytest.mark.parametrize(("prompt", "response", "reason"), FAULTS + UNREADABLE)
def test_a_fault_is_rejected_with_its_reason(prompt: str, response: str, reason: str) -> None:
    assert check(prompt, response) == (False, reason)


def test_every_reason_code_is_reached_and_explained() -> None:
    assert {reason for *_, reason in FAULTS + UNREADABLE} == set(REASONS)


@pytest.mark.parametrize(("prompt", "response", "reason"), FAULTS)
def test_without_its_rule_the_fault_would_pass(
    monkeypatch: pytest.MonkeyPatch, prompt: str, response: str, reason: str
) -> None:
    """Negative control: the checker with this one rule taken out accepts the very same response."""
    every_rule = checker._first_fault

    def without_the_rule(*faults: tuple[bool, str]) -> str:
        return every_rule(*(fault for fault in faults if fault[1] != reason))

    monkeypatch.setattr(checker, "_first_fault", without_the_rule)
    assert check(prompt, response) == (True, "")

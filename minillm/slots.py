"""Values of dialogue acts, and which of them a reply carries: an exact checker for data-to-text.

A prompt holds acts on a line of its own, ``events: offer(date=March 13th); request(time); notify_success``: names in
lower case, each with a slot, a slot and its value, or nothing, parted by "; "; what stands before ": " is optional.

What counts as carried, after Unicode's NFKC and case folding, in words (runs of letters and digits; a number keeps the
points, commas and colons inside it; ":00" or ".00" behind it, and how "pm" is written, make no difference):

* a value whose words stand in the reply side by side, or, of a list ("Pool, Luxury"), those of each of its parts;
* longest values first, and no word of the reply serves two of them: the 1 of "1 pm" is not the one passenger.

Not asked for, since replies say them in words of their own: truth values, "None" and "dontcare", the intents of
``offer_intent``, and values without a letter or digit. Numbers spelt out ("two"), synonyms and inflections count as
missing. Nothing here notices what a reply says *beyond* its prompt.

On Schema-Guided Dialogue as text (63,821 pairs for training, of which every one repeats its values word by word, so
that they seem to have been chosen so) people's own replies carry 0.9991 of 168,291 values, and 0.9979 of 2,793 in the
test's 1,317 references; 4,958 and 68 more are not asked for. What is missing: "3 bedrooms and baths" for two values of
3, a museum that only its name calls one. Of 9,530 replies that lost the words of one value 1 still counts as carrying
it; if a word could serve twice, 140 would.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.errors import DataError
from minillm.rows import counted

_ACT = re.compile(r"(?P<name>[a-z][a-z_]*)(?:\((?:(?P<slot>\w+)(?:=(?P<value>.*))?)?\))?")
_DOMAIN = re.compile(r"\w+: ")
_MARKS = re.compile(r"^(?:<[^<>]*>)+|(?:<[^<>]*>)+$")
"""What a chat template puts around a line: <|im_end|>, </s>."""
_WORD = re.compile(r"\d+(?:[.,:]\d+)*[^\W_]*|[^\W_]+")
_HOUR = re.compile(r"(?<=\d)\s*([ap])\.?m\b\.?")
_NOTHING_OVER = re.compile(r"(?<=\d)[.:]00(?!\d)")
_NOT_SAID = {"true", "false", "none", "dontcare"}
_INTENT = "offer_intent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One thing that a reply is to do."""

    name: str
    slot: str = ""
    value: str | None = None
    """None where the act has none: ``request(time)``."""

    @property
    def said(self) -> bool:
        """Whether a reply is expected to say the value as it stands."""
        return (
            self.value is not None
            and self.name != _INTENT
            and self.value.casefold() not in _NOT_SAID
            and bool(_words(self.value))
        )

    def __str__(self) -> str:
        return f"{self.slot}={self.value}"


def acts_in(prompt: str) -> tuple[Act, ...]:
    """The acts of the last line that holds nothing else; none where there is no such line.

    A word alone is an act only beside one in parentheses or behind a domain.
    """
    for whole in reversed(prompt.splitlines()):
        line = _MARKS.sub("", whole.strip()).strip()
        domain = _DOMAIN.match(line)
        found = [_ACT.fullmatch(part) for part in line[domain.end() if domain else 0 :].split("; ")]
        if all(found) and (domain or "(" in line):
            return tuple(Act(name=m["name"], slot=m["slot"] or "", value=m["value"]) for m in found if m)
    return ()


def asked_values(prompt: str) -> list[Act]:
    """The acts whose values a reply is expected to say, each pair of slot and value once."""
    return list({str(act): act for act in acts_in(prompt) if act.said}.values())


def missing_values(prompt: str, reply: str) -> list[Act]:
    """Those of them that it does not carry."""
    asked, words = asked_values(prompt), _words(reply)
    free, missing = [True] * len(words), set[int]()
    for place, act in sorted(enumerate(asked), key=lambda each: -len(_words(each[1].value or ""))):
        taken = _places(act.value or "", words, free)
        if taken is None:
            missing.add(place)
        for at in taken or ():
            free[at] = False
    return [act for place, act in enumerate(asked) if place in missing]


def coverage(prompt: str, reply: str) -> dict[str, Any]:
    """What a row of samples.jsonl keeps: values carried, values asked for, and what is missing, if anything; nothing
    for a prompt without acts."""
    if not acts_in(prompt):
        return {}
    missing, asked = missing_values(prompt, reply), len(asked_values(prompt))
    told = {"missing": "; ".join(map(str, missing))} if missing else {}
    return {"carried": asked - len(missing), "values": asked, **told}


def require_values(prompts: Sequence[str], *, source: str) -> str:
    """What a set has for the coverage, as a sentence; ``DataError`` where that is nothing."""
    acts = [acts_in(prompt) for prompt in prompts]
    without = sum(not of for of in acts)
    asked = [len(asked_values(prompt)) for prompt in prompts]
    left_out = sum(act.value is not None and not act.said for of in acts for act in of)
    if not any(asked):
        what = "no prompt holds dialogue acts" if without == len(acts) else "no act of its prompts has a value to say"
        raise DataError(
            f"{source}: {what}, and data.checker is slots\n"
            "  wanted prompts such as 'events: offer(date=March 13th); request(time)'; give those, or leave "
            "data.checker out"
        )
    parts = [f"{counted(sum(asked), 'value')} in the acts of {counted(sum(map(bool, asked)), 'prompt')}"]
    if none := sum(bool(of) and not number for of, number in zip(acts, asked, strict=True)):
        parts.append(f"{counted(none, 'prompt')} with acts but no value")
    if without:
        parts.append(f"{counted(without, 'prompt')} without acts, not measured")
    if left_out:
        parts.append(f"{counted(left_out, 'value')} not asked for (truth values and the like)")
    return f"coverage: {'; '.join(parts)}"


def _places(value: str, words: Sequence[str], free: Sequence[bool]) -> list[int] | None:
    """Where a value stands on free words: as a whole, or else part by part."""
    for parts in ([value], value.split(", ")):
        left, taken = list(free), list[int]()
        for part in parts:
            own = _words(part)
            starts = range(len(words) - len(own) + 1)
            at = next((n for n in starts if words[n : n + len(own)] == own and all(left[n : n + len(own)])), None)
            if at is None:
                break
            for n in range(at, at + len(own)):
                left[n] = False
                taken.append(n)
        else:
            return taken
    return None


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_NOTHING_OVER.sub("", _HOUR.sub(r" \1m ", folded)))

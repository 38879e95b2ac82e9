"""One row of a file of preferences: from a record to a prompt and the two responses to it, in the forms that there are.

    prompt (or instruction and input), chosen, rejected   texts
    messages (or prompt), chosen, rejected                turns of a chat, and texts or turns of the assistant
    chosen, rejected                                      whole chats that differ in their last turn
    chosen, rejected                                      dialogues of HH-RLHF: "\\n\\nHuman: …\\n\\nAssistant: …"

Whole chats and dialogues are cut before their last turn, the assistant's; what stands before it must be the same in
both, and is the prompt.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minillm.records import (
    CHOICES_FIELD,
    PROMPT_FIELDS,
    RESPONSE_FIELDS,
    Row,
    RowFault,
    checked_message,
    checked_text,
    kind_of,
    named_fields,
    parse_record,
)

SIDES = ("chosen", "rejected")
TEACHER_LOGPS = "teacher_logps"
OWN_FIELDS = (*SIDES, TEACHER_LOGPS)
UNREAD = (*RESPONSE_FIELDS, CHOICES_FIELD)
"""Fields of a prompt file that say nothing here: what answers the prompt are the two responses."""
ASSISTANT, HUMAN = "\n\nAssistant:", "\n\nHuman:"
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_OTHER_BEGINNINGS = "'chosen' and 'rejected' differ before their last turn, so they answer different prompts"

Turns = tuple[tuple[str, str], ...]
"""(role, content) of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """One row as its file has it, before template and tokenizer."""

    row: Row
    """The prompt; it has no responses."""
    chosen: str
    rejected: str
    turns: Turns = ()
    """The prompt's, where it is a chat or a dialogue."""
    teacher_logps: tuple[float, float] | None = None
    """See ``types.PreferencePair``."""

    @property
    def uid(self) -> str:
        """Names the row."""
        return self.row.uid

    @property
    def single_turn(self) -> bool:
        """Whether nothing was said before the one turn that is answered, a system's words aside."""
        return sum(role != "system" for role, _ in self.turns) <= 1

    def as_chat(self) -> PairRow:
        """The same for a chat template: a dialogue as messages, without the white space around its turns."""
        if not self.turns or self.row.messages:
            return self
        row = dataclasses.replace(self.row, prompt=None, messages=self.turns)
        return dataclasses.replace(self, row=row, chosen=self.chosen.strip(), rejected=self.rejected.strip())


def parse_pair(record: Mapping[str, object], *, default_uid: str) -> tuple[PairRow, list[str]]:
    """The checked row, and the names of fields that were left out.

    ``null`` is the same as an absent field. Raises ``RowFault`` where a response or the prompt is missing, is neither
    text nor turns, or where the two responses are not to the same prompt.
    """
    fields = {name: value for name, value in record.items() if value is not None}
    if missing := [name for name in SIDES if name not in fields]:
        wanted = "wanted 'chosen' and 'rejected', with a prompt or as whole dialogues"
        told = named_fields([*record], wanted, missing)
        raise RowFault(f"no {' and no '.join(map(repr, missing))}: {told}")
    rest = {name: value for name, value in fields.items() if name not in (*OWN_FIELDS, *UNREAD)}
    kinds = {isinstance(fields[name], str) for name in SIDES}
    if len(kinds) > 1:
        raise RowFault(
            f"'chosen' is {kind_of(fields['chosen'])} and 'rejected' {kind_of(fields['rejected'])}; wanted two texts, "
            "or two lists of messages"
        )
    as_texts = kinds == {True}
    chosen, rejected = _texts(fields, rest) if as_texts else _answers(fields, rest)
    if isinstance(rest.get("prompt"), list):
        if "messages" in rest:
            raise RowFault("fields 'messages' and 'prompt' both hold messages; keep one of them")
        rest["messages"] = rest.pop("prompt")
    row, left_out = parse_record(rest, default_uid=default_uid)
    if row.responses:
        raise RowFault("the prompt ends with a turn of the assistant; wanted a turn for the two responses to answer")
    pair = PairRow(
        row=row, chosen=chosen, rejected=rejected, turns=row.messages or _dialogue(row), teacher_logps=_logps(fields)
    )
    return pair, [*left_out, *(name for name in UNREAD if name in fields)]


def _texts(fields: Mapping[str, object], rest: dict[str, Any]) -> tuple[str, str]:
    """Both responses as text; where nothing else holds a prompt, the one that both begin with is put into ``rest``."""
    chosen, rejected = (checked_text(fields[name], name) for name in SIDES)
    if any(name in rest for name in PROMPT_FIELDS):
        return chosen, rejected
    (prompt, chosen), (other, rejected) = _cut(chosen, "chosen"), _cut(rejected, "rejected")
    if prompt != other:
        raise RowFault(_OTHER_BEGINNINGS)
    rest["prompt"] = prompt
    return chosen, rejected


def _cut(text: str, name: str) -> tuple[str, str]:
    """A dialogue up to the words that begin its last turn, and that turn."""
    at = text.rfind(ASSISTANT)
    if at < 0 or not _turns_of(text):
        raise RowFault(
            f"there is no prompt, and field {name!r} is no dialogue; wanted 'prompt', 'instruction' or 'messages', or "
            "'Human:' and 'Assistant:' turns with a blank line before each"
        )
    prompt, response = text[: at + len(ASSISTANT)], text[at + len(ASSISTANT) :]
    if HUMAN in response:
        raise RowFault(f"field {name!r} ends with a turn of the human; wanted one of the assistant")
    return prompt, response


def _turns_of(text: str) -> Turns:
    """The turns of a dialogue, without white space around them; () for text that is none."""
    found = list(_TURN.finditer(text))
    if not found or found[0].start() > 0 or found[0][1] != "Human":
        return ()
    ends = [*(match.start() for match in found[1:]), len(text)]
    return tuple((_ROLES[match[1]], text[match.end() : end].strip()) for match, end in zip(found, ends, strict=True))


def _dialogue(row: Row) -> Turns:
    """The turns of a prompt that is the text of a dialogue and waits for the assistant's; () for any other."""
    if row.instruction is not None or not (row.prompt or "").rstrip().endswith(ASSISTANT):
        return ()
    return _turns_of(row.prompt or "")[:-1]


def _answers(fields: Mapping[str, object], rest: dict[str, Any]) -> tuple[str, str]:
    """Both responses from turns of a chat; where those are whole chats, what stands before their last turn is put into
    ``rest`` as messages."""
    (before, chosen), (other, rejected) = (_chat(fields[name], name) for name in SIDES)
    if before != other:
        raise RowFault(_OTHER_BEGINNINGS)
    if before:
        _require_same_prompt(rest, before, chosen)
        for name in (*PROMPT_FIELDS, "input"):
            rest.pop(name, None)
        rest["messages"] = [{"role": role, "content": content} for role, content in before]
    return chosen, rejected


def _chat(value: object, name: str) -> tuple[Turns, str]:
    """The turns before the last, and what the assistant says in that one."""
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list) or not items:
        raise RowFault(f"field {name!r} is {kind_of(value)}, wanted text, a message or a list of messages")
    turns = tuple(checked_message(item, f"{name}[{place}]") for place, item in enumerate(items))
    if turns[-1][0] != "assistant":
        raise RowFault(f"field {name!r} ends with a turn of {turns[-1][0]!r}; wanted one of the assistant")
    return turns[:-1], turns[-1][1]


def _require_same_prompt(rest: Mapping[str, object], before: Turns, chosen: str) -> None:
    """Raise ``RowFault`` where a prompt beside whole chats is another one than theirs: one of the two would be read and
    the other not."""
    prompt = rest.get("prompt")
    same = prompt == before[-1][1] if isinstance(prompt, str) else prompt is None or _as_turns(prompt) == before
    messages = rest.get("messages")
    whole = (*before, ("assistant", chosen))
    if not same or (messages is not None and _as_turns(messages) not in (before, whole)) or "instruction" in rest:
        raise RowFault("'chosen' and 'rejected' are whole chats, and the prompt beside them is another one; keep one")


def _as_turns(value: object) -> Turns | None:
    if not isinstance(value, list):
        return None
    return tuple(checked_message(item, f"prompt[{place}]") for place, item in enumerate(value))


def _logps(fields: Mapping[str, object]) -> tuple[float, float] | None:
    value = fields.get(TEACHER_LOGPS)
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    if len(numbers) != len(SIDES) or not all(map(_is_finite, numbers)):
        raise RowFault(f"field {TEACHER_LOGPS!r} is not two finite numbers, of 'chosen' and of 'rejected'")
    for name, number in zip(SIDES, numbers, strict=True):
        if number > 0:
            raise RowFault(f"field {TEACHER_LOGPS!r} has {number:g} for {name!r}; wanted log-probabilities, 0 or less")
    return float(numbers[0]), float(numbers[1])


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False

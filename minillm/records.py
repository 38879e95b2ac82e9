"""One row of a file: from a line to a record, from a record to a checked ``Row``, or ``Document`` of a corpus."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minillm.errors import did_you_mean

RESPONSE_FIELDS = ("response", "output", "responses")
PROMPT_FIELDS = ("prompt", "instruction", "messages")
CHOICES_FIELD = "choices"
"""Holds answers to choose from where it is a list of texts; anything else there is left out like any other field."""
KNOWN_FIELDS = (*PROMPT_FIELDS, "input", *RESPONSE_FIELDS, "id", "uid")
TEXT_FIELD = "text"
"""Holds a document, in a row of a corpus that has no prompt."""
BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
LONGEST_NAME = 60
"""Characters of a name from a file that a message repeats."""
SHOWN = 3
"""How many rows a message lists before it says '…'."""
_STRING_OR_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(?P<constant>NaN|-?Infinity)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row as its file has it, before template and tokenizer.

    Example: ``{"id": "a", "instruction": "Add.", "input": "2+2", "output": "4"}`` gives
    ``Row(uid="a", instruction="Add.", input="2+2", responses=("4",))``.
    """

    uid: str
    prompt: str | None = None
    instruction: str | None = None
    """Goes before ``prompt`` where a row has both, so that one template serves training and test files alike."""
    input: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    """(role, content) pairs; a last turn of the assistant has been moved to ``responses``."""
    responses: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of a corpus as its file has it."""

    uid: str
    text: str


class RowFault(Exception):
    """One row is broken. Becomes a ``DataError`` with its line, or a counted skip; never seen outside reading."""

    def __init__(self, reason: str, *, column: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.column = column


def shown(name: str) -> str:
    """A name out of a file, safe for a terminal: quoted, control characters escaped, cut when long."""
    return repr(name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…")


def listed(names: list[str]) -> str:
    """The first few names, then an ellipsis where there are more."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def plain_name(name: str) -> str:
    """The same without quotes where nothing in it needs them."""
    return name if name.isprintable() and len(name) <= LONGEST_NAME else shown(name)


def parse_line(line: bytes | None, *, first: bool) -> dict[str, object]:
    """The JSON object that ``line`` holds, newline included or not; ``None`` stands for an over-long line.

    Raises ``RowFault``, with the column (in characters, from 1) wherever the fault has one.
    """
    text = decode_line(line, first=first)
    if not text.strip():
        raise RowFault("the line is blank")
    record = _decode(text)
    if not isinstance(record, dict):
        raise RowFault(f"got {kind_of(record)}, wanted a JSON object in braces", column=1)
    return record


def decode_line(line: bytes | None, *, first: bool) -> str:
    """The text that ``line`` holds, newline included; ``None`` stands for an over-long line.

    Raises ``RowFault``, with the column, for what is not plain UTF-8.
    """
    if line is None:
        raise RowFault("the line is longer than 16 MiB")
    if first and line.startswith(BYTE_ORDER_MARKS):
        raise RowFault("the file starts with a byte-order mark; save it as UTF-8 without one", column=1)
    if b"\x00" in line:
        raise RowFault("a NUL byte, as an interrupted write leaves it", column=line.index(b"\x00") + 1)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        raise RowFault(f"not UTF-8: byte 0x{line[error.start]:02x} ({error.reason})", column=column) from error


def _decode(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        # An interrupted copy leaves one line without its newline; say so instead of naming a missing comma.
        cut = "" if text.endswith("\n") else "; the last line has no end and seems cut off"
        what = error.msg[:1].lower() + error.msg[1:].removesuffix(" starting at")
        raise RowFault(f"not JSON: {what}{cut}", column=error.colno) from error
    except _Constant as error:
        places = (match.start() + 1 for match in _STRING_OR_CONSTANT.finditer(text) if match["constant"])
        raise RowFault(
            f"{error} is not a JSON number; write null or leave the field out", column=next(places)
        ) from error
    except RecursionError as error:
        raise RowFault("nested too deeply") from error
    except ValueError as error:
        # Python refuses integers of thousands of digits.
        raise RowFault(f"not JSON: {str(error).partition(';')[0]}") from error


class _Constant(Exception):
    """NaN, Infinity or -Infinity, which Python's reader would let through."""


def _refuse_constant(name: str) -> object:
    raise _Constant(name)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise RowFault(f"number {shown(digits)} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowFault(f"field {shown(twice)} is there twice; keep one of them")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite)


def parse_record(record: Mapping[str, object], *, default_uid: str) -> tuple[Row, list[str]]:
    """The checked row, and the names of fields that were left out.

    ``null`` is the same as an absent field (Parquet has no other way to leave one out). Raises
    ``RowFault`` for a missing prompt, a wrong type, two fields that say the same, or text no tokenizer can read.
    """
    fields = {name: value for name, value in record.items() if value is not None}
    messages = _messages(fields)
    responses = _responses(fields)
    if messages and messages[-1][0] == "assistant":
        if responses:
            raise RowFault("the last message is the assistant's and there is a response field too; keep one of them")
        messages, responses = messages[:-1], (messages[-1][1],)
    if not messages and "prompt" not in fields and "instruction" not in fields:
        raise RowFault(_no_prompt(list(record)))
    row = Row(
        uid=_uid(fields, default_uid),
        # With messages a 'prompt' beside them is usually their first turn: reading both would answer the wrong one.
        prompt=None if messages else _optional_text(fields, "prompt"),
        instruction=None if messages else _optional_text(fields, "instruction"),
        input="" if messages else _optional_text(fields, "input") or "",
        messages=messages,
        responses=responses,
        choices=_choices(fields),
        extra=_extra(fields),
    )
    if row.input and row.instruction is None:
        raise RowFault("field 'input' needs an 'instruction' beside it, and there is none")
    return row, _left_out(fields, row)


def parse_entry(record: Mapping[str, object], *, default_uid: str) -> tuple[Row | Document, list[str]]:
    """A row of a corpus, and the names of fields that were left out: with a prompt it is the row that ``parse_record``
    gives, without one the document of its text. Raises ``RowFault`` for one that is neither."""
    fields = {name: value for name, value in record.items() if value is not None}
    if any(name in fields for name in PROMPT_FIELDS):
        return parse_record(record, default_uid=default_uid)
    if TEXT_FIELD not in fields:
        wanted = f"wanted '{TEXT_FIELD}', or a prompt ('prompt', 'instruction' or 'messages') with its response"
        raise RowFault(f"neither text nor prompt: {named_fields(list(record), wanted, (TEXT_FIELD, *PROMPT_FIELDS))}")
    document = Document(uid=_uid(fields, default_uid), text=checked_text(fields[TEXT_FIELD], TEXT_FIELD))
    return document, [name for name in fields if name not in (TEXT_FIELD, "id", "uid")]


def _left_out(fields: Mapping[str, object], row: Row) -> list[str]:
    beside_messages = ("prompt", "instruction", "input") if row.messages else ()
    read = {*KNOWN_FIELDS, *row.extra, *((CHOICES_FIELD,) if row.choices else ())}
    unread = [name for name in fields if name not in read]
    return unread + [name for name in beside_messages if name in fields]


def _no_prompt(names: list[str]) -> str:
    wanted = "wanted 'prompt', or 'instruction' (with or without 'input'), or 'messages'"
    return f"no prompt: {named_fields(names, wanted, PROMPT_FIELDS)}"


def named_fields(names: list[str], wanted: str, known: Sequence[str]) -> str:
    """The fields that a row has, what was wanted, and the nearest to it, as the end of a sentence."""
    got = f"the fields are {', '.join(shown(name) for name in names[:8])}" if names else "the object is empty"
    hints = (did_you_mean(name, known) for name in names if name not in KNOWN_FIELDS)
    return f"{got}; {wanted}{next((hint for hint in hints if hint), '')}"


def _uid(fields: Mapping[str, object], default: str) -> str:
    name = "uid" if "uid" in fields else "id"
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RowFault(f"field {name!r} is {kind_of(value)}, wanted text or a whole number")
    uid = _clean(str(value), name)
    if not uid.strip():
        raise RowFault(f"field {name!r} is blank; give the row a name, or leave the field out")
    return uid


def _responses(fields: Mapping[str, object]) -> tuple[str, ...]:
    names = [name for name in RESPONSE_FIELDS if name in fields]
    if not names:
        return ()
    if len(names) > 1:
        raise RowFault(f"fields {' and '.join(map(repr, names))} both hold responses; keep one of them")
    value = fields[names[0]]
    values = value if isinstance(value, list) else [value]
    if not values:
        raise RowFault(f"field {names[0]!r} is an empty list; leave it out where there is no response")
    return tuple(checked_text(item, names[0], wanted="text or a list of texts") for item in values)


def _choices(fields: Mapping[str, object]) -> tuple[str, ...]:
    value = fields.get(CHOICES_FIELD)
    # Hub sets also keep other things under this name, and most runs want none of them: no reason to stop here.
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return ()
    return tuple(checked_text(item, CHOICES_FIELD) for item in value)


def _messages(fields: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    if "messages" not in fields:
        return ()
    value = fields["messages"]
    if not isinstance(value, list) or not value:
        raise RowFault(f"field 'messages' is {kind_of(value)}, wanted a list of {{role, content}} objects")
    turns = tuple(checked_message(item, f"messages[{place}]") for place, item in enumerate(value))
    if all(role == "assistant" for role, _ in turns):
        raise RowFault("field 'messages' holds no turn of the user to answer")
    return turns


def checked_message(item: object, name: str) -> tuple[str, str]:
    """(role, content) of one turn; ``RowFault`` where it is anything else."""
    if not isinstance(item, dict):
        raise RowFault(f"{name} is {kind_of(item)}, wanted an object with role and content")
    present = [key for key in item if item[key] is not None]
    if sorted(present) != ["content", "role"]:
        raise RowFault(
            f"{name} has the fields {', '.join(map(shown, present)) or 'none'}; wanted role and content only"
        )
    return checked_text(item["role"], f"{name}.role"), checked_text(item["content"], f"{name}.content")


def _extra(fields: Mapping[str, object]) -> dict[str, str]:
    extra: dict[str, str] = {}
    for name, value in fields.items():
        if name in KNOWN_FIELDS and not (name == "id" and "uid" in fields):
            continue
        if isinstance(value, bool):
            extra[name] = "true" if value else "false"
        elif isinstance(value, str | int | float):
            extra[name] = _clean(str(value), name)
    return extra


def _optional_text(fields: Mapping[str, object], name: str) -> str | None:
    return checked_text(fields[name], name) if name in fields else None


def checked_text(value: object, name: str, *, wanted: str = "text") -> str:
    """The text that a field holds; ``RowFault`` where it is none, or one that no tokenizer can read."""
    if not isinstance(value, str):
        raise RowFault(f"field {name!r} is {kind_of(value)}, wanted {wanted}")
    return _clean(value, name)


def _clean(text: str, name: str) -> str:
    if "\x00" in text:
        raise RowFault(f"field {shown(name)} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may spell half of a surrogate pair; no tokenizer reads it and no file can hold it.
        raise RowFault(f"field {shown(name)} holds half a character (\\u{ord(text[error.start]):04x})") from error
    return text


def kind_of(value: object) -> str:
    """What a value of JSON is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (str, "text"),
        ((int, float), "a number"),
        (dict, "an object"),
        (list, "a list" if value else "an empty list"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), f"a {type(value).__name__}")

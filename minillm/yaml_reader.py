"""Strict YAML: what a careful reader would accept, and nothing that can surprise or run.

Refused: duplicate keys, tags, anchors and aliases, several documents, keys that are not words, nesting deeper than
``MAX_DEPTH``, more than ``MAX_NODES`` values, and files larger than ``MAX_BYTES``. Plain words are read as in YAML
1.2's core schema: ``1e-3`` is a number, while ``no``, ``on``, ``12:30`` and ``2024-01-01`` are text (YAML 1.1 makes a
boolean, a number in base 60 and a date of them).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from minillm.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_NODES = 20_000
"""Values, lists and mappings of a file: reading as many takes a second or two."""

_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str"))
_NUMBER_START = list("-+.0123456789")
_CORE_SCHEMA: tuple[tuple[str, str, list[str]], ...] = (
    (_NULL, r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    (_BOOL, r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    (_INT, r"^[-+]?[0-9]+$", _NUMBER_START),
    (_FLOAT, r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", _NUMBER_START),
    (_FLOAT, r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
)


class _CoreLoader(yaml.SafeLoader):
    """Parses and composes only; ``_value`` builds the Python values, so no constructor of PyYAML's ever runs."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (filled below)


class _CoreDumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 *or* our reader would take for something else than text, and never writes an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _CORE_SCHEMA:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _CoreDumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def read_yaml_file(path: Path) -> Any:
    """The value in a YAML file, of plain dicts, lists, text and numbers; ``None`` for an empty file.

    Raises ``ConfigError`` with file, line and column where it is missing, unreadable or not strict YAML.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); wanted a YAML file") from None
    return read_yaml(raw, source=str(path))


def read_yaml(raw: bytes | str, *, source: str) -> Any:
    """The value that a YAML text says; ``source`` is how error messages call it."""
    data = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{source}: is larger than {MAX_BYTES} bytes; wanted a configuration, not a data file")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError(f"{source}:{line}:{column}: byte 0x{data[error.start]:02x} is not UTF-8 text") from None
    try:
        _refuse_unwanted_syntax(text, source=source)
        node = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        where = _where(error.problem_mark or error.context_mark, source=source)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: not valid YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        code = error.character if isinstance(error.character, int) else ord(error.character[:1])
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(f"{source}:{line}:{column}: character U+{code:04X} is not allowed in YAML") from None
    return None if node is None else _value(node, source=source)


def write_yaml(value: Mapping[str, Any]) -> str:
    """A YAML text that ``read_yaml`` reads back to an equal value. Keys keep their order."""
    # Escapes beyond ASCII: PyYAML would write some line breaks (U+0085) as they are, and read them back as a space.
    return str(yaml.dump(dict(value), Dumper=_CoreDumper, sort_keys=False, allow_unicode=False, width=100))


def _refuse_unwanted_syntax(text: str, *, source: str) -> None:
    """Walk the events, which costs no recursion, before anything nested is built from them."""
    depth = documents = nodes = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        where = _where(event.start_mark, source=source)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ConfigError(f"{where}: a second document starts here ('---'); wanted one")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: alias '*{event.anchor}' is not allowed; write the value out")
        nodes += isinstance(event, yaml.NodeEvent)
        if nodes > MAX_NODES:
            raise ConfigError(f"{where}: more than {MAX_NODES:,} values; wanted a configuration, not a data file")
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise ConfigError(f"{where}: anchor '&{event.anchor}' is not allowed; write the value out where it is used")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ConfigError(f"{where}: tag {_short_tag(tag)!r} is not allowed; wanted a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(f"{where}: nested more than {MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _value(node: yaml.Node, *, source: str) -> Any:
    """The Python value of a node whose syntax has been checked."""
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, source=source) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, source=source)
    assert isinstance(node, yaml.ScalarNode)
    if node.tag == _NULL:
        return None
    if node.tag == _BOOL:
        return node.value.lower() == "true"
    if node.tag in (_INT, _FLOAT):
        return _number(node, source=source)
    return node.value


def _number(node: yaml.ScalarNode, *, source: str) -> int | float:
    if node.tag == _FLOAT:
        # YAML writes a dot before inf and nan, Python does not.
        return float(re.sub(r"\.(?=[a-zA-Z])", "", node.value) if node.value[-1].isalpha() else node.value)
    try:
        return int(node.value)
    except ValueError:  # Python refuses thousands of digits
        raise ConfigError(f"{_where(node.start_mark, source=source)}: a number of {len(node.value)} digits") from None


def _mapping(node: yaml.MappingNode, *, source: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key, child in node.value:
        where = _where(key.start_mark, source=source)
        if not isinstance(key, yaml.ScalarNode) or key.tag != _STR:
            got = f"key {key.value!r}" if isinstance(key, yaml.ScalarNode) else "a key that is itself a list or mapping"
            raise ConfigError(f"{where}: {got} is not a word; wanted text (put quotes around it)")
        if key.value in values:
            raise ConfigError(
                f"{where}: key {key.value!r} is given twice, first on line {first_line[key.value]}; keep one"
            )
        values[key.value] = _value(child, source=source)
        first_line[key.value] = key.start_mark.line + 1
    return values


def _where(mark: Any, *, source: str) -> str:
    return source if mark is None else f"{source}:{mark.line + 1}:{mark.column + 1}"


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")

"""The base of every configuration class, and the wording of its errors.

Whatever is wrong with values is told as ``ConfigError``: one line per problem, the dotted path of the field, what was
got and what was wanted. When all problems are of two settings that exclude each other, as ``UnsupportedCombination``.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minillm.errors import ConfigError, UnsupportedCombination, did_you_mean

# Strict: "5", 5.0 and true are not the integer 5; an integer is accepted where a real number is wanted.
Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
ShareBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(min_length=1)]

MOST_LINES = 10
"""Problems told at once."""
_LONGEST_SHOWN = 80
_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text of at least {min_length} character",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "literal_error": "{expected}",
    "tuple_type": "a list",
    "dict_type": "a mapping of names to values",
    "model_type": "a mapping of names to values",
    "model_attributes_type": "a mapping of names to values",
    "too_long": "at most {max_length} entries",
    "union_tag_invalid": "a kind of {expected_tags}",
}


class Settings(BaseModel):
    """Frozen, keyword-only, and it refuses unknown names. A bad value raises ``ConfigError``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise explain(error, of=type(self)) from None

    # Nested settings are then checked inside the outermost call, so that their problems keep their full path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def explain(error: ValidationError, *, of: type[BaseModel], source: str = "") -> ConfigError:
    """The same problems as an error of ours, in the user's words; ``source`` names the file they stand in."""
    problems = error.errors(include_url=False)
    causes = [problem.get("ctx", {}).get("error") for problem in problems]
    lines = [_line(problem, of=of) for problem in problems]
    kind = UnsupportedCombination if all(isinstance(c, UnsupportedCombination) for c in causes) else ConfigError
    return kind(headed(lines, source=source))


def headed(lines: list[str], *, source: str) -> str:
    """Problem lines under the name of their file; a single problem stands on the same line."""
    if not source:
        return "\n".join(lines)
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    more = [f"and {len(lines) - MOST_LINES} more; is this the right file?"] if len(lines) > MOST_LINES else []
    return f"{source}: {len(lines)} problems\n" + "\n".join(f"  {line}" for line in (*lines[:MOST_LINES], *more))


def _line(problem: Mapping[str, Any], *, of: type[BaseModel]) -> str:
    models = list(_models_along(of, problem["loc"]))
    path = ".".join(str(part) for part, model in zip(problem["loc"], models, strict=True) if model is not _TAG)
    at = f"{path}: " if path else ""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "value_error":
        return f"{at}{context['error']}"
    if kind == "extra_forbidden":
        return _unknown(path, model=models[-1], key=str(problem["loc"][-1]))
    if kind == "missing":
        return f"{at}is missing; add it"
    if kind == "union_tag_not_found":
        return f"{at}'kind' is missing; wanted one of {', '.join(_kinds(problem['loc'], models))}"
    got = problem["input"]
    if kind == "union_tag_invalid":
        path, got = f"{path}.kind", context["tag"]
        meant = _near(got, context["expected_tags"]) or _as_setting(got, _choices(problem["loc"], models))
        return f"{path}: got {_show(got)}, wanted {context['expected_tags']}{meant}"
    wanted = _WANTED[kind].format(**context) if kind in _WANTED else problem["msg"]
    near = _near(got, wanted) if kind == "literal_error" else ""
    return f"{at}got {_show(got)}, wanted {wanted}{near}"


def _kinds(loc: Sequence[int | str], models: Sequence[Any]) -> list[str]:
    """The kinds of the setting, or of each entry of the list, that a path leads to."""
    return [choice.model_fields["kind"].default for choice in _choices(loc, models)]


def _choices(loc: Sequence[int | str], models: Sequence[Any]) -> list[type[BaseModel]]:
    """The classes that have one of these kinds each."""
    name, model = next((part, model) for part, model in zip(loc[::-1], models[::-1], strict=True) if model is not None)
    return [choice for choice in _models_in(model.model_fields[name].annotation) if "kind" in choice.model_fields]


def _as_setting(got: str, choices: Iterable[type[BaseModel]]) -> str:
    """Where what was taken for a kind is a word that some kind's setting may have: ``kind: tdpo2``."""
    for choice in choices:
        for name, field in choice.model_fields.items():
            if name != "kind" and got in _words(field.annotation):
                return f"; did you mean kind: {choice.model_fields['kind'].default} with {name}: {got}?"
    return ""


def _words(annotation: Any) -> set[Any]:
    """The values that an annotation lists one by one."""
    inner = typing.get_args(annotation)
    return set(inner) if typing.get_origin(annotation) is Literal else set().union(*map(_words, inner))


def _unknown(path: str, *, model: Any, key: str) -> str:
    known = list(model.model_fields)
    near = did_you_mean(key, known)
    return f"{path}: no setting of this name{near or '; known here: ' + ', '.join(known)}"


def _near(got: Any, wanted: str) -> str:
    return did_you_mean(got, wanted.replace("'", "").replace(" or ", ", ").split(", ")) if isinstance(got, str) else ""


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


_TAG = object()
"""Stands for the parts of a path that pydantic adds and the user never wrote."""


def _models_along(root: type[BaseModel], loc: tuple[int | str, ...]) -> Iterator[Any]:
    """For each part of a path: the class that the part is a name in, ``None`` for an index, ``_TAG`` for a tag."""
    choices: list[type[BaseModel]] = [root]
    keyed = False
    for part in loc:
        tagged = [model for model in choices if len(choices) > 1 and model.model_fields["kind"].default == part]
        if isinstance(part, int):
            yield None
        elif tagged:
            choices = tagged
            yield _TAG
        elif part == "[key]":  # a mapping's key, not its value, is wrong
            yield _TAG
        elif keyed:  # what stands in a mapping of settings has a name that no class knows
            keyed = False
            yield None
        else:
            yield choices[0] if choices else None
            field = choices[0].model_fields.get(part) if choices else None
            choices = list(_models_in(field.annotation)) if field is not None else []
            keyed = bool(choices) and field is not None and _maps(field.annotation)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _maps(annotation: Any) -> bool:
    """Whether its values stand under names."""
    return typing.get_origin(annotation) is dict or any(map(_maps, typing.get_args(annotation)))

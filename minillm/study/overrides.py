"""KEY=VALUE on the command line of a study: what they replace in its file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from minillm.config import RunConfig
from minillm.errors import ConfigError, did_you_mean
from minillm.yaml_reader import read_yaml

_MODELS = ("student", "teacher")
"""In the file these are runs that make the models; on the command line they are the models themselves, as for a run."""
_INSIDE = ("budget", "search", "taught", "paired")
"""Entries of which one part may be replaced, as ``budget.amount``."""


def with_overrides(values: Mapping[str, Any], overrides: Sequence[str], *, entries: Collection[str]) -> dict[str, Any]:
    """A study's file as it would read with the overrides in it; ``entries`` are those that such a file may have.

    An entry of the study replaces that entry; another name takes its cells along, into a folder of their own. Anything
    else is a setting of the recipe, for all cells. ``ConfigError`` where it is neither, and where an arm has the same
    setting, or one inside or around it, which would win.
    """
    found: dict[str, Any] = dict(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {override!r}: wanted PATH=VALUE such as stages.0.steps=5")
        value = read_yaml(text, source=f"override {override!r}")
        head, _, rest = path.partition(".")
        if path in entries and path not in _MODELS:
            found[path] = value
        elif head in _INSIDE and rest:
            found[head] = {**_mapping(found, head), rest: value}
        else:
            _require_setting(path, entries, found)
            for holder in _holders(found):
                holder["settings"] = {**_mapping(holder, "settings"), path: value}
    named = {override.partition("=")[0] for override in overrides}
    if "name" in named and "results" not in named:
        found["results"] = f"runs/studies/{found['name']}/cells"
    return found


def _holders(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Where settings stand: in the file and, where that has a short form with some of its own, there."""
    quick = found.get("quick")
    if not isinstance(quick, dict) or "settings" not in quick:
        return [found]
    found["quick"] = dict(quick)
    return [found, found["quick"]]


def _mapping(found: Mapping[str, Any], entry: str) -> dict[str, Any]:
    """What stands there, if anything; another kind of value is told when the file is checked."""
    held = found.get(entry)
    return dict(held) if isinstance(held, dict) else {}


def _require_setting(path: str, entries: Collection[str], found: Mapping[str, Any]) -> None:
    head = path.partition(".")[0]
    if head in entries and head not in _MODELS:
        raise ConfigError(f"override {path!r}: change the entry '{head}' as a whole, or in the study's file")
    if head not in RunConfig.model_fields:
        near = did_you_mean(head, {*entries, *RunConfig.model_fields})
        raise ConfigError(f"override {path!r}: neither an entry of a study nor a setting of a run{near}")
    arms = found.get("arms")
    for arm, own in arms.items() if isinstance(arms, dict) else ():
        for other in own if isinstance(own, dict) else ():
            if path == other or _inside(path, other) or _inside(other, path):
                what = "it itself, and" if path == other else f"{other!r} itself, which"
                raise ConfigError(f"override {path!r}: arm '{arm}' sets {what} would win; change it in the file")


def require_heard(overrides: Sequence[str], *, decided: Mapping[str, str], quick: Collection[str] | None) -> None:
    """``ConfigError`` for an override that would have no effect: of a setting that the study decides for itself
    (``decided``: the entry that does, by path), or, where the short form is wanted, of an entry that it has of its own
    (``quick``; None where it is not)."""
    for path in (override.partition("=")[0] for override in overrides):
        for setting, entry in decided.items():
            if path == setting or _inside(path, setting):
                raise ConfigError(
                    f"override {path!r}: {entry} sets it for every arm, and would win\n  change '{entry}', or leave it "
                    f"out ({entry}=null)"
                )
        head = path.partition(".")[0]
        if quick is not None and head not in _MODELS and (head in quick or head == "results"):
            raise ConfigError(
                f"override {path!r}: --quick has its own {head!r}, which would win\n  change it under 'quick' in the "
                "study's file, or leave --quick out"
            )


def _inside(path: str, outer: str) -> bool:
    return path.startswith(f"{outer}.")

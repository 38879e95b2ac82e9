"""What may differ between a run that was interrupted and the same run that goes on.

Every setting is one of four kinds, and so is what stands in the files that settings name. What is learnt from, and from
whom, never changes: that is another run. Some do nothing to training. Some change at most the last bits of it. All
others change it, and need the user's word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from minillm.cards import Card
from minillm.config import RunConfig
from minillm.errors import ConfigError, RunExists, did_you_mean


class Effect(StrEnum):
    """What a change of a setting does to a run that goes on."""

    NOTHING = "nothing"
    LAST_BITS = "last bits"
    TRAINING = "training"
    ANOTHER_RUN = "another run"


EFFECTS = {
    Effect.NOTHING: (
        "name", "out", "trackers", "checkpoints", "evaluation", "data.test", "data.test_limit", "data.cache",
    ),
    Effect.LAST_BITS: (
        "threads", "engine.student", "engine.activation_checkpointing", "engine.gather",
        "stages.micro_batch", "stages.micro_tokens",
    ),
    Effect.TRAINING: ("decoding", "engine.precision", "stages", "stages.anchor.weight", "stages.anchor.rate"),
    Effect.ANOTHER_RUN: (
        "seed", "student", "teacher", "data", "lora", "bottleneck", "stages.kind", "stages.name", "stages.start",
        "stages.anchor", "stages.keep", "stages.optimiser.name", "stages.teacher_cache", "stages.student_share",
        "stages.replay", "stages.sources", "stages.chunk", "stages.refresh_rejected",
    ),
}  # fmt: skip
"""By the path of a setting, without the numbers of stages, or of a section whose settings are all alike; the longest
path that fits counts."""
IN_FILES = {
    Effect.NOTHING: (
        "student.dtype", "student.placement", "engine.student.comms_logger", "engine.student.dump_state",
        "engine.student.flops_profiler", "engine.student.memory_breakdown", "engine.student.steps_per_print",
        "engine.student.timers", "engine.student.wall_clock_breakdown",
        *(f"engine.teacher.{name}" for name in (
            "comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "steps_per_print", "timers",
            "wall_clock_breakdown",
        )),
    ),
    Effect.LAST_BITS: (
        "teacher.placement", "engine.student.disable_allgather", "engine.student.gradient_predivide_factor",
        "engine.student.prescale_gradients", "engine.student.zero_allow_untested_optimizer",
        "engine.student.zero_force_ds_cpu_optimizer", "engine.student.zero_optimization",
        *(f"engine.teacher.{name}" for name in (
            "communication_data_type", "data_types", "disable_allgather", "gradient_predivide_factor",
            "prescale_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
        )),
    ),
    Effect.TRAINING: (
        "teacher.dtype", "engine.student.communication_data_type", "engine.student.data_types",
        "engine.student.zero_optimization.zero_quantized_gradients",
        "engine.student.zero_optimization.zero_quantized_nontrainable_weights",
        "engine.student.zero_optimization.zero_quantized_weights",
    ),
}  # fmt: skip
"""The same of what ``in_files`` gives. A student trains in 32 bits whatever its card says, and is evaluated in its
dtype; a teacher computes in its own, and what would round its weights is refused in its engine file."""
_BY_PATH = {path: effect for known in (EFFECTS, IN_FILES) for effect, paths in known.items() for path in paths}
_OF_A_CARD = ("dtype", "placement")


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that is not as it was."""

    path: str
    """As in an override: ``stages.0.steps``."""
    before: Any
    now: Any

    @property
    def effect(self) -> Effect:
        """What it does."""
        return effect_of(self.path)

    def __str__(self) -> str:
        return f"{self.path} was {self.before!r}, is {self.now!r}"


def effect_of(path: str) -> Effect:
    """What a change of the setting at this path does; ``KeyError`` for one that nobody has thought of."""
    parts = [part for part in path.split(".") if not part.isdigit()]
    for length in range(len(parts), 0, -1):
        if (found := _BY_PATH.get(".".join(parts[:length]))) is not None:
            return found
    raise KeyError(path)


def in_files(
    *, student: Card, teacher: Card | None, engine: Mapping[str, Any], teacher_engine: Mapping[str, Any]
) -> dict[str, Any]:
    """What the cards and the engine files say that a run's configuration names and its weights do not show, by the path
    under which a change of it is told."""
    cards = {"student": student, "teacher": teacher}
    said = {
        f"{name}.{field}": getattr(card, field)
        for name, card in cards.items()
        for field in _OF_A_CARD
        if card is not None
    }
    return {**said, **dict(_flat(engine, "engine.student")), **dict(_flat(teacher_engine, "engine.teacher"))}


def _flat(values: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}.{name}")
        else:
            yield f"{at}.{name}", value


def changes_in_files(before: Mapping[str, Any], now: Mapping[str, Any], *, named: Collection[Change]) -> list[Change]:
    """What differs between two of ``in_files``. Where an engine file has another name too only what changes training is
    given of it, since the rest is what the new name means: the student's where its name is among ``named``, the
    teacher's where it was or is another's, or nobody looked."""
    found = [
        Change(path, before.get(path), now.get(path))
        for path in dict.fromkeys((*before, *now))
        if before.get(path) != now.get(path)
    ]
    other = ["engine.student."] if "engine.student" in {change.path for change in named} else []
    looked = all(any(path.startswith("engine.teacher.") for path in each) for each in (before, now))
    if not looked or "teacher.placement" in {change.path for change in found}:
        other.append("engine.teacher.")
    return [c for c in found if not c.path.startswith(tuple(other)) or c.effect is Effect.TRAINING]


def changes(before: RunConfig, now: RunConfig) -> list[Change]:
    """Every setting that differs, in the order of the configuration; of stages that were added, all their
    names."""
    return list(_changes(before.model_dump(mode="json"), now.model_dump(mode="json"), ""))


def _changes(before: Any, now: Any, at: str) -> Iterator[Change]:
    if before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            yield from _changes(before.get(name), now.get(name), f"{at}.{name}" if at else name)
    elif at == "stages":
        for number, (one, other) in enumerate(zip(before, now, strict=False)):
            yield from _changes(one, other, f"{at}.{number}")
        if len(now) > len(before):
            yield Change(at, [stage["name"] for stage in before], [stage["name"] for stage in now])
        for number, gone in enumerate(before[len(now) :], start=len(now)):
            yield Change(f"{at}.{number}.name", gone["name"], None)
    else:
        yield Change(at, before, now)


def paths_of(values: Any, at: str = "") -> Iterator[str]:
    """The paths of all settings among the values of a configuration."""
    inner: Collection[tuple[Any, Any]] = ()
    if isinstance(values, Mapping):
        inner = values.items()
    elif isinstance(values, list) and all(isinstance(each, Mapping) for each in values):
        inner = [*enumerate(values)]
    if not inner:
        yield at
    for name, value in inner:
        yield from paths_of(value, f"{at}.{name}" if at else str(name))


def judge(
    found: Collection[Change], *, accepted: Collection[str], source: str, known: Collection[str] = ()
) -> list[str]:
    """What to say of the changes of a run that goes on.

    Raises ``RunExists`` where they make another run of it, or one changes training and its path is not ``accepted``;
    ``ConfigError`` where something accepted has not changed, which is a slip, or is none of the ``known`` paths.
    """
    changed = [change.path for change in found]
    if idle := [path for path in accepted if path not in changed]:
        raise ConfigError(_idle(idle[0], changed=changed, known=known))
    if other := [change for change in found if change.effect is Effect.ANOTHER_RUN]:
        raise RunExists(
            f"{source} is of another run: {'; '.join(map(str, other))}.\n"
            "  give this run another name (name=NAME), set back what differs, or start over with --fresh"
        )
    if asked := [change for change in found if change.effect is Effect.TRAINING and change.path not in accepted]:
        flags = " ".join(f"--accept-change {change.path}" for change in asked)
        raise RunExists(
            f"{source} was made with other settings: {'; '.join(map(str, asked))}; nothing was touched.\n"
            f"  go on with them by {flags}, set them back, or start over with --fresh"
        )
    words = [f"changed, which trains nothing else: {change}" for change in found if change.effect is Effect.NOTHING]
    words += [
        f"changed: {change}; from here on the last bits may differ from those of the unbroken run"
        for change in found
        if change.effect is Effect.LAST_BITS
    ]
    return words + [
        f"changed, as accepted: {change}; this is no longer the unbroken run"
        for change in found
        if change.effect is Effect.TRAINING
    ]


def _idle(path: str, *, changed: Collection[str], known: Collection[str]) -> str:
    """Why there is nothing to accept under a path."""
    within = [each for each in changed if each.startswith(f"{path}.")]
    if within:
        flags = " ".join(f"--accept-change {each}" for each in within)
        return f"--accept-change {path}: a section, wanted each setting that has changed\n  name them: {flags}"
    near = did_you_mean(path, changed)
    if path in known:
        return f"--accept-change {path}: this setting is as it was{near}\n  leave it out"
    near = near or did_you_mean(path, known)
    return f"--accept-change {path}: no setting of this name{near}\n  wanted its path, such as stages.0.steps"

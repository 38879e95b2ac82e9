"""When a stage that samples is told to be going wrong, and what happens then: settings of ``alarms``."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from minillm.errors import ConfigError, UnsupportedCombination
from minillm.settings import NonNegative, Settings

Action = Literal["warn", "stop", "rollback"]
"""What an alarm does: tell; end the run with an error; end the stage with the best student that validation found."""


class AlarmConfig(Settings):
    """One alarm."""

    limit: NonNegative
    """Where it rings: a value of the figure, or a multiple of what the stage began with (see docs/alarms.md)."""
    action: Action = "warn"
    """'warn' tells; 'stop' ends the run with exit code 4; 'rollback' ends the stage with the best student so far."""


SHARES = ("repetition", "cut_share", "teacher_mass", "importance_ess", "clipped_share", "clamped_share")
"""Alarms on a share, whose limit is one."""


class _Alarms(Settings):
    """Alarms by their names."""

    @model_validator(mode="before")
    @classmethod
    def _own(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = {name: cls.model_fields[name].default for name in values if name in cls.model_fields}
        return {
            name: {**fields[name].model_dump(), **given} if isinstance(given, dict) and name in fields else given
            for name, given in values.items()
        }


def require_validation(alarms: _Alarms, *, validate_every: int) -> None:
    """Raise ``UnsupportedCombination`` where an alarm rolls back in a stage that never validates: there is nothing to
    roll back to."""
    for name in type(alarms).model_fields:
        alarm = getattr(alarms, name)
        if alarm is not None and alarm.action == "rollback" and validate_every == 0:
            raise UnsupportedCombination(
                f"alarms.{name}.action 'rollback' with validate_every 0: no student is known to be better; "
                "set validate_every, or action: stop"
            )


class PreferenceAlarmsConfig(_Alarms):
    """When a stage that learns from pairs is told to be going wrong; null turns an alarm off. What a setting leaves out
    (limit or action) is the alarm's own."""

    chosen_floor: AlarmConfig | None = AlarmConfig(limit=10.0)
    """Mean log-ratio of the chosen responses to the reference below minus this many nats: both responses become
    unlikely."""


class AlarmsConfig(_Alarms):
    """When a stage that samples is told to be going wrong; null turns one off. What a setting leaves out (limit or
    action) is the alarm's own."""

    reverse_kl: AlarmConfig | None = AlarmConfig(limit=2.5)
    """Mean reverse KL above this multiple of the start's."""
    entropy: AlarmConfig | None = AlarmConfig(limit=0.2)
    """Entropy a token below this multiple of the start's."""
    short: AlarmConfig | None = AlarmConfig(limit=0.3)
    """Mean length below this multiple of the start's."""
    long: AlarmConfig | None = AlarmConfig(limit=3.0)
    """Mean length above this multiple of the start's."""
    repetition: AlarmConfig | None = AlarmConfig(limit=0.2)
    """Share of tokens that complete a 3-gram which stands earlier in the response: more than this above the teacher's
    own."""
    cut_share: AlarmConfig | None = AlarmConfig(limit=0.95)
    """Share of responses that reach the limit above this."""
    teacher_mass: AlarmConfig | None = AlarmConfig(limit=0.01)
    """The teacher's mean probability of the tokens below this."""
    importance_ess: AlarmConfig | None = AlarmConfig(limit=0.1)
    """Effective share of the tokens' weights below this."""
    clipped_share: AlarmConfig | None = AlarmConfig(limit=0.6)
    """Share of tokens that the clip cuts above this."""
    clamped_share: AlarmConfig | None = AlarmConfig(limit=0.01)
    """Share of tokens whose log-ratio is held above this."""
    padding_leak: AlarmConfig | None = AlarmConfig(limit=0.0, action="stop")
    """Places without a token that carry credit: more than this."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in SHARES:
            alarm = getattr(self, name)
            if alarm is not None and alarm.limit > 1.0:
                raise ConfigError(f"{name}.limit: got {alarm.limit:g}, wanted a share, 0 to 1")
        if self.short is not None and self.long is not None and self.short.limit >= self.long.limit:
            raise ConfigError(
                f"short.limit {self.short.limit:g} with long.limit {self.long.limit:g}: every length would ring; "
                "set short.limit below long.limit, or either to null"
            )
        return self

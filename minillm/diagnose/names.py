"""Choices of credit by name: ``expected+ridge+g0.9`` is expected returns, a ridge baseline and a discount of 0.9."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.errors import ConfigError, did_you_mean
from minillm.stage_config import MinillmStage

FUTURES = ("sampled", "expected")
BASELINES = ("position_mean", "leave_one_out", "group_mean", "ridge", "grpo")
REFERENCE = "sampled"
"""The paper's next-step return, without length normalisation: what others are measured by."""
DEFAULTS = (
    *("sampled", "sampled+position_mean", "sampled+leave_one_out", "sampled+ridge", "sampled+grpo"),
    *("expected", "expected+position_mean", "expected+leave_one_out", "expected+ridge"),
    *("sampled+norm", "expected+norm", "expected+position_mean+norm", "expected+ridge+norm"),
    *("expected+ridge+g0.99", "expected+ridge+g0.95", "expected+ridge+g0.8"),
    *("expected+ridge+h4", "expected+ridge+h16"),
)
_GAMMA, _HORIZON = re.compile(r"g(0(\.\d+)?|1(\.0+)?)"), re.compile(r"h([1-9]\d*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator:
    """One choice of credit for the long-horizon term, as a stage that makes it."""

    name: str
    stage: MinillmStage

    @property
    def twin(self) -> str:
        """The sampled returns of the same objective (discount, horizon, normalisation), without a baseline."""
        shaping = [part for part in self.name.split("+")[1:] if part not in {*BASELINES, "whiten"}]
        return "+".join([FUTURES[0], *shaping])

    def keeps_expectation(self, reference: MinillmStage) -> bool:
        """Whether its gradient has the expectation of the reference's, as the stages say of themselves."""
        mine, other = (of.bias_reasons(truncated=False, tempered=False) or [] for of in (self.stage, reference))
        # At equal expectation under mixing too: there the two kinds of return differ (docs/methods/minillm.md).
        same_return = self.stage.teacher_mix == 0 or self.stage.future == reference.future
        return set(mine) <= set(other) and (same_return or self.stage.importance == "per_decision")


def name_of(stage: MinillmStage) -> str:
    """What a stage's own choice of credit is called here; its weights of the two terms are left aside."""
    parts: list[str] = [stage.future]
    parts += [stage.baseline] if stage.baseline != "none" else []
    parts += ["norm"] if stage.length_norm else []
    parts += [f"g{stage.gamma:g}"] if stage.gamma < 1 else []
    parts += [f"h{stage.horizon}"] if stage.horizon is not None else []
    parts += ["whiten"] if stage.whiten == "masked" else []
    return "+".join(parts)


def changes_of(name: str) -> dict[str, Any]:
    """The settings that a name stands for; ``ConfigError`` for a name that says nothing."""
    first, *rest = name.split("+")
    if first not in FUTURES:
        raise ConfigError(f"estimator {name!r}: {_unknown(first, FUTURES)}")
    changes: dict[str, Any] = {
        "future": first, "baseline": "none", "gamma": 1.0, "horizon": None, "length_norm": False, "whiten": "none",
        "single_weight": 1.0, "long_weight": 1.0,
    }  # fmt: skip
    said: dict[str, str] = {}
    for part in rest:
        for setting, value in _change(part, name).items():
            if setting in said:
                raise ConfigError(
                    f"estimator {name!r}: {said[setting]!r} and {part!r} are both a {setting}; leave one out"
                )
            said[setting], changes[setting] = part, value
    return changes


def chosen(names: Sequence[str], stage: MinillmStage) -> tuple[list[Estimator], list[str]]:
    """The estimators of these names for a stage like this one, the reference and each one's twin among them; and, for
    the terminal, a line for each that the stage refuses. Raises ``ConfigError`` for a name that says nothing."""
    found: dict[str, Estimator] = {}
    refused: list[str] = []
    for name in [REFERENCE, *names]:
        changes = changes_of(name)
        if changes["gamma"] == 0.0:
            refused.append(f"left out: {name}: with a discount of 0 there is no long-horizon term to measure")
            continue
        try:
            made = Estimator(name=name, stage=MinillmStage(**{**stage.model_dump(), **changes}))
        except ConfigError as error:
            refused.append(f"left out: {name}: {error}")
            continue
        found.setdefault(name, made)
        if made.twin not in found:
            twin = {**stage.model_dump(), **changes_of(made.twin)}
            found[made.twin] = Estimator(name=made.twin, stage=MinillmStage(**twin))
    return list(found.values()), refused


def _change(part: str, name: str) -> dict[str, Any]:
    if part in BASELINES:
        return {"baseline": part}
    if part == "norm":
        return {"length_norm": True}
    if part == "whiten":
        return {"whiten": "masked"}
    if _GAMMA.fullmatch(part):
        return {"gamma": float(part[1:])}
    if _HORIZON.fullmatch(part):
        return {"horizon": int(part[1:])}
    if re.fullmatch(r"g-?[\d.]+", part):
        raise ConfigError(f"estimator {name!r}: {part!r} is no discount; wanted g and a number from 0 to 1")
    if re.fullmatch(r"h-?[\d.]+", part):
        raise ConfigError(f"estimator {name!r}: {part!r} is no horizon; wanted h and a whole number from 1")
    raise ConfigError(f"estimator {name!r}: {_unknown(part, (*BASELINES, 'norm', 'whiten', 'g0.95', 'h8'))}")


def _unknown(part: str, known: Sequence[str]) -> str:
    near = did_you_mean(part, known)
    return f"nothing is called {part!r}{near or '; wanted ' + ', '.join(known)}"

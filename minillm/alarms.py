"""Alarms: figures of a rollout that say a run is going wrong, each with a likely cause and the knob to turn.

A falling reverse KL is no proof of health: it falls in runs whose text collapses too (Gu et al. 2024, ablations). So
what is watched besides is what collapses: length, entropy, weights, ratios. An alarm looks at the mean of the last
``WINDOW`` rollouts, against a fixed limit, against the stage's first rollout, which no update has touched, or against
the teacher's own text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from minillm.alarm_config import Action, AlarmsConfig, PreferenceAlarmsConfig
from minillm.state import State

WINDOW = 5
"""Steps (rollouts of a stage that samples) in a mean; fewer are no trend."""

Kind = Literal["above", "below", "below_minus", "above_start", "below_start", "above_teacher_by"]


class Watch(NamedTuple):
    """What an alarm looks at. ``limit`` of its settings is a value, what a value is below minus, a multiple of the
    start's, or how far above it."""

    figure: str
    kind: Kind
    means: str
    """Likely cause and knob, for the terminal."""
    window: int = WINDOW
    """Steps in the mean."""


WATCHES: dict[str, Watch] = {
    "reverse_kl": Watch(
        "reverse_kl", "above_start",
        "the student moves away from the teacher; lower optimiser.lr or long_weight, or set inner_epochs: 1",
    ),
    "entropy": Watch(
        "entropy", "below_start",
        "the student's text loses its variety; lower optimiser.lr or long_weight, or add lm_coefficient",
    ),
    "short": Watch(
        "mean_length", "below_start",
        "responses shrink, as they do where ending early is rewarded; is single_weight above 0? else lower long_weight",
    ),
    "long": Watch(
        "mean_length", "above_start",
        "responses grow, often by repetition; raise teacher_mix, lower long_weight, or see samples of the validation",
    ),
    "repetition": Watch(
        "repeated_tokens", "above_teacher_by",
        "responses repeat themselves more than the teacher's; raise teacher_mix, lower long_weight, or set "
        "repetition_weight",
    ),
    "cut_share": Watch(
        "cut_share", "above",
        "responses reach the limit without ending; raise decoding.max_new_tokens, or the student has stopped ending",
    ),
    "teacher_mass": Watch(
        "teacher_mass", "below",
        "the teacher finds the student's tokens unlikely; another template or vocabulary than it was trained with? "
        "or too high an optimiser.lr",
    ),
    "importance_ess": Watch(
        "importance_ess", "below",
        "few tokens carry all the weight; lower teacher_mix, or set importance: coin",
    ),
    "clipped_share": Watch(
        "clipped_share", "above",
        "most tokens are past the clip, so most of the gradient is cut; fewer inner_epochs, or lower optimiser.lr",
    ),
    "clamped_share": Watch(
        "clamped_share", "above",
        "log-ratios reach max_log_ratio; the student has jumped: lower optimiser.lr, or set inner_kl",
    ),
    "padding_leak": Watch(
        "padding_leak", "above",
        "places without a token carry credit, which is a fault of this program; please report it with the run's folder",
        window=1,
    ),
}  # fmt: skip
"""Every alarm of a stage that samples, by its setting's name."""
OF_PAIRS: dict[str, Watch] = {
    "chosen_floor": Watch(
        "chosen_log_ratio", "below_minus",
        "preferred responses become unlikely as well, since only their distance from the others is trained; add "
        "sft_weight, lower optimiser.lr, or raise beta",
    ),
}  # fmt: skip
"""Those of a stage that learns from pairs."""


class Raised(NamedTuple):
    """An alarm that rang."""

    name: str
    action: Action
    words: str


@dataclass(slots=True)
class Alarms:
    """What has been heard of a stage so far; it must hear the same figures on every rank."""

    settings: AlarmsConfig | PreferenceAlarmsConfig
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, list[float]] = field(default_factory=dict)
    ringing: set[str] = field(default_factory=set)

    @property
    def watches(self) -> dict[str, Watch]:
        """Those of the stage."""
        return OF_PAIRS if isinstance(self.settings, PreferenceAlarmsConfig) else WATCHES

    def hear(self, figures: Mapping[str, float]) -> list[Raised]:
        """The alarms that ring from now on; one that goes on ringing is not told again until it has been silent."""
        raised = []
        for figure, value in figures.items():
            if figure.startswith("teacher_"):
                self.first.setdefault(figure, value)
        # A set has another order in each process.
        watched = dict.fromkeys(watch.figure for watch in self.watches.values())
        for figure in (figure for figure in watched if figure in figures):
            last = self.last.setdefault(figure, [])
            last.append(figures[figure])
            self.first.setdefault(figure, figures[figure])
            del last[:-WINDOW]
        for name, watch in self.watches.items():
            setting = getattr(self.settings, name)
            over = None if setting is None else self._over(watch, setting.limit)
            if over is None:
                self.ringing.discard(name)
            elif name not in self.ringing:
                self.ringing.add(name)
                raised.append(Raised(name, setting.action, f"alarm {name}: {over}; {watch.means}"))
        return raised

    def state(self) -> State:
        """What a stage that goes on must have heard."""
        last = {name: [*of] for name, of in self.last.items()}
        return State({"first": {**self.first}, "last": last, "ringing": sorted(self.ringing)})

    def restore(self, state: State) -> None:
        """Has heard it."""
        self.first, self.last = dict(state.record["first"]), {name: [*of] for name, of in state.record["last"].items()}
        self.ringing = set(state.record["ringing"])

    def _over(self, watch: Watch, limit: float) -> str | None:
        """What is over its limit, in words; None while all is well, or nothing can be said yet."""
        last = self.last.get(watch.figure, [])[-watch.window :]
        if len(last) < watch.window:
            return None
        now = statistics.fmean(last)
        began = self.first[watch.figure]
        against, of_start = -limit if watch.kind == "below_minus" else limit, ""
        if watch.kind.endswith("start"):
            against, of_start = limit * began, f" ({limit:g} times the {began:.4g} it began with)"
        elif watch.kind == "above_teacher_by":
            level = self.first.get(f"teacher_{watch.figure}", began)
            against, of_start = limit + level, f" ({limit:g} more than the teacher's {level:.4g})"
        above = watch.kind.startswith("above")
        if math.isfinite(now) and not (now > against if above else now < against):
            return None
        side = "above" if above else "below"
        return f"{watch.figure} is {now:.4g} over {len(last)} steps, {side} {against:.4g}{of_start}"

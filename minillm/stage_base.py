"""What every kind of stage has: its optimiser, what decides on the weights it hands on, how it is validated.

"Official" in a default's source is the paper's published code (Gu et al., ICLR 2024).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from minillm.errors import ConfigError, UnsupportedCombination, did_you_mean
from minillm.settings import Count, NonNegative, Positive, Settings, Share, ShareBelowOne, Text, Whole

BETTER: dict[str, Literal["min", "max"] | None] = {
    "loss": "min",
    "reverse_kl": "min",
    "reverse_kl_per_token": "min",
    "rouge_l": "max",
    "validity": "max",
    "coverage": "max",
    "distinct_4": "max",
    "repetition_3": "min",
    "mean_length": None,
    "preference_loss": "min",
    "preference_accuracy": "max",
    "preference_margin": None,
}
"""Every validation measure and which way is better; ``None`` where neither is."""
OF_PAIRS = tuple(name for name in BETTER if name.startswith("preference_"))
"""Those of pairs of responses beside a reference, which only a stage that learns from such has."""
OF_PROMPTS = tuple(name for name in BETTER if name not in OF_PAIRS)
"""Those of validation prompts."""
WITHOUT_TEACHER = tuple(name for name in OF_PROMPTS if not name.startswith("reverse_kl"))
"""Of these, those that need no teacher."""
READ = ("loss", *OF_PAIRS)
"""Those of given responses, for which nothing is drawn."""
OWN_START = "student"
"""What a stage's ``start`` calls the student that the run begins with."""
LONGEST_NAME = 200
"""Characters of a name that becomes part of a path: file systems give one 255, and beside it stand others with more."""
_COMPONENT = re.compile(rf"[A-Za-z0-9._-]{{1,{LONGEST_NAME}}}")


class OptimiserConfig(Settings):
    """The optimiser of one stage and how its learning rate moves."""

    name: Literal["adamw", "muon"] = "adamw"
    """'muon' takes the hidden matrices and leaves embeddings and norms to AdamW; engine.student zero0 only."""
    lr: Positive
    """Highest learning rate (of AdamW), above 0."""
    muon_lr: Positive | None = None
    """Highest learning rate of Muon's matrices; as lr where not given. Only with 'name: muon'."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """AdamW's decay of the two moments, each from 0 to below 1; official."""
    eps: Positive = 1e-8
    """AdamW's smallest denominator; official."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay per step, times the learning rate, from 0; the official code's 1e-6 rounded to none."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Whole = 0
    """Updates over which the learning rate rises from 0; no more than the stage has."""
    final_fraction: Share = 0.0
    """Where 'linear' and 'cosine' end, as a share of lr, 0 to 1."""
    clip_grad: NonNegative = 1.0
    """Largest norm of the gradient; 0 never clips. Official."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.muon_lr is not None and self.name != "muon":
            raise UnsupportedCombination(
                f"muon_lr {self.muon_lr:g} with name '{self.name}': set name: muon, or leave it out"
            )
        return self


class KeepConfig(Settings):
    """Which validation decides on the weights that the stage hands on."""

    metric: Text = "loss"
    """A validation measure: 'loss' on references, or 'rouge_l', 'validity', … of one sampled response a prompt;
    'reverse_kl' where a stage learns on its own text."""
    mode: Literal["min", "max"] = "min"
    """Whether the smallest or the largest value is best."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.metric not in BETTER:
            near = did_you_mean(self.metric, BETTER) or f"; wanted one of {', '.join(BETTER)}"
            raise ConfigError(f"metric {self.metric!r}: no validation measure of this name{near}")
        better = BETTER[self.metric]
        if better is not None and self.mode != better:
            raise UnsupportedCombination(
                f"metric '{self.metric}' with mode '{self.mode}' would keep the worst weights; set mode: {better}"
            )
        return self


class NamedStage(Settings, ABC):
    """What every stage has, also one that trains nothing; narrowed or explained by each kind."""

    kind: str
    """Says which kind of stage this is."""
    name: Text
    """Names the stage in folders, logs and random keys; different from the other stages' names."""
    start: Text | None = None
    """Name of the earlier stage whose student this one starts from, or 'student' for the run's own; the stage before
    where null."""

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if not is_component(self.name):
            raise ConfigError(f"name: got {self.name!r}, wanted letters, digits, '.', '_' and '-' only")
        return self


class BaseStage(NamedStage):
    """What every kind of stage has that trains; ``steps`` and ``keep`` are narrowed or explained by each kind.

    A new kind is a class in ``stage_config``, in its ``Stage``, and its objective in ``stages``.
    """

    steps: Count
    """Optimiser steps, or rollouts."""
    keep: KeepConfig
    """Which weights the stage hands on."""
    micro_batch: Whole = 0
    """Rows per forward pass and rank; 0 takes all of the rank's rows at once. Changes memory, never the result."""
    micro_tokens: Whole = 0
    """Places per forward pass and rank, padding included; 0 sets no limit. A longer row goes alone. Beside micro_batch
    both limits hold. Changes memory, never the result."""
    optimiser: OptimiserConfig
    """Optimiser, learning rate and schedule."""
    validate_every: Whole = 0
    """Steps between validations; 0 never validates and hands on the last weights."""
    patience: Whole = 0
    """Validations without improvement before an early stop; 0 never stops early."""

    measures: ClassVar[tuple[str, ...]]
    """What validation can measure, and so what ``keep.metric`` may name."""
    headline: ClassVar[tuple[str, ...]]
    """Training figures beside the progress bar."""
    on_policy: ClassVar[bool]
    """Whether the student learns on its own text: then validation samples too."""
    drops_out: ClassVar[bool]
    """Whether the model's dropout is on in training. Not where the weights that drew a token must be those that learn
    from it, nor where what a student says is compared with what a reference said."""
    wants_teacher: ClassVar[bool]
    """Whether the stage asks a teacher while it trains."""
    reads: ClassVar[Literal["train", "teacher_text", "preferences"]] = "train"
    """Which rows of ``data`` it learns from."""

    @property
    @abstractmethod
    def rows_per_step(self) -> int:
        """Rows that all ranks together work on in one step."""

    @property
    @abstractmethod
    def updates_per_step(self) -> int:
        """Optimiser steps in one step of the loop."""

    @property
    @abstractmethod
    def responses_needed(self) -> Literal["none", "some", "all"]:
        """Of the rows that the stage draws from, which must have a reference response."""

    @abstractmethod
    def bias_reasons(self, *, truncated: bool, tempered: bool) -> list[str] | None:
        """Why the stage's gradient is not that of KL(student || teacher); ``None`` where it is not meant to be.

        ``truncated`` and ``tempered`` say how text is drawn: some ids never; at another temperature than 1.
        """

    def idle_settings(self, *, tempered: bool) -> dict[str, list[str]]:
        """Settings that are not as by default and change nothing beside the others, by what makes them so.

        ``tempered`` says that text is drawn at another temperature than 1.
        """
        by_default = type(self).model_fields["keep"].get_default()
        return {"validate_every 0": ["keep"]} if self.validate_every == 0 and self.keep != by_default else {}

    @property
    def samples_to_validate(self) -> bool:
        """Whether validation draws a response to each prompt, and not only reads the references."""
        return self.on_policy or self.keep.metric not in READ

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        if self.keep.metric not in self.measures:
            raise ConfigError(
                f"keep.metric: validation of a stage of kind {self.kind} does not measure '{self.keep.metric}'; "
                f"wanted {', '.join(self.measures)}"
            )
        if self.patience > 0 and self.validate_every == 0:
            raise UnsupportedCombination(
                f"patience {self.patience} with validate_every 0: nothing is validated; "
                "set validate_every, or patience: 0"
            )
        updates = self.steps * self.updates_per_step
        if self.optimiser.warmup_steps > updates:
            raise UnsupportedCombination(
                f"optimiser.warmup_steps {self.optimiser.warmup_steps} with {updates} updates in the stage: "
                "the learning rate would never arrive; set fewer warm-up steps"
            )
        return self


def told_idle(stage: BaseStage, why: Mapping[str, tuple[bool, Sequence[str]]]) -> dict[str, list[str]]:
    """Of the settings that each reason would make idle, where it holds, those that are not as by default; each under
    the first such reason. ``published.name`` is a setting of a section."""
    found: dict[str, list[str]] = {}
    told: set[str] = set()
    for reason, (holds, names) in why.items():
        idle = [name for name in names if holds and name not in told and _is_set(stage, name)]
        told.update(idle)
        if idle:
            found[reason] = idle
    return found


def _is_set(stage: BaseStage, path: str) -> bool:
    here: Any = stage
    *sections, name = path.split(".")
    for section in sections:
        here = getattr(here, section)
    return bool(getattr(here, name) != type(here).model_fields[name].get_default(call_default_factory=True))


def is_component(name: str) -> bool:
    """Whether a name is safe as one part of a path: letters, digits, '.', '_', '-', not too many, not only dots."""
    return _COMPONENT.fullmatch(name) is not None and set(name) != {"."}

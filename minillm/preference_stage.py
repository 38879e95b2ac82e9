"""The stage that learns from pairs of responses of which one is preferred: DPO, TDPO and their relatives.

docs/methods/dpo.md has the formulas.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from minillm.alarm_config import PreferenceAlarmsConfig, require_validation
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.settings import Count, Flag, NonNegative, Positive, ShareBelowOne, Text, Whole
from minillm.stage_base import OF_PAIRS, WITHOUT_TEACHER, BaseStage, KeepConfig, told_idle

TOSS_UP = 0.5
"""A label that is wrong so often says nothing."""


class PreferenceStage(BaseStage):
    """Learning from pairs of responses beside a frozen reference, which is the model that the stage starts from."""

    kind: Literal["preference"] = "preference"
    """Says which kind of stage this is."""
    name: Text = "preference"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""
    steps: Count
    """Optimiser steps."""
    batch: Count
    """Pairs per optimiser step, all ranks together."""
    micro_batch: Whole = 0
    """Pairs per forward pass and rank, each of them two rows; 0 takes all of the rank's pairs at once. Changes memory,
    never the result."""
    value: Literal["dpo", "tdpo1", "tdpo2"] = "dpo"
    """What of two responses is compared: their log-ratios to the reference, or those and their sequential KLs from
    it."""
    alpha: NonNegative = 0.5
    """How much the sequential KL of the rejected response counts, from 0; the paper's 0.5. Only with 'value: tdpo2'."""
    beta: Positive = 0.1
    """Multiplies what is compared, above 0: the smaller, the further the student may go from the reference; the paper's
    0.1."""
    link: Literal["sigmoid", "robust", "ipo", "hinge"] = "sigmoid"
    """How the comparison becomes a loss: a log-likelihood; one without bias where labels are swapped with chance
    label_noise; IPO's square, of means over tokens; a hinge."""
    target: Literal["hard", "smoothed", "soft"] | None = None
    """Chance that the chosen response is to be given over the other: 1; 1 - label_noise; or the teacher's own, whose
    optimum is the teacher. Null: soft where each pair brings the teacher's log-probabilities, and each that is
    validated on too or the run has a teacher; else hard."""
    label_noise: ShareBelowOne = 0.0
    """Share of labels that are taken to be wrong, 0 to below 0.5. Only with 'target: smoothed' or 'link: robust'."""
    sft_weight: NonNegative = 0.0
    """Weight of the cross-entropy of the chosen responses, per token, beside the pairs' loss, from 0."""
    sources: tuple[Text, ...] | None = None
    """Names of data.preferences whose pairs are learnt from; all where not given."""
    chunk: Count | None = None
    """Which chunk of data.chunks is learnt from, counted from 1, the easiest; all pairs where not given."""
    refresh_rejected: Flag = False
    """When the stage begins, its start answers each prompt anew, and that answer is the rejected one, unless it is cut,
    empty or the chosen one."""
    sequential_kl: Flag = False
    """Measures both sides' sequential KL from the reference in a stage with 'value: dpo', which then keeps the
    reference loaded; the others do so anyway."""
    alarms: PreferenceAlarmsConfig = PreferenceAlarmsConfig()
    """When the stage is told to be going wrong."""
    keep: KeepConfig = KeepConfig(metric="preference_loss")
    """Which weights the stage hands on; lowest loss on data.preferences_validation."""

    measures = (*OF_PAIRS, *WITHOUT_TEACHER)
    headline = ("loss", "accuracy", "margin", "grad_norm")
    on_policy = False
    drops_out = False
    wants_teacher = False
    reads: ClassVar[Literal["train", "teacher_text", "preferences"]] = "preferences"

    @property
    def rows_per_step(self) -> int:
        """Its pairs."""
        return self.batch

    @property
    def updates_per_step(self) -> int:
        """One."""
        return 1

    @property
    def responses_needed(self) -> Literal["none", "some", "all"]:
        """Of ``data.train`` it reads nothing."""
        return "none"

    @property
    def part(self) -> str:
        """Which of the pairs it learns from, in words; "all" where it says nothing."""
        named = {
            "sources": "" if self.sources is None else ", ".join(self.sources),
            "chunk": "" if self.chunk is None else str(self.chunk),
            "rejected responses": "drawn anew" if self.refresh_rejected else "",
        }
        return "; ".join(f"{name} {value}" for name, value in named.items() if value) or "all"

    @property
    def keeps_reference(self) -> bool:
        """Whether the reference is asked in every step, and not only once about the responses."""
        return self.value != "dpo" or self.sequential_kl

    def bias_reasons(self, *, truncated: bool, tempered: bool) -> list[str] | None:
        """It estimates no such gradient."""
        return None

    def idle_settings(self, *, tempered: bool) -> dict[str, list[str]]:
        """By reason."""
        why = {
            f"value {self.value} measures them": (self.value != "dpo" and self.sequential_kl, ["sequential_kl"]),
            "alpha 0: the stage trains as value dpo does": (self.value == "tdpo2" and self.alpha == 0, ["value"]),
        }
        return super().idle_settings(tempered=tempered) | told_idle(self, why)

    @model_validator(mode="after")
    def _check(self) -> Self:
        require_validation(self.alarms, validate_every=self.validate_every)
        if self.alpha != type(self).model_fields["alpha"].default and self.value != "tdpo2":
            raise UnsupportedCombination(
                f"alpha {self.alpha:g} with value '{self.value}', which has none; set value: tdpo2, or leave it out"
            )
        if self.link == "ipo" and self.value != "dpo":
            raise UnsupportedCombination(
                f"link 'ipo' with value '{self.value}': IPO is of means over tokens, and the sequential KLs are sums; "
                "set value: dpo, or another link"
            )
        if self.target in {"smoothed", "soft"} and self.link != "sigmoid":
            raise UnsupportedCombination(
                f"target '{self.target}' with link '{self.link}', which has no probability to compare it with; "
                "set link: sigmoid, or target: hard"
            )
        noisy = self.target == "smoothed" or self.link == "robust"
        if noisy != (self.label_noise > 0):
            raise UnsupportedCombination(
                f"label_noise {self.label_noise:g} with link '{self.link}' and target '{self.target or 'null'}': it is "
                "what 'target: smoothed' and 'link: robust' need, and nothing else reads; set both or neither"
            )
        if self.label_noise >= TOSS_UP:
            raise ConfigError(f"label_noise {self.label_noise:g}: wanted below {TOSS_UP}; such labels say nothing")
        if self.chunk is not None and self.sources is not None:
            raise UnsupportedCombination(
                f"chunk {self.chunk} with sources {list(self.sources)}: both say which pairs are learnt from; "
                "leave one out"
            )
        if self.sources is not None and len(set(self.sources)) < max(1, len(self.sources)):
            raise ConfigError(f"sources: got {list(self.sources)}, wanted at least one name, and each once")
        return self

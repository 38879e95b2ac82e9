"""The kinds of stage: what each trains, and with which settings (``stage_checks`` says what excludes what).

"Official" in a default's source is the paper's published code (Gu et al., ICLR 2024).
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from minillm.merge_stage import MergeStage
from minillm.minillm_settings import AnchorConfig, MinillmSettings
from minillm.preference_stage import PreferenceStage
from minillm.published import OFFICIAL, PublishedConfig
from minillm.stage_checks import CHAINED, check_minillm, idle_settings
from minillm.text_stages import (
    GkdStage,
    ImitkdStage,
    KdStage,
    RklStage,
    SeqkdStage,
    SftStage,
    SkewFklStage,
    SkewRklStage,
)

_PLENTY = 20.0
"""Nats within which products of weights are held: what is cut beyond the default could not be averaged anyway."""


class MinillmStage(MinillmSettings):
    """Reverse-KL distillation by policy gradient on the student's own text."""

    def bias_reasons(self, *, truncated: bool, tempered: bool) -> list[str] | None:
        """Why the stage's gradient is not, in expectation, that of KL(student || teacher) per response; empty if it is.

        A positive constant factor (equal weights other than 1, ``expected_length``) is no bias. Enumerated in
        tests/exact.
        """
        mixed, long = self.teacher_mix > 0, self.long_weight > 0
        reasons = {
            "per_step weights": mixed and self.importance == "per_step",
            "truncated weights": mixed and self.importance == "truncated",
            "teacher mixing weighs the token only, not the prefix": mixed and self.importance not in CHAINED,
            f"products of weights held within e^{self.max_log_ratio:g}": (
                mixed and self.importance in CHAINED and self.max_log_ratio < _PLENTY
            ),
            f"discount {self.gamma:g}": long and self.gamma < 1,
            f"horizon of {self.horizon} tokens": long and self.horizon is not None,
            f"baseline {self.baseline}, which holds the row itself": long and self.baseline in {"group_mean", "grpo"},
            "whitening": long and self.whiten != "none",
            "length normalisation": long and self.length_norm,
            "repetition reward: another objective": long and self.repetition_weight > 0,
            **{
                f"published.{name}": long or name == "token_mean"
                for name in self.published.named()
                if name != "weight_on_single"  # noise, and no bias (enumerated)
            },
            "several updates on a rollout": self.updates_per_step > 1,
            # Without the single-step term returns hold the present token, which is the plain policy gradient.
            "single-step and long-horizon terms weighted differently": 0 < self.single_weight != self.long_weight,
            "neither single-step nor long-horizon term": self.single_weight == self.long_weight == 0,
            "language-model anchor": self.lm_coefficient > 0,
            **({} if self.anchor is None else {_anchored(self.anchor): long and self.anchor.rate < 1}),
            "responses without finite scores left out": self.non_finite == "drop_row",
            "truncated sampling": truncated,
            "temperature other than 1: tempered student against tempered teacher": tempered,
        }
        return [reason for reason, holds in reasons.items() if holds]

    def idle_settings(self, *, tempered: bool) -> dict[str, list[str]]:
        """By reason; see ``stage_checks``."""
        return super().idle_settings(tempered=tempered) | idle_settings(self, tempered=tempered)

    @model_validator(mode="before")
    @classmethod
    def _official(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("estimator") != "official":
            return values
        own = values.get("published", {})
        if isinstance(own, PublishedConfig):
            own = own.model_dump(exclude_unset=True)
        published = {**OFFICIAL["published"], **own} if isinstance(own, dict) else own
        return {**OFFICIAL, **values, "published": published}

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_minillm(self)
        return self


def _anchored(anchor: AnchorConfig) -> str:
    return f"anchor: another objective, with {anchor.weight:g} KL(student || moving average of the student) added"


Stage = (
    SftStage
    | SeqkdStage
    | KdStage
    | ImitkdStage
    | GkdStage
    | RklStage
    | SkewFklStage
    | SkewRklStage
    | MinillmStage
    | PreferenceStage
)
"""Any kind of stage that trains."""
AnyStage = Annotated[Stage | MergeStage, Field(discriminator="kind")]
"""Any kind of stage, as the run's file names it by ``kind``."""

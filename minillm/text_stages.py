"""Stages that learn from text token by token, without credit for what a token leads to: fine-tuning, and MiniLLM's
neighbours.

The neighbours differ in the divergence from the teacher at each token, and in whose text it is; docs/methods/ has a
page for each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from minillm.errors import ConfigError, UnsupportedCombination
from minillm.settings import Count, Positive, Share, ShareBelowOne, Text, Whole
from minillm.stage_base import OF_PROMPTS, WITHOUT_TEACHER, BaseStage, KeepConfig, told_idle


class ReferenceStage(BaseStage):
    """What stages that learn from given responses only have in common."""

    steps: Count
    """Optimiser steps."""
    batch: Count
    """Rows per optimiser step, all ranks together."""
    length_window: Count = 1
    """Batches whose rows are sorted by length together: more pads less, but makes the rows of a batch alike, which cost
    more than it saved when measured (docs/LOG.md). 1 leaves the order random; packing leaves little padding anyway."""
    keep: KeepConfig = KeepConfig()
    """Which weights the stage hands on; lowest validation loss, as official."""

    measures = WITHOUT_TEACHER
    headline = ("loss", "grad_norm")
    on_policy = False
    drops_out = True

    @property
    def rows_per_step(self) -> int:
        """Its batch."""
        return self.batch

    @property
    def updates_per_step(self) -> int:
        """One."""
        return 1

    @property
    def responses_needed(self) -> Literal["none", "some", "all"]:
        """Nothing else is learnt from."""
        return "all"

    def bias_reasons(self, *, truncated: bool, tempered: bool) -> list[str] | None:
        """It estimates no such gradient."""
        return None


class SftStage(ReferenceStage):
    """Supervised fine-tuning on the reference responses."""

    kind: Literal["sft"] = "sft"
    """Says which kind of stage this is."""
    name: Text = "sft"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""

    wants_teacher: ClassVar[bool] = False


class SeqkdStage(ReferenceStage):
    """Sequence-level distillation (Kim and Rush 2016): fine-tuning on responses that the teacher wrote."""

    kind: Literal["seqkd"] = "seqkd"
    """Says which kind of stage this is."""
    name: Text = "seqkd"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""

    wants_teacher: ClassVar[bool] = False
    reads: ClassVar[Literal["train", "teacher_text", "preferences"]] = "teacher_text"


class KdStage(ReferenceStage):
    """Word-level distillation (Hinton et al. 2015; Sanh et al. 2019): the teacher's distribution at each token of the
    reference responses."""

    kind: Literal["kd"] = "kd"
    """Says which kind of stage this is."""
    name: Text = "kd"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""
    teacher_share: Share = 0.5
    """How much of the loss is the forward KL from the teacher instead of the reference's own token, 0 to 1; official
    0.5."""
    teacher_cache: Text | None = None
    """Folder that 'minillm cache' wrote: what the teacher said about the rows, so that it is not loaded to train. The
    forward KL is then that over the stored ids and one bucket for all others."""

    wants_teacher: ClassVar[bool] = True

    def idle_settings(self, *, tempered: bool) -> dict[str, list[str]]:
        """Without the teacher's share this is another kind."""
        found = super().idle_settings(tempered=tempered)
        if self.teacher_share == 0:
            found["teacher_share 0: the stage trains as sft does"] = ["kind"]
            if self.teacher_cache is not None:
                found["teacher_share 0: the stage trains as sft does"].append("teacher_cache")
        return found


def asks_teacher(stage: BaseStage) -> bool:
    """Whether a stage needs the teacher beside it, and not only what it once said, nor nothing."""
    if isinstance(stage, KdStage):
        return stage.teacher_cache is None and stage.teacher_share > 0
    return stage.wants_teacher


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a ``DistilStage`` makes of its settings."""

    divergence: str
    """Its name in ``scoring.STATISTICS``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the divergence, as ``scoring.Task`` calls them."""
    student_share: float | None
    """Chance of a row being the student's own text; None follows the validation loss."""
    share_step: float = 0.0
    loss_rise: float = 0.0
    replay: int = 0
    """Responses of the student that are kept to be learnt from again."""


class DistilStage(BaseStage):
    """A divergence from the teacher at each token, of text that is partly or wholly the student's own."""

    steps: Count
    """Batches."""
    batch: Count
    """Rows per batch, all ranks together."""
    inner_epochs: Count = 1
    """Passes over each batch."""
    expected_length: Positive | None = None
    """Tokens; the loss is divided by rows times this constant, never by a sampled length. max_new_tokens where not
    given."""
    keep: KeepConfig = KeepConfig(metric="reverse_kl")
    """Which weights the stage hands on; lowest validation reverse KL per response."""

    measures = OF_PROMPTS
    headline = ("loss", "mean_length", "grad_norm")
    on_policy = True
    drops_out = False
    wants_teacher = True

    @property
    @abstractmethod
    def plan(self) -> Plan:
        """Which divergence, and whose text."""

    @property
    def rows_per_step(self) -> int:
        """Its batch."""
        return self.batch

    @property
    def updates_per_step(self) -> int:
        """One for each pass."""
        return self.inner_epochs

    @property
    def responses_needed(self) -> Literal["none", "some", "all"]:
        """Rows that are not the student's own are references."""
        return "none" if self.plan.student_share == 1 else "some"

    def bias_reasons(self, *, truncated: bool, tempered: bool) -> list[str] | None:
        """It is not meant to be the gradient of the divergence of whole responses."""
        return None


class ImitkdStage(DistilStage):
    """ImitKD (Lin et al. 2020): the teacher's distribution at each token of the student's own text."""

    kind: Literal["imitkd"] = "imitkd"
    """Says which kind of stage this is."""
    name: Text = "imitkd"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""
    student_share: Share = 1.0
    """Chance of a row being the student's own text instead of a reference, 0 to 1."""

    @property
    def plan(self) -> Plan:
        """Forward KL."""
        return Plan(divergence="forward_kl", student_share=self.student_share)


class GkdStage(DistilStage):
    """GKD (Agarwal et al. 2024): a Jensen-Shannon divergence on references and the student's own text."""

    kind: Literal["gkd"] = "gkd"
    """Says which kind of stage this is."""
    name: Text = "gkd"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""
    beta: Share = 0.5
    """Between the forward KL (towards 0) and the reverse KL (towards 1), both ends excluded."""
    student_share: Share = 0.5
    """Chance of a row being the student's own text instead of a reference, 0 to 1; the paper's lambda."""

    @property
    def plan(self) -> Plan:
        """JSD."""
        return Plan(divergence="jsd", settings={"jsd_beta": self.beta}, student_share=self.student_share)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta in {0.0, 1.0}:
            other = "imitkd" if self.beta == 0 else "rkl"
            raise ConfigError(
                f"beta {self.beta:g}: there the divergence is 0 whatever the student does; wanted a number between "
                f"0 and 1, or the limit itself, which is kind: {other}"
            )
        return self


class RklStage(DistilStage):
    """On-policy distillation: the reverse KL at each token of the student's own text, which is MiniLLM with gamma 0."""

    kind: Literal["rkl"] = "rkl"
    """Says which kind of stage this is."""
    name: Text = "rkl"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""

    @property
    def plan(self) -> Plan:
        """Reverse KL."""
        return Plan(divergence="reverse_kl", student_share=1.0)


class SkewStage(DistilStage):
    """DistiLLM (Ko et al. 2024): a KL from one model to a mixture of both, on references and more and more of the
    student's own text, fresh and kept."""

    skew: ShareBelowOne = 0.1
    """Share, in the mixture, of the model whose KL from it is taken, 0 to below 1; the paper's 0.1."""
    student_share: Share | None = None
    """Chance of a row being the student's own text instead of a reference; null starts at 0 and follows validation, as
    the paper does."""
    share_step: Share = 0.1
    """How much that chance rises at a time; the paper's 0.1. Only with 'student_share: null'."""
    loss_rise: Positive = 0.1
    """It rises where the validation loss exceeds that at its last rise (at first, the first one) by this many nats a
    token; the paper's 0.1. Only with 'student_share: null'."""
    replay: Whole = 1000
    """Responses of the student that are kept to be learnt from again; 0 keeps none. The paper's 1,000. Until there are
    so many all are fresh; then the chance of a fresh one is that from 1 to 0 over the stage."""

    def _plan(self, divergence: str) -> Plan:
        return Plan(
            divergence=divergence, settings={"skew": self.skew}, student_share=self.student_share,
            share_step=self.share_step, loss_rise=self.loss_rise, replay=self.replay,
        )  # fmt: skip

    @property
    def rises(self) -> bool:
        """Whether a share that follows the validation loss can rise before the last step: the first validation is what
        the second is compared with."""
        return self.student_share is None and 2 * self.validate_every < self.steps

    def idle_settings(self, *, tempered: bool) -> dict[str, list[str]]:
        """A fixed share follows nothing, and a buffer that is never full gives nothing back.

        A share that cannot rise is told whatever was set, and not refused: a study writes its arms with a number of
        steps that its budget replaces, and makes short runs of them.
        """
        found = super().idle_settings(tempered=tempered)
        if self.student_share is None and not self.rises:
            found[
                f"validate_every {self.validate_every} in {self.steps} steps: the share could rise at the second "
                "validation at the soonest, so the student learns from references alone"
            ] = ["student_share", "share_step", "loss_rise", "replay"]
            return found
        before = (self.steps - 1) * self.batch
        why = {
            f"student_share {self.student_share}": (self.student_share is not None, ["share_step", "loss_rise"]),
            "student_share 0": (self.student_share == 0, ["replay"]),
            f"{before:,} rows before the last step: it is never full": (before < self.replay, ["replay"]),
        }  # fmt: skip
        return found | told_idle(self, why)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.student_share is None and self.share_step == 0:
            raise UnsupportedCombination(
                "student_share null with share_step 0: the share would start at 0 and stay there; "
                "set share_step, or student_share to the number that is meant"
            )
        if self.student_share is None and self.validate_every == 0:
            raise UnsupportedCombination(
                "student_share null with validate_every 0: the share follows the validation loss, and there is none; "
                "set validate_every, or student_share: 0.5"
            )
        return self


class SkewFklStage(SkewStage):
    """DistiLLM with KL(teacher || skew teacher + (1 - skew) student)."""

    kind: Literal["skew_fkl"] = "skew_fkl"
    """Says which kind of stage this is."""
    name: Text = "skew_fkl"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""

    @property
    def plan(self) -> Plan:
        """Skewed forward KL."""
        return self._plan("skew_fkl")


class SkewRklStage(SkewStage):
    """DistiLLM with KL(student || skew student + (1 - skew) teacher)."""

    kind: Literal["skew_rkl"] = "skew_rkl"
    """Says which kind of stage this is."""
    name: Text = "skew_rkl"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""

    @property
    def plan(self) -> Plan:
        """Skewed reverse KL."""
        return self._plan("skew_rkl")

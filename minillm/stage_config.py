"""The kinds of stage: what each trains, and which of its settings exclude each other.

"Official" in a default's source is the paper's published code (Gu et al., ICLR 2024).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from minillm.alarm_config import AlarmsConfig
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.published import OFFICIAL, PublishedConfig
from minillm.settings import Count, Flag, NonNegative, Positive, Share, Text, Whole
from minillm.stage_base import BETTER, BaseStage, KeepConfig

BY_TOKEN = {"per_step", "per_decision", "truncated"}
"""Importance weights made of a token's probabilities: they tell who drew it, so rows that share its coin may not serve
as its baseline."""
CHAINED = {"per_decision", "truncated"}
"""Importance weights that are multiplied along the response."""
_PLENTY = 20.0
"""Nats within which products of weights are held: what is cut beyond the default could not be averaged anyway."""
_WITHIN_GROUP = {"leave_one_out", "group_mean", "grpo"}
"""Baselines made of the samples of one prompt."""


class SftStage(BaseStage):
    """Supervised fine-tuning on the reference responses."""

    kind: Literal["sft"] = "sft"
    """Says which kind of stage this is."""
    name: Text = "sft"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""
    steps: Count
    """Optimiser steps."""
    batch: Count
    """Rows per optimiser step, all ranks together."""
    length_window: Count = 1
    """Batches whose rows are sorted by length together: more pads less, but makes the rows of a batch alike, which cost
    more than it saved when measured (docs/LOG.md). 1 leaves the order random; packing leaves little padding anyway."""
    keep: KeepConfig = KeepConfig()
    """Which weights the stage hands on; lowest validation loss, as official."""

    measures = ("loss",)
    headline = ("loss", "grad_norm")
    on_policy = False
    wants_teacher = False

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


class MinillmStage(BaseStage):
    """Reverse-KL distillation by policy gradient on the student's own text."""

    kind: Literal["minillm"] = "minillm"
    """Says which kind of stage this is."""
    name: Text = "minillm"
    """Names the stage in folders, logs and random keys; different from the other stages' names."""
    steps: Count
    """Rollouts."""
    prompts: Count
    """Prompts per rollout, all ranks together."""
    samples_per_prompt: Count = 1
    """Responses drawn for each prompt; official 1."""
    inner_epochs: Count = 1
    """Passes over each rollout; 1 keeps the gradient on-policy, official 4."""
    inner_batches: Count = 1
    """Optimiser steps in each pass: its rows are cut into so many parts, in an order of each pass's own."""
    inner_kl: Positive | None = None
    """No further step on a rollout once the student's KL from the one that sampled it exceeds this, in nats per token;
    null never stops."""
    estimator: Literal["exact", "official"] = "exact"
    """'exact': single-step KL over the vocabulary, and the return from the next token on for the long horizon.
    'official': the settings of the published code where this file does not say otherwise, deviations included."""
    teacher_mix: Share = 0.0
    """Chance of a token being drawn from the teacher, 0 to 1; official 0.2. At 0 the gradient needs no weights."""
    coin_groups: Count = 1
    """Groups of rows with coins of their own: more groups, more teacher calls and less variance."""
    future: Literal["sampled", "expected"] = "expected"
    """Future rewards as sampled, or as minus the KL at each visited state, which has less variance."""
    gamma: Share = 1.0
    """Discount of each further token, 0 to 1; 0 is on-policy distillation token by token, 1 the gradient of the KL."""
    horizon: Count | None = None
    """Tokens ahead that a return sums; all where null. Less variance, and another objective."""
    baseline: Literal["none", "position_mean", "leave_one_out", "group_mean", "ridge", "grpo"] = "position_mean"
    """What is subtracted from the return: nothing; the mean at that position of other prompts, of the siblings, or of
    all samples of the prompt; a regression on hidden states, fitted on other prompts. 'grpo': one score a response."""
    length_norm: Flag = False
    """Divide returns by the number of tokens that they sum, as official; another objective, so off."""
    whiten: Literal["none", "masked"] = "none"
    """Scale advantages to mean 0 and variance 1 over the kept tokens of all ranks; bends the gradient, so off."""
    repetition_weight: NonNegative = 0.0
    """Nats that a token costs, from 0, where it completes an n-gram that stands earlier in its response; another
    objective, so off."""
    repetition_ngram: Count = 3
    """Length of those n-grams, in tokens."""
    single_weight: NonNegative = 1.0
    """Weight of the single-step term, from 0; 1 is the exact gradient. At 0 returns hold the present token too."""
    long_weight: NonNegative = 1.0
    """Weight of the long-horizon term, from 0; 1 is the exact gradient."""
    importance: Literal["none", "per_step", "coin", "per_decision", "truncated"] = "coin"
    """A token's weight under teacher mixing: 1, q/m, or 1/(1 - teacher_mix) where the student drew it, else 0;
    'per_decision' multiplies q/m along the response, which alone is exact; 'truncated' the smaller of q/m and
    weight_cap."""
    weight_cap: Positive | None = None
    """Largest factor of a 'truncated' weight, above 0; a factor is below 1/(1 - teacher_mix) anyway."""
    clip: Positive | None = 0.2
    """PPO clip of q_new/q_old around 1, above 0; none where null. No effect at one update a rollout. Official."""
    dual_clip: Positive | None = None
    """Above 1: where the advantage is negative, q_new/q_old counts as this much at most; no bound where null."""
    max_log_ratio: Positive = 20.0
    """Log-ratios are held within plus and minus this many nats, so that their exponential stays finite."""
    expected_length: Positive | None = None
    """Tokens; the loss is divided by this constant, never by a sampled length. max_new_tokens where not given."""
    lm_coefficient: NonNegative = 0.0
    """Weight of a language-model loss on data.corpus, or else on the reference responses, from 0; official 1 (on
    pre-training text)."""
    lm_batch: Whole = 0
    """Rows or blocks of text of that loss per optimiser step, all ranks together."""
    lm_teacher_share: Share = 0.0
    """How much of that loss is the teacher's distribution instead of the text's own token, 0 to 1; official 0.5."""
    published: PublishedConfig = PublishedConfig()
    """Deviations of the published code, each a switch that is off."""
    keep: KeepConfig = KeepConfig(metric="reverse_kl")
    """Which weights the stage hands on; lowest validation reverse KL per response."""
    alarms: AlarmsConfig = AlarmsConfig()
    """What is watched while it trains, and what happens then."""

    measures = tuple(BETTER)[1:]
    headline = ("reverse_kl", "mean_length", "loss")
    on_policy = True
    wants_teacher = True

    @property
    def rows_per_step(self) -> int:
        """The responses of one rollout."""
        return self.prompts * self.samples_per_prompt

    @property
    def updates_per_step(self) -> int:
        """Updates on each rollout, at most."""
        return self.inner_epochs * self.inner_batches

    @property
    def responses_needed(self) -> Literal["none", "some", "all"]:
        """The language-model anchor draws from those that have one, unless the run has a corpus for it."""
        return "some" if self.lm_coefficient > 0 else "none"

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
            "truncated sampling": truncated,
            "temperature other than 1: tempered student against tempered teacher": tempered,
        }
        return [reason for reason, holds in reasons.items() if holds]

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
        _check_mixing(self)
        _check_credit(self)
        _check_published(self)
        _check_alarms(self)
        if self.lm_coefficient > 0 and self.lm_batch == 0:
            raise UnsupportedCombination(
                f"lm_coefficient {self.lm_coefficient:g} with lm_batch 0: the loss has no rows; "
                "set lm_batch: 1 or more, or lm_coefficient: 0"
            )
        if self.single_weight == self.long_weight == self.lm_coefficient == 0:
            raise UnsupportedCombination("single_weight, long_weight and lm_coefficient are all 0: nothing is trained")
        return self


Stage = Annotated[SftStage | MinillmStage, Field(discriminator="kind")]
"""Any kind of stage, as the run's file names it by ``kind``."""


def _check_alarms(stage: MinillmStage) -> None:
    """A rollback needs something to roll back to."""
    named = {name: getattr(stage.alarms, name) for name in AlarmsConfig.model_fields}
    back = [name for name, alarm in named.items() if alarm is not None and alarm.action == "rollback"]
    if back and stage.validate_every == 0:
        raise UnsupportedCombination(
            f"alarms.{back[0]}.action 'rollback' with validate_every 0: no student is known to be better; "
            "set validate_every, or action: stop"
        )


def _check_published(stage: MinillmStage) -> None:
    """Deviations that would change nothing, or that stand for what is there already."""
    if stage.published.count_divisor and not stage.length_norm:
        raise UnsupportedCombination(
            "published.count_divisor without length_norm: nothing is divided; set length_norm: true, or leave it out"
        )
    if stage.published.whiten_padding and stage.whiten != "none":
        raise UnsupportedCombination(
            f"published.whiten_padding with whiten '{stage.whiten}': advantages would be scaled twice; leave one out"
        )
    if stage.published.present_twice and (stage.single_weight == 0 or stage.baseline == "grpo"):
        raise UnsupportedCombination(
            "published.present_twice with single_weight 0 or baseline 'grpo': the present token is there already; "
            "leave it out"
        )
    sampled = stage.future == "sampled" or stage.single_weight == 0 or stage.published.present_twice
    if not sampled and (stage.published.reward_clip is not None or stage.published.untempered_reward):
        raise UnsupportedCombination(
            "published.reward_clip or untempered_reward with future 'expected': both are of sampled rewards, and "
            "there are none; set future: sampled, or leave them out"
        )
    if stage.lm_teacher_share > 0 and stage.lm_coefficient == 0:
        raise UnsupportedCombination(
            f"lm_teacher_share {stage.lm_teacher_share:g} with lm_coefficient 0: there is no such loss; "
            "set lm_coefficient and lm_batch, or lm_teacher_share: 0"
        )


def _check_credit(stage: MinillmStage) -> None:
    """Choices that exclude each other, or that would change nothing."""
    if stage.baseline in _WITHIN_GROUP and stage.samples_per_prompt == 1:
        raise UnsupportedCombination(
            f"baseline '{stage.baseline}' with samples_per_prompt 1: a response has no siblings to compare with; "
            "set samples_per_prompt: 2 or more, or baseline: position_mean"
        )
    shaped = {"gamma": stage.gamma < 1, "horizon": stage.horizon is not None, "length_norm": stage.length_norm}
    if stage.baseline == "grpo" and any(shaped.values()):
        names = ", ".join(name for name, holds in shaped.items() if holds)
        raise UnsupportedCombination(
            f"baseline 'grpo' with {names}: it gives one score to a whole response, which has no token ahead of it; "
            "leave them out, or set another baseline"
        )
    if stage.repetition_weight > 0 and stage.long_weight == 0:
        raise UnsupportedCombination(
            f"repetition_weight {stage.repetition_weight:g} with long_weight 0: it is part of the return, "
            "which then has no weight; set long_weight above 0, or repetition_weight: 0"
        )
    if (stage.weight_cap is not None) != (stage.importance == "truncated"):
        raise UnsupportedCombination(
            f"importance '{stage.importance}' with weight_cap {stage.weight_cap}: the cap belongs to 'truncated', "
            "which needs one; set both or neither"
        )
    if stage.dual_clip is not None and stage.dual_clip <= 1.0:
        raise ConfigError(f"dual_clip {stage.dual_clip:g}: wanted above 1 (3 is usual), or null")
    if stage.inner_batches > stage.rows_per_step:
        raise UnsupportedCombination(
            f"inner_batches {stage.inner_batches} with {stage.rows_per_step} responses in a rollout: "
            "a step would have none; set fewer"
        )
    if stage.updates_per_step == 1:
        idle = {"inner_kl": stage.inner_kl, "dual_clip": stage.dual_clip}
        if named := [name for name, value in idle.items() if value is not None]:
            raise UnsupportedCombination(
                f"{' and '.join(named)} with one update on each rollout: the student is still the one that sampled it, "
                "so nothing would be cut; set inner_epochs or inner_batches, or leave it out"
            )
    if stage.weight_cap is not None and stage.weight_cap * (1.0 - stage.teacher_mix) >= 1.0:
        raise UnsupportedCombination(
            f"weight_cap {stage.weight_cap:g} with teacher_mix {stage.teacher_mix:g}: no factor exceeds "
            f"{1.0 / (1.0 - stage.teacher_mix):.4g}, so nothing would be cut; "
            "set a smaller cap, or importance: per_decision"
        )


def _check_mixing(stage: MinillmStage) -> None:
    """What teacher mixing needs from importance weights and baselines (enumerated in tests/exact)."""
    mix = f"teacher_mix {stage.teacher_mix:g} with importance '{stage.importance}'"
    if stage.teacher_mix == 0:
        return
    if stage.importance == "none":
        raise UnsupportedCombination(
            f"{mix}: tokens drawn from the teacher would count as the student's own; "
            "set importance: coin (or per_step), or teacher_mix: 0"
        )
    if stage.importance == "coin" and stage.teacher_mix == 1:
        raise UnsupportedCombination(
            f"{mix}: the weight 1/(1 - teacher_mix) is infinite, no token is the student's; "
            "set teacher_mix below 1, or importance: per_step"
        )
    if stage.importance in BY_TOKEN and stage.baseline in _WITHIN_GROUP:
        raise UnsupportedCombination(
            f"{mix} and baseline '{stage.baseline}': all responses to one prompt share their coins, "
            "so that baseline bends the gradient; set importance: coin, "
            "or baseline: position_mean with coin_groups: 2 or more"
        )
    if stage.importance in BY_TOKEN and stage.baseline != "none" and stage.coin_groups == 1:
        raise UnsupportedCombination(
            f"{mix}, baseline '{stage.baseline}' and coin_groups 1: a baseline from rows that share this row's coins "
            "bends the gradient; two cures, both exact: set coin_groups: 2 or more (the baseline then comes from rows "
            "of other groups), or importance: coin (any baseline is then right)"
        )

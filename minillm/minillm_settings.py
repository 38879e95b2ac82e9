"""The settings of a minillm stage, each with its source where it has one.

"Official" in a default's source is the paper's published code (Gu et al., ICLR 2024).
"""

from __future__ import annotations

from typing import Literal

from minillm.alarm_config import AlarmsConfig
from minillm.published import PublishedConfig
from minillm.settings import Count, Flag, NonNegative, Positive, Settings, Share, Text, Whole
from minillm.stage_base import OF_PROMPTS, BaseStage, KeepConfig


class AnchorConfig(Settings):
    """What the student is held to beside the teacher: a moving average of its own weights (WARP, arXiv 2406.16768)."""

    weight: Positive = 0.1
    """Of KL(student || anchor) per response, beside that from the teacher, above 0; the paper's beta."""
    rate: Share = 0.01
    """How far the anchor goes towards the student after each update, 0 to 1; the paper's mu. At 0 it stays what the
    stage started from."""


class MinillmSettings(BaseStage):
    """Reverse-KL distillation by policy gradient on the student's own text; ``MinillmStage`` is built on them."""

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
    anchor: AnchorConfig | None = None
    """Holds the student to a moving average of its own weights; another objective, so null, which holds it to
    nothing. Takes 4 bytes of each rank's memory for a weight."""
    non_finite: Literal["stop", "drop_row"] = "stop"
    """What a score that is no finite number does: 'stop' ends the run before the update; 'drop_row' leaves its response
    out of the rollout, and those that were read in one packed sequence with it, counted and named. Validation
    leaves nothing out."""
    max_dropped_rows: Count = 8
    """Responses that the stage may leave out in all; with one more the run ends."""
    published: PublishedConfig = PublishedConfig()
    """Deviations of the published code, each a switch that is off."""
    keep: KeepConfig = KeepConfig(metric="reverse_kl")
    """Which weights the stage hands on; lowest validation reverse KL per response."""
    alarms: AlarmsConfig = AlarmsConfig()
    """What is watched while it trains, and what happens then."""

    measures = OF_PROMPTS
    headline = ("reverse_kl", "mean_length", "loss")
    on_policy = True
    drops_out = False
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

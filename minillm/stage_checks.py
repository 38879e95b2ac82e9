"""Which settings of a minillm stage exclude each other, and which change nothing beside the others."""

from __future__ import annotations

from minillm.alarm_config import require_validation
from minillm.errors import ConfigError, UnsupportedCombination
from minillm.minillm_settings import MinillmSettings
from minillm.stage_base import told_idle

BY_TOKEN = {"per_step", "per_decision", "truncated"}
"""Importance weights made of a token's probabilities: they tell who drew it, so rows that share its coin may not serve
as its baseline."""
CHAINED = {"per_decision", "truncated"}
"""Importance weights that are multiplied along the response."""
WITHIN_GROUP = {"leave_one_out", "group_mean", "grpo"}
"""Baselines made of the samples of one prompt."""


def check_minillm(stage: MinillmSettings) -> None:
    """Raise ``UnsupportedCombination`` or ``ConfigError`` for settings that cannot be meant together."""
    _check_mixing(stage)
    _check_credit(stage)
    _check_published(stage)
    require_validation(stage.alarms, validate_every=stage.validate_every)
    _check_anchor(stage)
    if stage.lm_coefficient > 0 and stage.lm_batch == 0:
        raise UnsupportedCombination(
            f"lm_coefficient {stage.lm_coefficient:g} with lm_batch 0: the loss has no rows; "
            "set lm_batch: 1 or more, or lm_coefficient: 0"
        )
    if stage.single_weight == stage.long_weight == stage.lm_coefficient == 0:
        raise UnsupportedCombination("single_weight, long_weight and lm_coefficient are all 0: nothing is trained")


def idle_settings(stage: MinillmSettings, *, tempered: bool) -> dict[str, list[str]]:
    """Settings that are not as by default and change nothing beside the others, by what makes them idle.

    They are told and not refused: a run's file may set them for the day when the other setting is turned on, and so
    may ``estimator: official``. ``tempered`` says that text is drawn at another temperature than 1.
    """
    mixed, several = stage.teacher_mix > 0, stage.updates_per_step > 1
    present = stage.single_weight == 0 or stage.published.present_twice  # returns hold the present token
    shaping = ["baseline", "length_norm", "whiten", "published.whiten_padding"]
    rewards = ["future", *(f"published.{name}" for name in ("reward_scale", "reward_clip", "half_log_probs"))]
    long = [*shaping, *rewards, "horizon", "published.untempered_reward", "published.count_divisor"]
    # Weights that reach the single-step term too count without advantages, and so does what holds their products.
    shared = mixed and (stage.importance in CHAINED or stage.published.weight_on_single)
    weights = [] if shared else ["importance"]
    # The log-ratios that are held also tell how far the student has moved.
    held = [] if shared or stage.inner_kl is not None else ["max_log_ratio"]
    surrogate = ["clip", "dual_clip", *weights, *held, "published.weight_in_clip"]
    held_here = stage.anchor is not None and not _nothing_held(
        stage
    )  # whose present token the single-step term does not hold
    nothing_ahead = stage.gamma == 0 and not (present or held_here) and stage.repetition_weight == 0
    why: dict[str, tuple[bool, list[str]]] = {
        "long_weight 0": (
            stage.long_weight == 0,
            ["gamma", *surrogate, "published.present_twice", *long],
        ),
        "anchor.rate 1: it is the student that samples": (_nothing_held(stage), ["anchor"]),
        "gamma 0: nothing is ahead": (nothing_ahead, [*surrogate, *long]),
        "gamma 0: the present token alone counts": (
            stage.gamma == 0 and (present or held_here),
            ["horizon", "future"],
        ),
        "gamma 1": (stage.gamma == 1, ["published.count_divisor"]),
        "teacher_mix 0": (
            not mixed,
            ["importance", "coin_groups", "alarms.importance_ess"]
            + [f"published.{name}" for name in ("weight_in_clip", "weight_on_single")],
        ),
        "one update on each rollout": (not several and not stage.published.weight_in_clip, ["clip"]),
        "lm_coefficient 0": (stage.lm_coefficient == 0, ["lm_batch"]),
        "repetition_weight 0": (stage.repetition_weight == 0, ["repetition_ngram"]),
        "non_finite 'stop'": (stage.non_finite == "stop", ["max_dropped_rows"]),
        "decoding.temperature 1": (not tempered, ["published.untempered_reward"]),
    }
    return told_idle(stage, why)


def _nothing_held(stage: MinillmSettings) -> bool:
    """Whether the anchor arrives at the student after each update, so that no rollout finds it elsewhere."""
    return stage.anchor is not None and stage.anchor.rate == 1


def _check_anchor(stage: MinillmSettings) -> None:
    """The anchor is part of the return, in nats of the student's own distribution."""
    if stage.anchor is None:
        return
    if stage.long_weight == 0:
        raise UnsupportedCombination(
            f"anchor of weight {stage.anchor.weight:g} with long_weight 0: it is part of the return, which then has no "
            "weight; set long_weight above 0, or anchor: null"
        )
    if deviations := stage.published.named():
        raise UnsupportedCombination(
            f"anchor with published.{', published.'.join(deviations)} (which 'estimator: official' sets): these scale, "
            "cut or round rewards, and the anchor's would no longer give the gradient of its KL; set estimator: exact, "
            "or anchor: null"
        )


def _check_published(stage: MinillmSettings) -> None:
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


def _check_credit(stage: MinillmSettings) -> None:
    """Choices that exclude each other, or that would change nothing."""
    if stage.baseline in WITHIN_GROUP and stage.samples_per_prompt == 1:
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


def _check_mixing(stage: MinillmSettings) -> None:
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
    if stage.importance in BY_TOKEN and stage.baseline in WITHIN_GROUP:
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

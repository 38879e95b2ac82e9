"""The published code of MiniLLM (Gu et al., ICLR 2024) as switches: what it does that the exact estimator does not.

Read from the authors' code, not run. Numbers O1 … O13 are those of the table in docs/methods/minillm.md, which says
what each does to the gradient. Every default here is the side that we hold to be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.settings import Flag, Positive, Settings


class PublishedConfig(Settings):
    """Deviations, one switch each. O2 is ``gamma``, O6 ``importance``, O9 ``lm_teacher_share``, O13 ``dual_clip``."""

    present_twice: Flag = False
    """O1: returns begin at the present token although the single-step term holds it: its gradient counts twice."""
    count_divisor: Flag = False
    """O3: length_norm divides a discounted sum by a plain number of tokens: far from the end returns fade."""
    whiten_padding: Flag = False
    """O4: advantages are whitened over padding too, as far as max_new_tokens."""
    weight_on_single: Flag = False
    """O5, the paper's equation 5 and not its code: the single-step term is weighted like the other; noise only."""
    weight_in_clip: Flag = False
    """O7: the clip acts on ratio times weight, and so deletes gradient before any update."""
    token_mean: Flag = False
    """O8: sums over tokens are divided by the number of tokens, not by sequences: a ratio of two random numbers."""
    untempered_reward: Flag = False
    """O11: the teacher's log-probability in the reward ignores decoding.temperature."""
    half_log_probs: Flag = False
    """O12: log-probabilities of sampled tokens are rounded to 16 bits (fp16)."""
    reward_scale: Positive = 1.0
    """Rewards are divided by this; the code has 0.5."""
    reward_clip: Positive | None = None
    """Rewards are held within plus and minus this, after the scale; the code has 100. No limit where null."""

    def named(self) -> list[str]:
        """The deviations that are on, by name."""
        plain = type(self)()
        return [name for name in type(self).model_fields if getattr(self, name) != getattr(plain, name)]


OFFICIAL: Mapping[str, Any] = {
    "teacher_mix": 0.2, "future": "sampled", "baseline": "none", "gamma": 0.95, "length_norm": True,
    "importance": "per_step", "inner_epochs": 4, "clip": 0.2, "lm_coefficient": 1.0, "lm_teacher_share": 0.5,
    "published": {
        "present_twice": True, "count_divisor": True, "whiten_padding": True, "weight_in_clip": True,
        "token_mean": True, "untempered_reward": True, "half_log_probs": True, "reward_scale": 0.5,
        "reward_clip": 100.0,
    },
}  # fmt: skip
"""What ``estimator: official`` sets where the configuration says nothing else. Sizes are the run's own: the paper has
256 responses a rollout in four updates a pass (``inner_batches: 4``), 256 new tokens."""
